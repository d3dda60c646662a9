"""Subjects: videos in, CLIP rows out, every file accounted for."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel

from refalign.config import RunConfig
from refalign.config.presets import EMBEDDED_DETECTOR
from refalign.curation.curator import ClipRow, Curator, Tally
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
from refalign.pipeline.steps import Step
from refalign.pipeline.tombstones import Tombstone, find_removed_times, find_tombstone, load_tombstones
from refalign.stages.world import World

_LOOKED_AT = 100


class Totals(BaseModel):
    """What the videos of a part, or of all parts, gave.

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


class SubjectsManifest(PartsManifest, Totals):
    """What all videos gave."""


class SubjectsCommit(Totals):
    """What a part records.

    Attributes:
        videos: ids of its videos, by name.
        work: their `VideoWork.digest`.
        stamps: when the files of faulty videos were changed, by name.
    """

    videos: dict[str, str] = {}
    work: tuple[str, ...] = ()
    outcomes: tuple[Outcome, ...] = ()
    stamps: dict[str, int | None] = {}


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

    @property
    def works(self) -> list[VideoWork]:
        """Of all parts."""
        return [work for part in self.plan.values() for work in part]


def list_input(config: RunConfig, where: str | Path, tombstones: Sequence[Tombstone] = ()) -> Listing:
    """Assigns every usable file that the input names to a part.

    What was taken down stays in the fingerprint and in the parts, so that the stages of this input keep their folders; the worker
    leaves it out.

    Raises:
        ConfigError: the input is missing, empty, damaged, or of no known kind.
        BackendUnavailable: an object store does not answer, or the input went away while it was listed.
    """
    outcomes: list[Outcome] = []
    usable: dict[str, VideoWork] = {}
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
        content = f"{video_id}-{source.entry.cut if source.entry else ''}"
        if content in usable:
            message = f"{source.name}: same content as {usable[content].source.name}"
            outcomes.append(Outcome("video", source.name, "DUPLICATE", message))
        else:
            usable[content] = _make_work(source, video_id, tombstones)
    works, size = list(usable.values()), config.curation.videos_per_part
    if lost and works:
        check_place(where, [work.source.path for work in works[:_LOOKED_AT]])
    starts = range(0, len(works), size)
    plan = {f"clips-{number:06d}.parquet": works[start : start + size] for number, start in enumerate(starts)}
    return Listing(plan, outcomes, identity.hexdigest())


def _make_work(source: SourceVideo, video_id: str, tombstones: Sequence[Tombstone]) -> VideoWork:
    if grave := find_tombstone(tombstones, video_id, source.name, source.path, source.source_group):
        return VideoWork(source, video_id, taken_down=grave.explain(source.name))
    return VideoWork(source, video_id, [(start, end) for start, end in find_removed_times(tombstones, video_id)])


def describe_subjects(
    parts: Sequence[str], commits: Sequence[Mapping[str, object]], planned: Sequence[Outcome], versions: set[str]
) -> SubjectsManifest:
    """The manifest of parts with these commits, and of the outcomes known before any part."""
    made = [SubjectsCommit.model_validate(commit) for commit in commits]

    def add_up(name: str) -> dict[str, int]:
        return dict(sorted(sum((Counter(getattr(commit, name)) for commit in made), Counter()).items()))

    return SubjectsManifest(
        parts=tuple(parts),
        versions=tuple(sorted(versions)),
        **count_all([*planned, *(outcome for commit in made for outcome in commit.outcomes)]),
        clips=sum(commit.clips for commit in made),
        subjects=sum(commit.subjects for commit in made),
        crops=sum(commit.crops for commit in made),
        embeddings=sum(commit.embeddings for commit in made),
        **{name: add_up(name) for name in ("unusual", "licenses", "consents", "captions")},
    )


