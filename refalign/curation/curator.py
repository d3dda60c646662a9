"""Curation of one video: its clips, the subjects in them, their crops and embeddings, captions and scores, as CLIP rows."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from refalign.config import RunConfig
from refalign.curation.captions import choose_caption, load_captioner
from refalign.curation.quality import load_scorer, match_caption, measure_clip
from refalign.curation.scenes import make_scene_row
from refalign.curation.shots import Window, iter_annotated_window, iter_windows
from refalign.curation.sources import SourceVideo, open_source
from refalign.curation.subjects import choose_classes, choose_subjects, find_candidates, make_subject_row, read_candidates
from refalign.errors import DataError, RefAlignError
from refalign.geometry import letterbox
from refalign.io.images import decode_image
from refalign.io.video import make_center_crop, probe_duration_s, resize_crop
from refalign.pipeline.outcomes import Outcome
from refalign.pipeline.places import judge_fault

Row = dict[str, Any]
"""Of `refalign.io.tables.CLIP_SCHEMA`."""


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
    def detector(self) -> Any:
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
    def scorer(self) -> Any:
        """Scores clips against their captions, and by their looks; None where no such model is set."""
        return load_scorer(self.config.models, self._device)

    @cached_property
    def captioner(self) -> Any:
        """Loaded at the first clip that it is asked about."""
        return load_captioner(self.config.models, self._device)

    def curate_video(
        self, source: SourceVideo, video_id: str, removed_s: Sequence[Sequence[float]] = ()
    ) -> tuple[list[Row], list[Outcome]]:
        """CLIP rows of one video and the outcomes of the video and of its clips. A fault quarantines the whole video.

        Broken frames, gaps, steps back and other sizes are no faults: no clip holds them, and ``tally.unusual`` counts
        the videos in which there were any.

        Args:
            removed_s: times that were taken down; clips that touch them are left out.
        """
        rows: list[Row] = []
        outcomes: list[Outcome] = []
        unusual: Counter[str] = Counter()
        try:
            with open_source(source, max_bytes=self.config.curation.max_video_bytes) as (opened, path):
                for window in self._windows(opened, path, unusual):
                    row, outcome = self._make_clip(opened, video_id, window, removed_s)
                    rows += [row] if row else []
                    outcomes.append(outcome)
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
        if not rows:
            outcomes.append(Outcome("video", source.name, outcomes[0].reason, outcomes[0].message))
        else:
            outcomes.append(Outcome("video", source.name))
        return rows, outcomes

    def _windows(self, source: SourceVideo, path: Path, unusual: Counter[str]) -> Iterator[Window]:
        if source.annotation:
            return iter_annotated_window(path, source.annotation, self.config, unusual=unusual)
        duration_s = probe_duration_s(path, self.config.curation)
        return iter_windows(path, self.config, duration_s=duration_s, unusual=unusual)

    def _make_clip(
        self, source: SourceVideo, video_id: str, window: Window, removed_s: Sequence[Sequence[float]]
    ) -> tuple[Row | None, Outcome]:
        config = self.config
        start_s = window.start_s(config.video.fps)
        duration_s = config.video.num_frames / config.video.fps
        said = source.caption_at(start_s + duration_s / 2)
        clip_id = f"{video_id}-{round(start_s * 1000):08d}"
        if any(start_s < end and begin < start_s + duration_s for begin, end in removed_s):
            return None, Outcome("clip", clip_id, "TAKEN_DOWN", f"{source.name} at {start_s:.2f} s: taken down")
        height, width = window.frame_size_px
        region = (0, 0, width, height)
        if source.annotation:
            left, right, top, bottom = source.annotation["metadata"]["crop"]
            region = (left, top, right, bottom)
            candidates = read_candidates(window, source.annotation, config.curation)
        else:
            candidates = find_candidates(window, self.detector, config.curation, choose_classes(said, config.curation))
        crop = make_center_crop(region, config.video)
        chosen = choose_subjects(candidates, crop, config.curation)
        if not chosen:
            message = f"{source.name} at {start_s:.2f} s: no subject within the limits that shows something"
            return None, Outcome("clip", clip_id, "NO_SUBJECT", message)
        subjects = [
            make_subject_row(candidate, window, crop, config) | {"subject_id": f"{clip_id}-s{rank}"}
            for rank, candidate in enumerate(chosen)
        ]
        scene = make_scene_row(candidates, window, crop, config) if config.curation.scene_references else None
        subjects += [scene | {"subject_id": f"{clip_id}-scene"}] if scene else []
        for subject, embedding in zip(subjects, self._embed(subjects), strict=True):
            subject["embedding"] = embedding.tolist()
        frames = [resize_crop(frame, crop, config.video) for frame in window.samples.values()]
        caption, caption_source = choose_caption(said, frames, lambda: self.captioner, config)
        row = {
            "clip_id": clip_id,
            "video_id": video_id,
            "video_path": source.path,
            "source_group": source.source_group,
            "license": source.license,
            "consent": source.consent,
            "caption": caption,
            "caption_source": caption_source,
            "start_s": start_s,
            "fps": config.video.fps,
            "num_frames": config.video.num_frames,
            "crop_xyxy_px": list(crop),
            "look": window.look.to_row(),
            **measure_clip(frames, list(window.samples)),
            **match_caption(frames, caption, self.scorer),
            "subjects": subjects,
        }
        return row, Outcome("clip", clip_id)

    def _embed(self, subjects: Sequence[Row]) -> np.ndarray:
        side = self.config.curation.embedding_px
        self.tally.crops += len(subjects)
        squares = [letterbox(decode_image(subject["crop_png"]), side, side)[0] for subject in subjects]
        embeddings = np.asarray(self.encoder.embed(np.stack(squares)).float().cpu())
        self.tally.embeddings += len(embeddings)
        return embeddings


def _say(unusual: Counter[str]) -> str:
    return f" (frames: {', '.join(f'{count} {name}' for name, count in sorted(unusual.items()))})" if unusual else ""
