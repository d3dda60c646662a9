"""The base of the config's sections, and the sections that training does not read: data before it, evaluation after it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]
Scale = Annotated[float, Field(ge=0.0, le=100.0)]


class Section(BaseModel):
    """Base of every section: immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class StorageConfig(Section):
    parts: Annotated[str, Field(pattern=r"^(s3|gs)://[^/@]+(/.*)?$")] | None = None
    """Where the data of subjects, pairs and shards go: ``s3://bucket/prefix`` or ``gs://...``, a prefix for each output folder.
    None keeps them in ``--output``, where manifests, checkpoints and evaluation stay in any case."""


class CurationConfig(Section):
    videos_per_part: Count = 16
    """Videos that one task owns and commits together."""
    shot_threshold: Positive = 27.0
    """Content change (mean HSV difference, 0 to 255) above which a new shot begins."""
    max_clips_per_video: Count = 4
    """Windows taken from one video, spread evenly over its shots."""
    detection_frames: Count = 5
    """Frames of a clip that the detector and its tracker look at, evenly spaced."""
    min_confidence: Fraction = 0.4
    """Detections below this score are not subjects."""
    embedding_px: Count = 224
    """Side of the white square on which a crop is shown to the vision encoder for its identity embedding."""
    max_references: Annotated[int, Field(ge=1, le=4)] = 3
    """Subjects kept per clip, by area."""
    min_area_fraction: Fraction = 0.1
    """Smallest subject box, as a fraction of the frame."""
    max_area_fraction: Fraction = 0.9
    """Largest subject box: what fills the frame is the scene, not a subject."""
    duplicate_iou: Fraction = 0.8
    """Two subjects whose masks overlap at least this much are one."""
    scene_references: bool = False
    """Give each clip its scene as one more reference, the subjects cut out; it takes one of the ``max_references`` places."""
    crop: Literal["mask", "box"] = "mask"
    """What a reference shows: the subject cut out on white, or its whole box."""
    classes: tuple[str, ...] = ()
    """Names of what to look for; empty takes all that the detector knows. An open-vocabulary detector (YOLOE) takes any words."""
    classes_in_caption: bool = False
    """Look only for those of ``classes`` that the clip's own caption names; for all of them where it names none."""
    caption: Literal["source", "missing", "all"] = "source"
    """Who writes captions: the source, the captioner where the source is silent, or the captioner always."""
    caption_prompt: str = "Describe this video in one or two plain sentences: who or what is in it, what happens, and where."
    """What the captioner is asked."""
    max_caption_tokens: Count = 96
    """Longest caption that the captioner may write."""
    min_aesthetic: float = 4.5
    """OpenS2V annotations: keep a subject with at least this aesthetic score ..."""
    min_text_image: Fraction = 0.6
    """... or at least this text-image score."""
    max_video_bytes: Count = 16 * 2**30
    """Larger files are quarantined unread."""
    max_frame_px: Count = 7680 * 4320
    """Videos with larger frames are quarantined undecoded."""
    max_worker_deaths: Count = 3
    """A video on which so many workers died is quarantined instead of started again."""
    max_quarantine_fraction: Fraction = 0.1
    """Share of faulty videos or clips above which the step fails."""

    @model_validator(mode="after")
    def _leaves_a_subject(self):
        if self.scene_references and self.max_references == 1:
            raise ValueError("curation.scene_references=true takes the one place of curation.max_references=1; allow 2 or more")
        return self


class QualityConfig(Section):
    """Which clips are good enough. Scores are columns of the clip rows, so another limit decodes nothing again.

    None leaves a test out. A score that could not be computed (NaN: one frame has no motion, no caption no match) passes.
    """

    min_sharpness: Annotated[float, Field(ge=0.0)] | None = None
    """Variance of the Laplacian of the clip as it is trained on, grey levels squared; below it is TOO_BLURRED."""
    min_exposure: Fraction | None = None
    """Mean luma from 0 (black) to 1 (white); below it is TOO_DARK."""
    max_clipped_fraction: Fraction | None = None
    """Share of pixels that are black or white through clipping; above it is CLIPPED."""
    min_motion: Annotated[float, Field(ge=0.0)] | None = None
    """Mean optical flow per frame as a share of the long side; below it is NO_MOTION (0.0005: half a pixel of 1,000)."""
    max_motion: Annotated[float, Field(ge=0.0)] | None = None
    """The same; above it is TOO_MUCH_MOTION."""
    min_text_image: float | None = None
    """Cosine of frames and caption under ``models.text_image``; below it is POOR_CAPTION_MATCH."""
    min_aesthetic: float | None = None
    """Score of ``models.aesthetic``; below it is NOT_AESTHETIC."""
    max_phash_distance: Annotated[int, Field(ge=0, le=16)] | None = None
    """Bits of 64 by which the perceptual hashes of two NEAR_DUPLICATE clips differ at most; the first by id stays."""
    evaluation_references: str | None = None
    """Folder of the pictures that evaluation will use; clips that show the same subjects are CONTAMINATED."""
    max_evaluation_similarity: Fraction = 0.9
    """Cosine of a subject and an evaluation picture from which they show the same."""

    @model_validator(mode="after")
    def _leaves_something(self):
        if self.min_motion is not None and self.max_motion is not None and self.min_motion > self.max_motion:
            raise ValueError(f"quality.min_motion={self.min_motion} is above quality.max_motion={self.max_motion}")
        return self


