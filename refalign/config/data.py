"""What a run learns from and with which models: input, curation, pairs, shards, and where parts are stored."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from refalign.config.section import Amount, Count, Fraction, Natural, Positive, Section


class InputConfig(Section):
    path: str | None = None
    """What to learn from: a folder, a video, a pattern, a list or table of paths or URIs, an OpenS2V or Phantom-Data annotation,
    or a cosmos-curate output folder; local, ``s3://`` or ``gs://``. None: videos of the toy world are drawn."""
    license: str = "unknown"
    """Licence written into rows whose source states none."""
    world_videos: Count = 48
    """Videos to draw when ``path`` is None."""
    world_seed: Natural = 0
    """Seed of the drawn world: equal seeds give equal bytes."""
    world_split: Literal["train", "heldout"] = "heldout"
    """Which creatures are drawn: those that the embedded weights were trained on, or others."""


class StorageConfig(Section):
    parts: Annotated[str, Field(pattern=r"^(s3|gs)://[^/@]+(/.*)?$")] | None = None
    """Where the data of subjects, pairs and shards go: ``s3://bucket/prefix`` or ``gs://...``, one prefix per output folder.
    None: ``--output``, where manifests, checkpoints and evaluation always stay."""


class ModelsConfig(Section):
    base: str
    """Wan2.1 in the diffusers layout (transformer, vae, text_encoder, tokenizer): a folder or a hub id."""
    base_revision: str | None = None
    """Hub revision of ``base``; pin it for a run that must be reproducible."""
    vision_encoder: str
    """DINOv3 ViT: a folder or a hub id. Gives the alignment targets and the identity embeddings."""
    vision_encoder_revision: str | None = None
    """Hub revision of ``vision_encoder``."""
    detector: str
    """Segmentation detector: a folder with model.yaml and model.safetensors, or an ultralytics name such as yolo11n-seg.pt.
    Open-vocabulary ones such as yoloe-11l-seg.pt detect the words of ``curation.classes``."""
    text_image: str | None = None
    """CLIP or SigLIP that scores a clip against its caption: a folder or a hub id. None leaves the score out."""
    text_image_revision: str | None = None
    """Hub revision of ``text_image``."""
    aesthetic: str | None = None
    """Aesthetic head over the embeddings of ``text_image``: a .safetensors file (pipelines/convert.py makes it of a .pth)."""
    captioner: str | None = None
    """Vision-language model that writes captions, of the class of Qwen2.5-VL: a folder or a hub id."""
    captioner_revision: str | None = None
    """Hub revision of ``captioner``."""
    max_text_tokens: Count = 512
    """Text tokens the transformer attends to; shorter prompts are padded with zeros."""
    encoder_dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type of the frozen encoders."""


class VideoConfig(Section):
    height_px: Count
    """Height of training clips; a multiple of the token size, 16 px for Wan2.1."""
    width_px: Count
    """Width of training clips; a multiple of the token size, 16 px for Wan2.1."""
    num_frames: Count
    """Frames of a clip: 1 more than a multiple of the VAE's stride, 4 for Wan2.1."""
    fps: Positive
    """Frame rate that clips are resampled to."""


class CurationConfig(Section):
    videos_per_part: Count = 16
    """Videos of one part, which one task makes and commits."""
    shot_threshold: Positive = 27.0
    """Content change (mean HSV difference, 0 to 255) above which a new shot begins."""
    max_clips_per_video: Count = 4
    """Clips taken from one video, spread evenly over its shots."""
    detection_frames: Count = 5
    """Frames of a clip that the detector and its tracker look at, evenly spaced."""
    min_confidence: Fraction = 0.4
    """Detections below this score are not subjects."""
    embedding_px: Count = 224
    """Side of the white square that holds a crop when the vision encoder computes its identity embedding."""
    max_references: Annotated[int, Field(ge=1, le=4)] = 3
    """Subjects kept per clip, by area."""
    min_area_fraction: Fraction = 0.1
    """Smallest subject box, as a fraction of the frame."""
    max_area_fraction: Fraction = 0.9
    """Largest subject box; a larger one is taken for the scene."""
    duplicate_iou: Fraction = 0.8
    """Mask IoU from which two detections are one subject."""
    scene_references: bool = False
    """Add the scene, with the subjects cut out, as a reference of each clip; it counts towards ``max_references``."""
    crop: Literal["mask", "box"] = "mask"
    """What a reference shows: the subject alone on white, or its whole box."""
    classes: tuple[str, ...] = ()
    """Classes to detect; empty: all that the detector knows. An open-vocabulary detector (YOLOE) takes any words."""
    classes_in_caption: bool = False
    """Detect only those of ``classes`` that the clip's caption names; all of them if it names none."""
    caption: Literal["source", "missing", "all"] = "source"
    """Captions of the source; or the captioner's where the source has none; or always the captioner's."""
    caption_prompt: str = "Describe this video in one or two plain sentences: who or what is in it, what happens, and where."
    """What the captioner is asked."""
    max_caption_tokens: Count = 96
    """Longest caption that the captioner may write."""
    min_aesthetic: float = 4.5
    """OpenS2V annotations: keep a subject with at least this aesthetic score ..."""
    min_text_image: Fraction = 0.6
    """... or at least this text-image score."""
    max_video_bytes: Count = 16 * 2**30
    """Larger files are quarantined without being read."""
    max_frame_px: Count = 7680 * 4320
    """Videos with larger frames are quarantined without being decoded."""
    max_worker_deaths: Count = 3
    """A video on which this many workers died is quarantined, not tried again."""
    max_quarantine_fraction: Fraction = 0.1
    """Share of faulty videos or clips above which the step fails."""

    @model_validator(mode="after")
    def _leaves_a_subject(self):
        if self.scene_references and self.max_references == 1:
            raise ValueError("curation.scene_references=true takes the one place of curation.max_references=1; allow 2 or more")
        return self


