"""The subjects step: videos in, CLIP rows out, every file accounted for."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from refalign.config import RunConfig
from refalign.curation.captions import choose_caption, load_captioner
from refalign.curation.quality import load_scorer, match_caption, measure_clip
from refalign.curation.scenes import make_scene_row
from refalign.curation.shots import Window, iter_annotated_window, iter_windows
from refalign.curation.sources import SourceVideo, identify_sources, list_sources, open_source
from refalign.curation.subjects import choose_classes, choose_subjects, find_candidates, make_subject_row, read_candidates
from refalign.errors import DataError, RefAlignError
from refalign.geometry import letterbox
from refalign.io.images import decode_image
from refalign.io.tables import CLIP_SCHEMA, check_table
from refalign.io.video import make_center_crop, probe_duration_s, resize_crop
from refalign.pipeline.outcomes import BESIDE, Outcome, belongs_to_place, check_quarantined, count_outcomes, describe_deaths
from refalign.pipeline.places import check_place, judge_fault
from refalign.pipeline.ray_data import run_parts
from refalign.pipeline.retries import stamp_faults
from refalign.pipeline.reuse import adopt_parts, digest_work, find_referred
from refalign.pipeline.steps import Journal, Step
from refalign.pipeline.tombstones import Tombstone, find_removed_times, find_tombstone

_LOOKED_AT = 100


def plan_subjects(
    config: RunConfig, where: str | Path, tombstones: Sequence[Tombstone] = ()
) -> tuple[dict[str, list[dict[str, Any]]], list[Outcome], str]:
    """Assigns every usable file that the input names to a part.

    What was taken down keeps its place in the fingerprint and in the parts, so that steps made of this input stay those that it
    leads to; the worker that comes to it leaves it out.

    Returns:
        The plan, the outcomes of files that can be judged without decoding, and a fingerprint of the input's content.

    Raises:
        ConfigError: the input is missing, empty, damaged, or of no known kind.
        BackendUnavailable: an object store does not answer, or the input went away while it was listed.
    """
    outcomes: list[Outcome] = []
    usable: list[dict[str, Any]] = []
    seen: dict[str, str] = {}
    identity = hashlib.sha256()
    lost = False
    for source, video_id in identify_sources(list_sources(config.input, where), config.curation):
        if isinstance(source, Outcome):
            lost |= belongs_to_place(source.reason) or source.reason == "UNREADABLE"
            outcomes.append(source)
            if source.reason not in BESIDE:
                identity.update(json.dumps([source.item, source.reason]).encode())
            continue
        identity.update(json.dumps([video_id, source.to_identity()], sort_keys=True).encode())
        content = f"{video_id}-{source.annotation_at['cut'] if source.annotation_at else ''}"
        if content in seen:
            outcomes.append(Outcome("video", source.name, "DUPLICATE", f"{source.name}: same content as {seen[content]}"))
            continue
        seen[content] = source.name
        usable.append({**source.to_work(), "video_id": video_id, **_describe_removal(tombstones, source, video_id)})
    if lost and usable:
        check_place(where, [work["path"] for work in usable[:_LOOKED_AT]])
    return _cut(usable, config.curation.videos_per_part), outcomes, identity.hexdigest()


def find_locations(plan: Mapping[str, list[dict[str, Any]]], key: str = "video_id") -> dict[str, str]:
    """Where each planned video lies now, by its id, or by its ``name``."""
    return {work[key]: work["path"] for part in plan.values() for work in part}


def _cut(work: list[dict[str, Any]], size: int, first: int = 0) -> dict[str, list[dict[str, Any]]]:
    parts = [work[start : start + size] for start in range(0, len(work), size)]
    return {f"clips-{number:06d}.parquet": part for number, part in enumerate(parts, first)}


def _describe_removal(tombstones: Sequence[Tombstone], source: SourceVideo, video_id: str) -> dict[str, Any]:
    if grave := find_tombstone(tombstones, video_id, source.name, source.path, source.source_group):
        return {"taken_down": grave.explain(source.name)}
    times = find_removed_times(tombstones, video_id)
    return {"removed_s": times} if times else {}


def _digest_video(work: dict[str, Any]) -> str:
    """What a part says of a video in it: its content and what is said of it; where it lies may change."""
    source, video_id, _, _ = _read_work(work)
    return digest_work(video_id, source.to_identity())


def _read_work(work: dict[str, Any]) -> tuple[SourceVideo, str, list[list[float]], str]:
    """The video, its id, the times in it that were taken down, and why all of it was; the latter two may be empty."""
    described = dict(work)
    removed_s, taken_down = described.pop("removed_s", []), described.pop("taken_down", "")
    video_id = described.pop("video_id")
    return SourceVideo(**described), video_id, removed_s, taken_down


def _leave_adopted(
    step: Step, plan: dict[str, list[dict[str, Any]]], size: int
) -> tuple[dict[str, list[dict[str, Any]]], set[str]]:
    """The plan with parts of earlier versions in place of what they hold, and the folders of these."""
    works = {_digest_video(work): work for part in plan.values() for work in part}
    adopted = adopt_parts(step, works)
    if not adopted:
        return plan, set()
    for digest in (digest for part in adopted.values() for digest in part):
        del works[digest]
    return {name: [] for name in adopted} | _cut(list(works.values()), size, len(adopted)), find_referred(step)


def run_subjects(
    config: RunConfig, step: Step, plan: dict[str, list[dict[str, Any]]], planned: Sequence[Outcome]
) -> dict[str, Any]:
    """Runs the step and returns its manifest.

    Raises:
        TooManyQuarantined: more faults than ``curation.max_quarantine_fraction`` allows. Finished parts are kept.
    """
    num_planned = len(planned) + sum(map(len, plan.values()))
    plan, versions = _leave_adopted(step, plan, config.curation.videos_per_part)
    works = {name: [_digest_video(work) for work in part] for name, part in plan.items() if part}
    records = run_parts(step, plan, SubjectsActor, config, label="subjects", works=works)
    described = describe_subjects(records, planned)
    counts = described["counts"]["video"]
    assert counts["planned"] == num_planned, f"{num_planned} planned, {counts} accounted for"
    check_quarantined(described, config.curation.max_quarantine_fraction)
    return step.commit({"parts": list(plan), "versions": sorted(versions), **described})


def describe_subjects(records: Sequence[dict[str, Any]], planned: Sequence[Outcome]) -> dict[str, Any]:
    """What the manifest says of the parts with these commit records, and of the outcomes known before any part."""
    outcomes = [*planned, *(Outcome(**outcome) for record in records for outcome in record["outcomes"])]
    return {
        "counts": count_outcomes(outcomes),
        **{name: sum(record[name] for record in records) for name in ("clips", "subjects", "crops", "embeddings")},
        "outcomes": [dataclasses.asdict(outcome) for outcome in outcomes if outcome.reason],
        "unusual": dict(sorted(sum((Counter(record["unusual"]) for record in records), Counter()).items())),
        "licenses": dict(sum((Counter(record["licenses"]) for record in records), Counter())),
        "consents": dict(sum((Counter(record["consents"]) for record in records), Counter())),
        "captions": dict(sum((Counter(record.get("captions", {})) for record in records), Counter())),  # not in older commits
    }


def describe_rows(rows: pa.Table) -> dict[str, Any]:
    """What a commit says of the rows of its part."""
    return {
        "clips": len(rows),
        "subjects": sum(rows["subjects"].combine_chunks().value_lengths().to_pylist()),
        "licenses": Counter(rows["license"].to_pylist()),
        "consents": Counter(rows["consent"].to_pylist()),
        "captions": Counter(rows["caption_source"].to_pylist()),
    }


def _say(unusual: Counter[str]) -> str:
    return f" (frames: {', '.join(f'{count} {name}' for name, count in sorted(unusual.items()))})" if unusual else ""


class SubjectsActor:
    """Detector and vision encoder, loaded once; makes one part of CLIP rows at a time."""

    def __init__(self, config: RunConfig) -> None:
        import torch

        from refalign.models.dinov3 import VisionEncoder

        torch.set_num_threads(config.cluster.threads)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.config = config
        self.encoder = VisionEncoder.from_pretrained(
            config.models.vision_encoder,
            revision=config.models.vision_encoder_revision,
            device=device,
            dtype=getattr(torch, config.models.encoder_dtype),
        )
        self._device = device
        self._crops, self._embeddings = 0, 0
        self._unusual: Counter[str] = Counter()

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

    def make_part(self, step: Step, name: str, work: list[dict[str, Any]]) -> dict[str, Any]:
        """Curates the videos of one part, writes their rows and returns the commit record.

        Raises:
            BackendUnavailable: the input is gone as a whole; nothing is stored.
        """
        with step.open_journal(name) as journal:
            return self._make_part(step, name, work, journal)

    def _make_part(self, step: Step, name: str, work: list[dict[str, Any]], journal: Journal) -> dict[str, Any]:
        rows: list[dict[str, Any]] = []
        outcomes: list[Outcome] = []
        self._crops, self._embeddings, self._unusual = 0, 0, Counter()
        names: dict[str, str] = {}
        paths = {described["name"]: described["path"] for described in work}
        for described in work:
            source, video_id, removed_s, taken_down = _read_work(described)
            names[source.name] = video_id
            if taken_down:
                outcomes.append(Outcome("video", source.name, "TAKEN_DOWN", taken_down))
                continue
            if (deaths := journal.begin(source.name)) >= self.config.curation.max_worker_deaths:
                outcomes.append(Outcome("video", source.name, "KILLS_WORKERS", describe_deaths(source.name, deaths)))
                continue
            made, happened = self.curate_video(source, video_id, removed_s)
            rows += made
            outcomes += happened
        if any(belongs_to_place(outcome.reason) for outcome in outcomes):
            check_place(self.config.input.path, list(paths.values()))

        def write(path: Path) -> dict[str, Any]:
            table = check_table(pa.Table.from_pylist(rows, schema=CLIP_SCHEMA), CLIP_SCHEMA, name)
            pq.write_table(table, path)
            return {
                **describe_rows(table),
                "videos": names,
                "work": [_digest_video(described) for described in work],
                "crops": self._crops,  # those of videos that turned out faulty among them
                "embeddings": self._embeddings,
                "unusual": self._unusual,
                "outcomes": [dataclasses.asdict(outcome) for outcome in outcomes],
                **stamp_faults(outcomes, paths),
            }

        return step.write_part(name, write)

    def curate_video(
        self, source: SourceVideo, video_id: str, removed_s: Sequence[Sequence[float]] = ()
    ) -> tuple[list[dict[str, Any]], list[Outcome]]:
        """CLIP rows of one video and the outcomes of the video and of its clips. A fault quarantines the whole video.

        Broken frames, gaps, steps back and other sizes are no faults: no clip holds them, and ``unusual`` in the commit counts
        the videos in which there were any.

        Args:
            removed_s: times that were taken down; clips that touch them are left out.
        """
        rows: list[dict[str, Any]] = []
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
            self._unusual.update(unusual.keys())
        if not rows:
            outcomes.append(Outcome("video", source.name, outcomes[0].reason, outcomes[0].message))
        else:
            outcomes.append(Outcome("video", source.name))
        return rows, outcomes

    def _windows(self, source: SourceVideo, path: Path, unusual: Counter[str]):
        if source.annotation:
            return iter_annotated_window(path, source.annotation, self.config, unusual=unusual)
        duration_s = probe_duration_s(path, self.config.curation)
        return iter_windows(path, self.config, duration_s=duration_s, unusual=unusual)

    def _make_clip(
        self, source: SourceVideo, video_id: str, window: Window, removed_s: Sequence[Sequence[float]]
    ) -> tuple[dict[str, Any] | None, Outcome]:
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

    def _embed(self, subjects: Sequence[dict[str, Any]]) -> np.ndarray:
        side = self.config.curation.embedding_px
        self._crops += len(subjects)
        squares = [letterbox(decode_image(subject["crop_png"]), side, side)[0] for subject in subjects]
        embeddings = np.asarray(self.encoder.embed(np.stack(squares)).float().cpu())
        self._embeddings += len(embeddings)
        return embeddings