class SubjectsWorker(Curator):
    """A curator that makes one part of CLIP rows at a time."""

    def make_part(self, step: Step, name: str, work: list[VideoWork]) -> dict[str, object]:
        """Curates the videos of one part, writes their rows and returns the commit.

        Raises:
            BackendUnavailable: the input is gone as a whole; nothing is stored.
        """
        rows: list[ClipRow] = []
        outcomes: list[Outcome] = []
        self.tally = Tally()
        paths = {video.source.name: video.source.path for video in work}
        with step.open_journal(name) as journal:
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
            table = pa.Table.from_pylist([asdict(row) for row in rows], schema=CLIP_SCHEMA)
            commit = SubjectsCommit(
                clips=len(rows),
                subjects=sum(len(row.subjects) for row in rows),
                licenses=Counter(row.license for row in rows),
                consents=Counter(row.consent for row in rows),
                captions=Counter(row.caption_source for row in rows),
                videos={video.source.name: video.video_id for video in work},
                work=tuple(video.digest for video in work),
                crops=self.tally.crops,
                embeddings=self.tally.embeddings,
                unusual=self.tally.unusual,
                outcomes=tuple(outcomes),
                **stamp_faults(outcomes, paths),
            ).model_dump(mode="json", exclude_unset=True)
            return step.write_part(name, lambda path: pq.write_table(check_table(table, CLIP_SCHEMA, name), path) or commit)


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
        run.locations = {work.video_id: work.source.path for work in self.listing.works}
        self.needs_detector = any(not work.source.entry for work in self.listing.works)
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
        return {work.source.name: work.source.path for work in self.listing.works}

    def plan(self, run: Run, step: Step) -> Plan:
        """The parts of earlier versions that are adopted, without work, and what these do not hold in new parts."""
        works = {work.digest: work for work in self.listing.works}
        adopted = adopt_parts(step, works)
        done = {digest for part in adopted.values() for digest in part}
        left = [digest for digest in works if digest not in done]
        parts = cut_parts(step, left, run.config.curation.videos_per_part, "clips", ".parquet", adopted)
        plan = dict.fromkeys(adopted, ()) | parts
        return {name: [works[digest] for digest in plan[name]] for name in sorted(plan)}

    def digest(self, work: list[VideoWork]) -> list[str] | None:
        return [video.digest for video in work] or None  # an adopted part has no work to compare

    def finish(
        self, run: Run, step: Step, plan: Mapping[str, list[VideoWork]], commits: Sequence[Mapping[str, object]]
    ) -> SubjectsManifest:
        versions = set() if all(plan.values()) else find_referred(step)
        manifest = describe_subjects(list(plan), commits, self.listing.outcomes, versions)
        planned = len(self.listing.outcomes) + len(self.listing.works)
        assert manifest.counts["video"].planned == planned, f"{planned} planned, {manifest.counts} accounted for"
        check_quarantined(manifest.counts, manifest.outcomes, run.config.curation.max_quarantine_fraction)
        return manifest

    def accept(self, run: Run, manifest: SubjectsManifest) -> None:
        if not manifest.clips:
            raise DataError("NO_SUBJECT", explain_no_clip(manifest, run.config, needs_detector=self.needs_detector))

    def describe(self, manifest: SubjectsManifest) -> str:
        videos, missing = manifest.counts["video"], manifest.captions.get("none", 0)
        lost = ", ".join(f"{count} {reason}" for reason, count in videos.lost.items())
        unusual = ", ".join(f"{count} {kind}" for kind, count in manifest.unusual.items())
        made = f"{videos.planned} videos -> {manifest.clips} clips, {manifest.subjects} subjects"
        made += (f" ({lost})" if lost else "") + (f"; unusual videos: {unusual}" if unusual else "")
        if 2 * missing > manifest.clips:
            made += (
                f"; {missing} of {manifest.clips} clips have no caption and would be trained on an empty prompt: give sidecars "
                "(.txt, .json), a table with a column caption, text or prompt, or curation.caption=missing with models.captioner"
            )
        return made

    def summarise(self, manifest: SubjectsManifest) -> dict[str, object]:
        said = manifest.model_dump(include={"clips", "subjects", "captions", "unusual"})
        return {"videos": manifest.counts["video"].planned, **said}


def explain_no_clip(manifest: SubjectsManifest, config: RunConfig, *, needs_detector: bool) -> str:
    """Why there is no clip, and what may help: advice on the detector only where it has looked at a clip."""
    videos, settings = manifest.counts["video"], config.curation
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
            f"{config.models.detector} found none above curation.min_confidence={settings.min_confidence:g}, between "
            f"curation.min_area_fraction={settings.min_area_fraction:g} and max_area_fraction={settings.max_area_fraction:g} "
            "of the frame; change these, curation.classes or the detector"
        )
    return f"no subject in {looked_at} clips of {videos.planned} files: {advice}. {came_of_them}"
