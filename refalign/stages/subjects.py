"""Subjects: videos in, CLIP rows out, every file accounted for."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from refalign.config import RunConfig
from refalign.config.presets import EMBEDDED_DETECTOR
from refalign.curation.curator import Curator, Row, Tally
from refalign.curation.sources import SourceVideo, identify_sources, list_sources
from refalign.errors import DataError
from refalign.io.tables import CLIP_SCHEMA, check_table
from refalign.models.detector_files import check_detector
from refalign.models.loading import identify_model
from refalign.pipeline.outcomes import BESIDE, Outcome, belongs_to_place, check_quarantined, describe_deaths
from refalign.pipeline.places import check_place
from refalign.pipeline.retries import stamp_faults
from refalign.pipeline.reuse import adopt_parts, cut_parts, digest_work, find_referred
from refalign.pipeline.stage import Inputs, PartsManifest, PartStage, Run, count_all
from refalign.pipeline.steps import Journal, Step
from refalign.pipeline.tombstones import Tombstone, find_removed_times, find_tombstone, load_tombstones
from refalign.stages.world import World

_LOOKED_AT = 100


class SubjectsManifest(PartsManifest):
    """What the videos gave.

    Attributes:
        crops: made, those of videos that turned out faulty among them.
        unusual: videos with unusual frames, by what it is.
        licenses, consents, captions: clips by licence, by consent, and by where the caption is from.
    """

    clips: int
    subjects: int
    crops: int
    embeddings: int
    unusual: dict[str, int] = {}
    licenses: dict[str, int] = {}
    consents: dict[str, int] = {}
    captions: dict[str, int] = {}


@dataclass(frozen=True)
class VideoWork:
    """One video of a part.

    Attributes:
        removed_s: times in it that were taken down.
        taken_down: why all of it was; empty where it was not.
    """

    source: SourceVideo
    video_id: str
    removed_s: list[tuple[float, float]] = field(default_factory=list)
    taken_down: str = ""

    @property
    def digest(self) -> str:
        """Of what a part says of the video: its content and what is said of it; where it lies may change."""
        return digest_work(self.video_id, self.source.to_identity())


Plan = dict[str, list[VideoWork]]


class Listing(NamedTuple):
    """What the input holds.

    Attributes:
        outcomes: of files that can be judged without decoding.
        identity: a fingerprint of the input's content.
    """

    plan: Plan
    outcomes: list[Outcome]
    identity: str

    def locate(self) -> dict[str, str]:
        """Where each video lies now, by its id."""
        return {work.video_id: work.source.path for part in self.plan.values() for work in part}


def list_input(config: RunConfig, where: str | Path, tombstones: Sequence[Tombstone] = ()) -> Listing:
    """Assigns every usable file that the input names to a part.

    What was taken down keeps its place in the fingerprint and in the parts, so that stages made of this input stay those that it
    leads to; the worker that comes to it leaves it out.

    Raises:
        ConfigError: the input is missing, empty, damaged, or of no known kind.
        BackendUnavailable: an object store does not answer, or the input went away while it was listed.
    """
    outcomes: list[Outcome] = []
    usable: list[VideoWork] = []
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
        usable.append(_make_work(source, video_id, tombstones))
    if lost and usable:
        check_place(where, [work.source.path for work in usable[:_LOOKED_AT]])
    return Listing(_cut(usable, config.curation.videos_per_part), outcomes, identity.hexdigest())


def _make_work(source: SourceVideo, video_id: str, tombstones: Sequence[Tombstone]) -> VideoWork:
    if grave := find_tombstone(tombstones, video_id, source.name, source.path, source.source_group):
        return VideoWork(source, video_id, taken_down=grave.explain(source.name))
    return VideoWork(source, video_id, [(start, end) for start, end in find_removed_times(tombstones, video_id)])


def _cut(work: list[VideoWork], size: int) -> Plan:
    starts = range(0, len(work), size)
    return {f"clips-{number:06d}.parquet": work[start : start + size] for number, start in enumerate(starts)}


def _leave_adopted(step: Step, plan: Plan, size: int) -> Plan:
    """The plan with parts of earlier versions, which have no work left, in place of what they hold."""
    works = {work.digest: work for part in plan.values() for work in part}
    adopted = adopt_parts(step, works)
    done = {digest for part in adopted.values() for digest in part}
    parts = cut_parts(step, [digest for digest in works if digest not in done], size, "clips", ".parquet", adopted)
    planned: Plan = {name: [] for name in adopted} | {name: [works[digest] for digest in part] for name, part in parts.items()}
    return dict(sorted(planned.items()))


def describe_subjects(
    parts: Sequence[str], commits: Sequence[Mapping[str, Any]], planned: Sequence[Outcome], versions: set[str]
) -> SubjectsManifest:
    """The manifest of parts with these commits, and of the outcomes known before any part."""

    def add_up(name: str) -> dict[str, int]:
        return dict(sorted(sum((Counter(commit.get(name, {})) for commit in commits), Counter()).items()))

    outcomes = [*planned, *(Outcome(**outcome) for commit in commits for outcome in commit["outcomes"])]
    return SubjectsManifest(
        parts=tuple(parts),
        versions=tuple(sorted(versions)),
        **count_all(outcomes),
        **{name: sum(commit[name] for commit in commits) for name in ("clips", "subjects", "crops", "embeddings")},
        **{name: add_up(name) for name in ("unusual", "licenses", "consents", "captions")},
    )


class SubjectsWorker(Curator):
    """A curator that makes one part of CLIP rows at a time."""

    def make_part(self, step: Step, name: str, work: list[VideoWork]) -> dict[str, Any]:
        """Curates the videos of one part, writes their rows and returns the commit.

        Raises:
            BackendUnavailable: the input is gone as a whole; nothing is stored.
        """
        with step.open_journal(name) as journal:
            return self._make_part(step, name, work, journal)

    def _make_part(self, step: Step, name: str, work: list[VideoWork], journal: Journal) -> dict[str, Any]:
        rows: list[Row] = []
        outcomes: list[Outcome] = []
        self.tally = Tally()
        paths = {video.source.name: video.source.path for video in work}
        for video in work:
            item = video.source.name
            if video.taken_down:
                outcomes.append(Outcome("video", item, "TAKEN_DOWN", video.taken_down))
            elif (deaths := journal.begin(item)) >= self.config.curation.max_worker_deaths:
                outcomes.append(Outcome("video", item, "KILLS_WORKERS", describe_deaths(item, deaths)))
            else:
                made, happened = self.curate_video(video.source, video.video_id, video.removed_s)
                rows += made
                outcomes += happened
        if any(belongs_to_place(outcome.reason) for outcome in outcomes):
            check_place(self.config.input.path, list(paths.values()))

        def write(path: Path) -> dict[str, Any]:
            table = check_table(pa.Table.from_pylist(rows, schema=CLIP_SCHEMA), CLIP_SCHEMA, name)
            pq.write_table(table, path)
            return {
                "clips": len(table),
                "subjects": sum(table["subjects"].combine_chunks().value_lengths().to_pylist()),
                "licenses": Counter(table["license"].to_pylist()),
                "consents": Counter(table["consent"].to_pylist()),
                "captions": Counter(table["caption_source"].to_pylist()),
                "videos": {video.source.name: video.video_id for video in work},
                "work": [video.digest for video in work],
                "crops": self.tally.crops,
                "embeddings": self.tally.embeddings,
                "unusual": self.tally.unusual,
                "outcomes": [asdict(outcome) for outcome in outcomes],
                **stamp_faults(outcomes, paths),
            }

        return step.write_part(name, write)


class Subjects(PartStage[SubjectsManifest, list[VideoWork]]):
    """Who is in a clip: detect, track, choose, crop, embed."""

    name = "subjects"
    manifest = SubjectsManifest
    sections = ("input", "video", "curation")
    worker = SubjectsWorker
    parts_in_store = True

    def find_inputs(self, run: Run) -> Inputs:
        config, models = run.config, run.config.models
        where = config.input.path or run.step_of(World).folder / "videos"
        self.listing = list_input(config, where, load_tombstones(run.output))
        run.locations = self.listing.locate()
        self.needs_detector = any(not work.source.annotation_at for part in self.listing.plan.values() for work in part)
        if self.needs_detector:
            check_detector(models.detector, needs_masks=config.curation.crop == "mask")
        used = [identify_model(models.vision_encoder, models.vision_encoder_revision), identify_model(models.detector)]
        optional = ((models.text_image, models.text_image_revision), (models.aesthetic, None))
        optional += ((models.captioner, models.captioner_revision),) if config.curation.caption != "source" else ()
        used += [identify_model(source, revision) if source else "" for source, revision in optional]
        settings = config.curation.model_dump(exclude={"max_quarantine_fraction", "max_worker_deaths"})
        recipe = (settings, config.video, models.encoder_dtype, *used)
        return Inputs((self.listing.identity, *recipe), recipe)

    def list_files(self) -> Mapping[str, str]:
        return {work.source.name: work.source.path for part in self.listing.plan.values() for work in part}

    def plan(self, run: Run, step: Step) -> Plan:
        return _leave_adopted(step, self.listing.plan, run.config.curation.videos_per_part)

    def digest(self, work: list[VideoWork]) -> list[str] | None:
        return [video.digest for video in work] or None  # adopted parts hold what they hold

    def finish(
        self, run: Run, step: Step, plan: Mapping[str, list[VideoWork]], commits: Sequence[dict[str, Any]]
    ) -> SubjectsManifest:
        versions = set() if all(plan.values()) else find_referred(step)
        manifest = describe_subjects(list(plan), commits, self.listing.outcomes, versions)
        planned = len(self.listing.outcomes) + sum(map(len, self.listing.plan.values()))
        assert manifest.counts["video"].planned == planned, f"{planned} planned, {manifest.counts} accounted for"
        check_quarantined(manifest.counts, manifest.outcomes, run.config.curation.max_quarantine_fraction)
        return manifest

    def accept(self, run: Run, manifest: SubjectsManifest) -> None:
        if not manifest.clips:
            raise DataError("NO_SUBJECT", explain_no_clip(manifest, run.config, needs_detector=self.needs_detector))

    def describe(self, manifest: SubjectsManifest) -> str:
        lost = ", ".join(f"{count} {reason}" for reason, count in manifest.counts["video"].lost.items())
        made = f"{manifest.counts['video'].planned} videos -> {manifest.clips} clips, {manifest.subjects} subjects"
        unusual = ", ".join(f"{count} {kind}" for kind, count in manifest.unusual.items())
        made += (f" ({lost})" if lost else "") + (f"; unusual videos: {unusual}" if unusual else "")
        missing = manifest.captions.get("none", 0)
        return f"{made}; {_explain_captions(missing, manifest.clips)}" if 2 * missing > manifest.clips else made

    def summarise(self, manifest: SubjectsManifest) -> dict[str, Any]:
        said = manifest.model_dump(include={"clips", "subjects", "captions", "unusual"})
        return {"videos": manifest.counts["video"].planned, **said}


def _explain_captions(missing: int, clips: int) -> str:
    return (
        f"{missing} of {clips} clips have no caption and would be trained on an empty prompt: give sidecars (.txt, .json), a "
        "table with a column caption, text or prompt, or curation.caption=missing with models.captioner"
    )


def explain_no_clip(manifest: SubjectsManifest, config: RunConfig, *, needs_detector: bool) -> str:
    """Why there is none, by what has happened: advice on a detector helps only where it has looked at something."""
    videos = manifest.counts["video"]
    came_of_them = "The summary and the report of this run say what came of each file."
    looked_at = manifest.counts["clip"].filtered.get("NO_SUBJECT", 0) if "clip" in manifest.counts else 0
    if not looked_at:
        reasons = ", ".join(f"{reason} {count}" for reason, count in {**videos.quarantined, **videos.filtered}.items())
        return f"no clip in {videos.planned} files ({reasons}), so no subject was looked for. {came_of_them}"
    if not needs_detector:
        advice = "curation.min_aesthetic, min_text_image, min_area_fraction and max_area_fraction leave none that is annotated"
    elif Path(config.models.detector).expanduser().resolve() == EMBEDDED_DETECTOR.resolve():
        advice = (
            "the embedded detector knows only the creatures of the drawn world; --set models.detector=yolo11n-seg.pt takes a "
            "real one (or a folder or .pt file of your own)"
        )
    else:
        advice = (
            f"{config.models.detector} found none above curation.min_confidence={config.curation.min_confidence:g}, between "
            f"curation.min_area_fraction={config.curation.min_area_fraction:g} and max_area_fraction="
            f"{config.curation.max_area_fraction:g} of the frame; change these, curation.classes or the detector"
        )
    return f"no subject in {looked_at} clips of {videos.planned} files: {advice}. {came_of_them}"
