"""The subjects step: videos in, CLIP rows out, every file accounted for."""

from __future__ import annotations

import dataclasses
import json
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from refalign.config import RunConfig
from refalign.curation.shots import Window, iter_annotated_window, iter_windows
from refalign.curation.sources import SourceVideo, list_sources
from refalign.curation.subjects import choose_subjects, find_candidates, make_subject_row, read_candidates
from refalign.errors import DataError, RefAlignError
from refalign.geometry import letterbox
from refalign.outcomes import Outcome, check_quarantined, count_outcomes
from refalign.parts import run_parts
from refalign.pictures import decode_image
from refalign.schemas import CLIP_SCHEMA, check_table
from refalign.steps import Step, digest_sampled
from refalign.videos import make_center_crop, probe_duration_s


def plan_subjects(config: RunConfig, folder: Path) -> tuple[dict[str, list[dict[str, Any]]], list[Outcome], str]:
    """Assigns every usable file to a part.

    Returns:
        The plan, the outcomes of files that can be judged without decoding, and a fingerprint of the input's content.
    """
    outcomes: list[Outcome] = []
    usable: list[dict[str, Any]] = []
    seen: dict[str, str] = {}
    identity: list[Any] = []
    for source in list_sources(config.input, folder):
        if isinstance(source, DataError):
            outcomes.append(Outcome("video", str(source).partition(":")[0], source.reason, str(source)))
            identity.append([str(source), source.reason])
            continue
        video_id = digest_sampled(source.path) if source.path.is_file() else "missing"
        described = {**dataclasses.asdict(source), "path": str(source.path), "video_id": video_id}
        identity.append({**described, "path": ""})
        content = f"{video_id}-{source.annotation['metadata']['cut'] if source.annotation else ''}"
        if video_id != "missing" and content in seen:
            outcomes.append(Outcome("video", source.name, "DUPLICATE", f"{source.name}: same content as {seen[content]}"))
            continue
        seen[content] = source.name
        usable.append(described)
    size = config.curation.videos_per_part
    plan = {f"clips-{start // size:06d}.parquet": usable[start : start + size] for start in range(0, len(usable), size)}
    return plan, outcomes, json.dumps(identity, sort_keys=True)


def run_subjects(
    config: RunConfig, step: Step, plan: dict[str, list[dict[str, Any]]], planned: Sequence[Outcome]
) -> dict[str, Any]:
    """Runs the step and returns its manifest.

    Raises:
        TooManyQuarantined: more faults than ``curation.max_quarantine_fraction`` allows. Finished parts are kept.
    """
    records = run_parts(step, plan, SubjectsActor, config, label="subjects")
    outcomes = [*planned, *(Outcome(**outcome) for record in records for outcome in record["outcomes"])]
    counts = count_outcomes(outcomes)
    num_planned = len(planned) + sum(len(videos) for videos in plan.values())
    assert counts["video"]["planned"] == num_planned, f"{num_planned} planned, {counts['video']} accounted for"
    check_quarantined(outcomes, config.curation.max_quarantine_fraction)
    return step.commit(
        {
            "parts": list(plan),
            "counts": counts,
            "clips": sum(record["clips"] for record in records),
            "subjects": sum(record["subjects"] for record in records),
            "outcomes": [dataclasses.asdict(outcome) for outcome in outcomes if outcome.reason],
            "licenses": dict(sum((Counter(record["licenses"]) for record in records), Counter())),
            "consents": dict(sum((Counter(record["consents"]) for record in records), Counter())),
        }
    )