class PairsConfig(Section):
    min_similarity: Fraction = 0.7
    """Cosine of two crops' embeddings from which they may show one identity."""
    max_similarity: Fraction = 0.995
    """Above this two crops are the same picture, which teaches nothing."""
    max_references_per_subject: Count = 2
    """Pictures from other clips kept for one subject, the most similar first."""
    validation_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    """Share of source groups held out; pairs never join two groups, so no identity is in both splits."""


class GateConfig(Section):
    max_fidelity_loss: Annotated[float, Field(ge=0.0)] = 0.05
    """How far the 95% bound of the fidelity difference may lie below zero."""
    alpha: Annotated[float, Field(gt=0.0, lt=0.5)] = 0.05
    """Level of the test that some score is better, over all scores together."""
    min_prompts: Count = 16
    """Prompts below which nothing is decided."""
    votes: str | None = None
    """Answers that the blind page exported (``pipelines/register.py ask``): a file, or a folder of them. They are recorded."""
    min_vote_share: Fraction | None = None
    """Share of votes that the lower end of the challenger's 95% interval must reach; None decides without votes."""


class SamplingSettings(Section):
    """How a video is sampled, wherever one is made."""

    num_inference_steps: Annotated[int, Field(ge=1, le=1000)] = 50
    """Euler steps per video."""
    guidance_scale: Scale = 7.5
    """Strength of the prompt."""
    reference_guidance_scale: Scale = 5.0
    """Strength of the references."""
    negative_prompt: str = ""
    """The null text of guidance."""


class EvaluationConfig(SamplingSettings):
    num_samples: Count = 4
    """Held-out prompts to make a video for."""
    separability_subjects: Annotated[int, Field(ge=0)] = 24
    """Held-out subjects whose reference tokens are compared, block by block, before and after training; 0 for none."""
    gate: GateConfig = GateConfig()
    """When a challenger becomes champion."""
    judge: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")] | None = None
    """Python function, ``module:name``, that says of each video which attributes of its subjects are right
    (`refalign.evaluation.judging`); the toy preset names the one of the drawn world."""
    opens2v_evaluator: str | None = None
    """Command that scores the videos of OpenS2V-Eval: from ``$VIDEOS`` and ``$PROMPTS``, upstream's files into ``$SCORES``."""

    def describe_videos(self) -> dict[str, Any]:
        """The settings that decide the videos, not those that only judge them."""
        return self.model_dump(mode="json", exclude={"gate", "opens2v_evaluator"})


class PoolConfig(Section):
    cpus: Positive = 1.0
    """CPUs of one actor."""
    gpus: Annotated[float, Field(ge=0.0)] = 0.0
    """GPUs of one actor; fractions share a device."""
    resources: dict[str, Positive] = {}
    """Custom Ray resources of one actor, which place it on the nodes that offer them."""
    min_actors: Count = 1
    """Actors that are kept while there is work."""
    max_actors: Count = 1
    """Actors at the most; Ray adds them while parts wait and the cluster has room."""


class ClusterConfig(Section):
    subjects: PoolConfig = PoolConfig()
    """Actors that decode, detect and embed."""
    pairs: PoolConfig = PoolConfig()
    """Actors that match subjects; they need no GPU."""
    shards: PoolConfig = PoolConfig()
    """Actors that encode."""
    evaluate: PoolConfig = PoolConfig()
    """Actors that make and score videos."""
    worker_cpus: Positive = 1.0
    """CPUs of one training rank."""
    worker_gpus: Annotated[float, Field(ge=0.0)] = 0.0
    """GPUs of one training rank."""
    worker_resources: dict[str, Positive] = {}
    """Custom Ray resources of one training rank."""
    threads: Count = 2
    """Compute threads of each actor and rank."""
