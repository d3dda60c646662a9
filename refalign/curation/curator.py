"""Curation of one video: its clips, the subjects in them, their crops and embeddings, captions and scores, as CLIP rows."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from refalign.config import ModelsConfig, RunConfig
from refalign.curation.quality import Scores, load_scorer, match_caption, measure_clip
from refalign.curation.shots import Window, iter_annotated_window, iter_windows
from refalign.curation.sources import Annotation, SourceVideo, open_source
from refalign.curation.subjects import (
    SubjectRow,
    choose_classes,
    choose_subjects,
    find_candidates,
    find_scene,
    make_subject_row,
    read_candidates,
)
from refalign.errors import DataError, RefAlignError
from refalign.geometry import letterbox
from refalign.io.images import decode_image
from refalign.io.looks import Look
from refalign.io.video import make_center_crop, probe_duration_s, resize_crop
from refalign.pipeline.outcomes import Outcome
from refalign.pipeline.places import judge_fault

if TYPE_CHECKING:
    from refalign.models.captioner import Captioner
    from refalign.models.scores import TextImageScorer
    from refalign.models.yolo import Detector


@dataclass(kw_only=True)
class ClipRow(Scores):
    """Of `refalign.io.tables.CLIP_SCHEMA`."""

    clip_id: str
    video_id: str
    video_path: str
    source_group: str
    license: str
    consent: str
    caption: str
    caption_source: str
    start_s: float
    fps: float
    num_frames: int
    crop_xyxy_px: tuple[int, int, int, int]
    look: Look
    subjects: list[SubjectRow]


@dataclass
class Tally:
    """What was done so far.

    Attributes:
        crops: made, those of videos that turned out faulty among them.
        embeddings: computed; as many as crops.
        unusual: videos with unusual frames, by what it is.
    """

    crops: int = 0
    embeddings: int = 0
    unusual: Counter[str] = field(default_factory=Counter)


class Curator:
    """Detector and vision encoder, loaded once; scorer and captioner where they are set."""

    def __init__(self, config: RunConfig) -> None:
        import torch

        from refalign.models.dinov3 import VisionEncoder

        torch.set_num_threads(config.cluster.threads)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self.config = config
        self.encoder = VisionEncoder.from_config(config.models, self._device)
        self.tally = Tally()

    @cached_property
    def detector(self) -> Detector:
        """Loaded at the first video without annotation: annotated sources need none."""
        from refalign.models.yolo import DEFAULT_MIN_SCORE, load_detector

        settings = self.config.curation
        return load_detector(
            self.config.models.detector,
            device=self._device,
            classes=settings.classes,
            min_score=min(DEFAULT_MIN_SCORE, settings.min_confidence),
            needs_masks=settings.crop == "mask",
        )

    @cached_property
    def scorer(self) -> TextImageScorer | None:
        """Scores clips against their captions, and by their looks; None where no such model is set."""
        return load_scorer(self.config.models, self._device)

    @cached_property
    def captioner(self) -> Captioner:
        """Loaded at the first clip that it is asked about."""
        return load_captioner(self.config.models, self._device)

    def curate_video(
        self, source: SourceVideo, video_id: str, removed_s: Sequence[tuple[float, float]] = ()
    ) -> tuple[list[ClipRow], list[Outcome]]:
        """CLIP rows of one video and the outcomes of the video and of its clips. A fault quarantines the whole video.

        Broken frames, gaps, steps back and other sizes are no faults: no clip holds them, and ``tally.unusual`` counts
        the videos in which there were any.

        Args:
            removed_s: times that were taken down; clips that touch them are left out.
        """
        rows: list[ClipRow] = []
        outcomes: list[Outcome] = []
        unusual: Counter[str] = Counter()
        try:
            with open_source(source, max_bytes=self.config.curation.max_video_bytes) as (annotation, path):
                if annotation:
                    windows = iter_annotated_window(path, annotation, self.config, unusual=unusual)
                else:
                    duration_s = probe_duration_s(path, self.config.curation)
                    windows = iter_windows(path, self.config, duration_s=duration_s, unusual=unusual)
                for window in windows:
                    made = self._make_clip(source, annotation, video_id, window, removed_s)
                    if isinstance(made, ClipRow):
                        rows.append(made)
                        made = Outcome("clip", made.clip_id)
                    outcomes.append(made)
            if not outcomes:
                seconds = self.config.video.num_frames / self.config.video.fps
                raise DataError("TOO_SHORT", f"{source.name}: no shot of {seconds:.2f} s{_say(unusual)}")
        except DataError as error:
            fault = judge_fault(error, source.path, video_id)
            return [], [Outcome("video", source.name, fault.reason, str(fault))]
        except RefAlignError:
            raise
        except Exception:
            return [], [Outcome("video", source.name, "CRASH", f"{source.name}: {traceback.format_exc(limit=-3)}")]
        finally:
            self.tally.unusual.update(unusual.keys())
        first = outcomes[0]
        return rows, [*outcomes, Outcome("video", source.name, *(() if rows else (first.reason, first.message)))]

    def _make_clip(
        self,
        source: SourceVideo,
        annotation: Annotation | None,
        video_id: str,
        window: Window,
        removed_s: Sequence[tuple[float, float]],
    ) -> ClipRow | Outcome:
        """The row of a clip, or why there is none."""
        config = self.config
        start_s = window.start_s(config.video.fps)
        duration_s = config.video.num_frames / config.video.fps
        said = source.caption_at(start_s + duration_s / 2)
        clip_id = f"{video_id}-{round(start_s * 1000):08d}"
        where = f"{source.name} at {start_s:.2f} s"
        if any(start_s < end and begin < start_s + duration_s for begin, end in removed_s):
            return Outcome("clip", clip_id, "TAKEN_DOWN", f"{where}: taken down")
        if annotation:
            region = annotation.region_xyxy_px
            candidates = read_candidates(window, annotation, config.curation)
        else:
            height, width = window.frame_size_px
            region = (0, 0, width, height)
            candidates = find_candidates(window, self.detector, config.curation, choose_classes(said, config.curation))
        crop = make_center_crop(region, config.video)
        chosen = {f"s{rank}": each for rank, each in enumerate(choose_subjects(candidates, crop, config.curation))}
        if not chosen:
            return Outcome("clip", clip_id, "NO_SUBJECT", f"{where}: no subject within the limits that shows something")
        if config.curation.scene_references and (scene := find_scene(candidates, window, crop, config.curation)):
            chosen["scene"] = scene
        subjects = [make_subject_row(f"{clip_id}-{name}", each, window, crop, config) for name, each in chosen.items()]
        self._embed(subjects)
        frames = [resize_crop(frame, crop, config.video) for frame in window.samples.values()]
        caption, caption_source = choose_caption(said, frames, lambda: self.captioner, config)
        scores = measure_clip(frames, list(window.samples))
        scores.text_image_score, scores.aesthetic_score = match_caption(frames, caption, self.scorer)
        return ClipRow(
            **vars(scores),
            clip_id=clip_id,
            video_id=video_id,
            video_path=source.path,
            source_group=source.source_group,
            license=source.license,
            consent=source.consent,
            caption=caption,
            caption_source=caption_source,
            start_s=start_s,
            fps=config.video.fps,
            num_frames=config.video.num_frames,
            crop_xyxy_px=crop,
            look=window.look,
            subjects=subjects,
        )

    def _embed(self, subjects: Sequence[SubjectRow]) -> None:
        side = self.config.curation.embedding_px
        self.tally.crops += len(subjects)
        squares = [letterbox(decode_image(subject.crop_png), side, side)[0] for subject in subjects]
        embeddings = np.asarray(self.encoder.embed(np.stack(squares)).float().cpu())
        self.tally.embeddings += len(embeddings)
        for subject, embedding in zip(subjects, embeddings.tolist(), strict=True):
            subject.embedding = embedding


def choose_caption(said: str, frames: Sequence[np.ndarray], load: Callable[[], Captioner], config: RunConfig) -> tuple[str, str]:
    """The caption and its origin: ``source``, ``model:<id>@<digest>``, or ``none`` where the caption is empty.

    Args:
        said: what the source says of the clip; may be empty.
        frames: uint8 [H, W, 3] each, in order of time.
        load: gives the captioner; called only when one is needed.
    """
    said = said.strip()
    settings = config.curation
    if settings.caption == "source" or (settings.caption == "missing" and said):
        return said, "source" if said else "none"
    captioner = load()
    written = captioner.caption(np.stack(frames), settings.caption_prompt, settings.max_caption_tokens)
    return written, f"model:{captioner.name}" if written else "none"


def load_captioner(models: ModelsConfig, device: str) -> Captioner:
    """The captioner that the settings name."""
    from refalign.models.captioner import Captioner

    assert models.captioner is not None, "the config refuses a run that needs a captioner and names none"
    return Captioner.from_pretrained(
        models.captioner, revision=models.captioner_revision, device=device, dtype=models.encoder_dtype
    )


def _say(unusual: Counter[str]) -> str:
    return f" (frames: {', '.join(f'{count} {name}' for name, count in sorted(unusual.items()))})" if unusual else ""