class SubjectsActor:
    """Detector and vision encoder, loaded once; makes one part of CLIP rows at a time."""

    def __init__(self, config: RunConfig) -> None:
        import torch

        from refalign.models.dinov3 import VisionEncoder
        from refalign.models.yolo import load_detector

        torch.set_num_threads(config.cluster.threads)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.config = config
        self.encoder = VisionEncoder.from_pretrained(
            config.models.vision_encoder,
            revision=config.models.vision_encoder_revision,
            device=device,
            dtype=getattr(torch, config.models.encoder_dtype),
        )
        self._load_detector = lambda: load_detector(config.models.detector, device=device)
        self._detector: Any = None

    @property
    def detector(self) -> Any:
        """Loaded at the first video without annotation: annotated sources need none."""
        if self._detector is None:
            self._detector = self._load_detector()
        return self._detector

    def make_part(self, step: Step, name: str, work: list[dict[str, Any]]) -> dict[str, Any]:
        """Curates the videos of one part, writes their rows and returns the commit record."""
        rows: list[dict[str, Any]] = []
        outcomes: list[Outcome] = []
        for described in work:
            video_id = described.pop("video_id")
            source = SourceVideo(path=Path(described.pop("path")), **described)
            made, happened = self.curate_video(source, video_id)
            rows += made
            outcomes += happened

        def write(path: Path) -> dict[str, Any]:
            table = check_table(pa.Table.from_pylist(rows, schema=CLIP_SCHEMA), CLIP_SCHEMA, name)
            pq.write_table(table, path)
            return {
                "clips": len(rows),
                "subjects": sum(len(row["subjects"]) for row in rows),
                "outcomes": [dataclasses.asdict(outcome) for outcome in outcomes],
                "licenses": Counter(row["license"] for row in rows),
                "consents": Counter(row["consent"] for row in rows),
            }

        return step.write_part(name, write)

    def curate_video(self, source: SourceVideo, video_id: str) -> tuple[list[dict[str, Any]], list[Outcome]]:
        """CLIP rows of one video and the outcomes of the video and of its clips. A fault quarantines the whole video."""
        rows: list[dict[str, Any]] = []
        outcomes: list[Outcome] = []
        try:
            for window in self._windows(source):
                row, outcome = self._make_clip(source, video_id, window)
                rows += [row] if row else []
                outcomes.append(outcome)
            if not outcomes:
                seconds = self.config.video.num_frames / self.config.video.fps
                raise DataError("TOO_SHORT", f"{source.name}: no shot of {seconds:.2f} s")
        except DataError as error:
            return [], [Outcome("video", source.name, error.reason, str(error))]
        except RefAlignError:
            raise
        except Exception:
            return [], [Outcome("video", source.name, "CRASH", f"{source.name}: {traceback.format_exc(limit=-3)}")]
        if not rows:
            outcomes.append(Outcome("video", source.name, outcomes[0].reason, outcomes[0].message))
        else:
            outcomes.append(Outcome("video", source.name))
        return rows, outcomes

    def _windows(self, source: SourceVideo):
        if source.annotation:
            return iter_annotated_window(source.path, source.annotation, self.config)
        duration_s = probe_duration_s(source.path, self.config.curation)
        return iter_windows(source.path, self.config, duration_s=duration_s)

    def _make_clip(self, source: SourceVideo, video_id: str, window: Window) -> tuple[dict[str, Any] | None, Outcome]:
        config = self.config
        start_s = window.start_s(config.video.fps)
        clip_id = f"{video_id}-{round(start_s * 1000):08d}"
        height, width = window.frame_size_px
        region = (0, 0, width, height)
        if source.annotation:
            left, right, top, bottom = source.annotation["metadata"]["crop"]
            region = (left, top, right, bottom)
            candidates = read_candidates(window, source.annotation, config.curation)
        else:
            candidates = find_candidates(window, self.detector, config.curation)
        crop = make_center_crop(region, config.video)
        chosen = choose_subjects(candidates, crop, config.curation)
        if not chosen:
            return None, Outcome("clip", clip_id, "NO_SUBJECT", f"{source.name} at {start_s:.2f} s: no subject within the limits")
        subjects = [make_subject_row(candidate, window, crop, config) for candidate in chosen]
        for rank, (subject, embedding) in enumerate(zip(subjects, self._embed(subjects), strict=True)):
            subject.update(subject_id=f"{clip_id}-s{rank}", embedding=embedding.tolist())
        row = {
            "clip_id": clip_id,
            "video_id": video_id,
            "video_path": str(source.path),
            "source_group": source.source_group,
            "license": source.license,
            "consent": source.consent,
            "caption": source.caption_at(start_s + config.video.num_frames / config.video.fps / 2),
            "start_s": start_s,
            "fps": config.video.fps,
            "num_frames": config.video.num_frames,
            "crop_xyxy_px": list(crop),
            "subjects": subjects,
        }
        return row, Outcome("clip", clip_id)

    def _embed(self, subjects: Sequence[dict[str, Any]]) -> np.ndarray:
        side = self.config.curation.embedding_px
        squares = [letterbox(decode_image(subject["crop_png"]), side, side)[0] for subject in subjects]
        return np.asarray(self.encoder.embed(np.stack(squares)).float().cpu())