class QualityConfig(Section):
    """Which clips are good enough. Scores are columns of the clip rows: a changed limit decodes nothing again.

    None skips a test. A score that cannot be computed is NaN and passes, such as the motion of a single frame.
    """

    min_sharpness: Amount | None = None
    """Variance of the Laplacian of the clip as it is trained on, grey levels squared; below it is TOO_BLURRED."""
    min_exposure: Fraction | None = None
    """Mean luma from 0 (black) to 1 (white); below it is TOO_DARK."""
    max_clipped_fraction: Fraction | None = None
    """Share of pixels that are black or white through clipping; above it is CLIPPED."""
    min_motion: Amount | None = None
    """Mean optical flow per frame as a share of the long side; below it is NO_MOTION (0.0005: half a pixel of 1,000)."""
    max_motion: Amount | None = None
    """The same; above it is TOO_MUCH_MOTION."""
    min_text_image: float | None = None
    """Cosine of frames and caption under ``models.text_image``; below it is POOR_CAPTION_MATCH."""
    min_aesthetic: float | None = None
    """Score of ``models.aesthetic``; below it is NOT_AESTHETIC."""
    max_phash_distance: Annotated[int, Field(ge=0, le=16)] | None = None
    """Bits of 64 by which the perceptual hashes of two NEAR_DUPLICATE clips differ at most; the first by id stays."""
    evaluation_references: str | None = None
    """Folder of the pictures that evaluation uses; clips that show the same subjects are CONTAMINATED."""
    max_evaluation_similarity: Fraction = 0.9
    """Cosine of a subject and an evaluation picture from which they count as the same."""

    @model_validator(mode="after")
    def _leaves_something(self):
        if self.min_motion is not None and self.max_motion is not None and self.min_motion > self.max_motion:
            raise ValueError(f"quality.min_motion={self.min_motion} is above quality.max_motion={self.max_motion}")
        return self


class PairsConfig(Section):
    min_similarity: Fraction = 0.7
    """Cosine of two crops' embeddings from which they may be one subject."""
    max_similarity: Fraction = 0.995
    """Cosine above which two crops are the same picture and make no pair."""
    max_references_per_subject: Count = 2
    """Pictures from other clips kept for one subject, the most similar first."""
    validation_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    """Share of source groups held out; pairs never join two groups, so no identity is in both splits."""


class ShardsConfig(Section):
    samples_per_shard: Count = 64
    """Samples of one shard, which one task makes and commits."""
    augmented_references: Natural = 0
    """Augmented views (turned, sheared, tinted, moved; never cropped) stored of each reference in its place; 0: none."""
    targets: Literal["stored", "computed"] = "stored"
    """Vision tokens of the references: stored in the shards; or computed by every training rank from the references' pixels,
    which the shards then hold as PNG. The losses are the same; shards are smaller, and steps run the encoder too."""
    target_dtype: Literal["float16", "int8"] = "float16"
    """Type of stored vision tokens; int8, with a scale per token, takes half the space at a cosine error below 1e-4."""
    frame_tokens: bool = False
    """Also store vision tokens of the video's frames, which REPA needs: 67 MB for a clip of 81 x 480 x 832."""
