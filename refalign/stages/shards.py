"""Shards: CLIP and PAIR rows in, committed WebDataset shards out."""

from __future__ import annotations

import hashlib
import json
import traceback
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import TypeAdapter

from refalign.config import ModelsConfig, RunConfig, VideoConfig
from refalign.errors import ArtifactError, DataError
from refalign.estimates.storage import announce_size
from refalign.io.images import decode_image, encode_jpeg, make_contact_sheet
from refalign.io.storage import find_size, join, read_bytes, read_table
from refalign.io.tables import CLIP_SCHEMA, check_table
from refalign.io.video import ClipSpec, read_clips
from refalign.io.writing import write_bytes
from refalign.models.loading import ENCODERS, identify_model
from refalign.pipeline.outcomes import Outcome, belongs_to_place, check_quarantined, describe_deaths
from refalign.pipeline.places import changed_at, check_place, judge_fault
from refalign.pipeline.reuse import find_referred
from refalign.pipeline.stage import Inputs, PartsManifest, PartStage, Run, count_all
from refalign.pipeline.steps import Journal, Step
from refalign.shards.plan import SPLITS, Pair, ShardWork, count_views, plan_shards
from refalign.shards.writer import (
    NULL_PROMPT_NAME,
    SHEET_FRAMES,
    SHEET_PX,
    IndexedSample,
    ShardCommit,
    ShardRecord,
    add_sample,
    add_up,
    iter_contact_sheets,
    open_tar,
)
from refalign.stages.pairs import Pairs
from refalign.stages.subjects import Subjects

if TYPE_CHECKING:  # both import torch
    from refalign.shards.encode import ReferencePicture
    from refalign.shards.sample import ReferenceInfo

ClipRow = dict[str, Any]
"""A row of `CLIP_SCHEMA`."""
_COMMITS = TypeAdapter(list[ShardCommit])
_COPIED = ("clip_id", "video_id", "caption", "license", "consent", "source_group", "start_s", "fps")
"""Columns that a sample's JSON copies (`refalign.shards.sample.SampleInfo`)."""
_MAX_SHEETS = 3


class ShardsManifest(PartsManifest):
    """What was encoded; totals as of `refalign.shards.writer.Totals`."""

    digest: str  # names the data set by content
    samples: dict[str, int]  # by split
    references: int
    cross_references: int
    cut_prompts: int = 0
    prompts_with_unknown_words: int = 0
    size_bytes: int
    null_prompt_crc32: int | None = None
    video: VideoConfig
    models: ModelsConfig


class ShardsWorker:
    """The frozen encoders, loaded once; makes one shard at a time."""

    def __init__(self, config: RunConfig) -> None:
        import torch

        from refalign.shards.encode import FrozenEncoders

        torch.set_num_threads(config.cluster.threads)
        self.config = config
        self.encoders = FrozenEncoders(config)

    def make_part(self, step: Step, name: str, work: ShardWork) -> dict[str, Any]:
        """Encodes the clips of one shard, writes the tar and returns the commit with the byte index.

        Nothing is stored if the input is gone as a whole (`BackendUnavailable`).
        """
        from safetensors.torch import save

        null_prompt = join(step.location, NULL_PROMPT_NAME)
        if find_size(null_prompt) is None:  # it stands in where training drops the text; every worker writes the same bytes
            write_bytes(null_prompt, save({"prompt_embeds": self.encoders.encode_text("")}))
        with step.open_journal(name) as journal:
            return step.write_part(name, lambda path: asdict(self._write_shard(path, work, journal)))

    def _write_shard(self, path: Path, work: ShardWork, journal: Journal) -> ShardRecord:
        rows = {row["clip_id"]: row for file in work.files for row in _load_rows(file, changed_at(file))}
        samples: list[IndexedSample] = []
        outcomes: list[Outcome] = []
        with open_tar(path) as tar:
            for clip_id, frames in self._iter_frames([rows[clip_id] for clip_id in work.clips], work.videos, journal):
                try:
                    if isinstance(frames, DataError):
                        raise frames
                    pairs = [pair for pair in work.pairs if pair.clip_id == clip_id]
                    sample, members = self._make_sample(
                        rows[clip_id], frames, work.split, self._list_references(clip_id, rows, pairs)
                    )
                except DataError as error:
                    outcomes.append(Outcome("clip", clip_id, error.reason, str(error)))
                except Exception:
                    outcomes.append(Outcome("clip", clip_id, "CRASH", traceback.format_exc(limit=-3)))
                else:
                    outcomes.append(Outcome("clip", clip_id))
                    samples.append(replace(sample, members=add_sample(tar, clip_id, members)))
        return ShardRecord(split=work.split, work=work.digests, samples=samples, outcomes=outcomes, **asdict(add_up(samples)))

    def _iter_frames(
        self, rows: Sequence[ClipRow], locations: Mapping[str, str], journal: Journal
    ) -> Iterator[tuple[str, np.ndarray | DataError]]:
        """Frames of each clip, one decode pass per video, or why there are none."""
        by_video: dict[str, list[ClipRow]] = defaultdict(list)
        for row in rows:
            by_video[row["video_id"]].append(row)
        paths = {video_id: locations.get(video_id, clips[0]["video_path"]) for video_id, clips in by_video.items()}
        for video_id, clips in by_video.items():
            path = paths[video_id]
            specs = [ClipSpec(row["start_s"], tuple(round(value) for value in row["crop_xyxy_px"])) for row in clips]
            videos: Sequence[np.ndarray | DataError]
            try:
                if (deaths := journal.begin(video_id)) >= self.config.curation.max_worker_deaths:
                    raise DataError("KILLS_WORKERS", describe_deaths(path, deaths))
                videos = read_clips(path, specs, self.config.video, self.config.curation)
            except DataError as error:
                fault = judge_fault(error, path, video_id)
                if belongs_to_place(fault.reason):
                    check_place(self.config.input.path, list(paths.values()))
                videos = [fault] * len(clips)
            yield from ((row["clip_id"], frames) for row, frames in zip(clips, videos, strict=True))

    def _list_references(
        self, clip_id: str, rows: Mapping[str, ClipRow], pairs: Sequence[Pair]
    ) -> list[tuple[ReferenceInfo, ReferencePicture]]:
        """Each subject's picture in its own clip, then its pictures in other clips."""
        from refalign.shards.encode import make_reference

        sizes_px = (self.config.video.height_px, self.config.video.width_px, self.encoders.grid.token_px)
        references: list[tuple[ReferenceInfo, ReferencePicture]] = []
        for position, subject in enumerate(rows[clip_id]["subjects"]):
            views = [("in_pair", clip_id, subject, 1.0)]
            for pair in pairs:
                if pair.subject_id == subject["subject_id"]:
                    there = rows[pair.reference_clip_id]["subjects"]
                    found = next(other for other in there if other["subject_id"] == pair.reference_subject_id)
                    views.append(("cross_pair", pair.reference_clip_id, found, pair.similarity))
            for kind, shown_in, view, similarity in views:
                info: ReferenceInfo = {
                    "subject_index": position,
                    "subject_id": view["subject_id"],
                    "clip_id": shown_in,
                    "kind": kind,
                    "similarity": round(similarity, 6),
                    "class_name": view["class_name"],
                    "box_xyxy_px": [round(value, 2) for value in view["box_xyxy_px"]],
                    "score": round(view["score"], 6),
                }
                count = count_views(view["subject_id"], self.config.shards)
                if not count:
                    references.append((info, make_reference(view["crop_png"], *sizes_px)))
                for variant in range(count):
                    seed = hashlib.sha256(f"{clip_id}/{view['subject_id']}/{variant}".encode()).digest()[:8]
                    rng = np.random.default_rng(int.from_bytes(seed))
                    references.append(({**info, "variant": variant}, make_reference(view["crop_png"], *sizes_px, rng)))
        return references

    def _make_sample(
        self, row: ClipRow, frames: np.ndarray, split: str, references: Sequence[tuple[ReferenceInfo, ReferencePicture]]
    ) -> tuple[IndexedSample, dict[str, bytes]]:
        """What the index says of a sample, and its members by extension."""
        from safetensors.torch import save

        infos, pictures = [info for info, _ in references], [picture for _, picture in references]
        tensors = self.encoders.encode(frames, row["caption"], pictures)
        info = {name: row[name] for name in _COPIED} | {"split": split, "references": infos}
        shown = np.linspace(0, len(frames) - 1, SHEET_FRAMES).round().astype(int)
        sheet = make_contact_sheet([frames[shown], [picture.pixels for picture in pictures]], SHEET_PX)
        members = {
            "safetensors": save(tensors),
            "json": json.dumps(info, sort_keys=True, ensure_ascii=False).encode(),
            "jpg": encode_jpeg(sheet),
        }
        losses = self.encoders.text.find_losses(row["caption"], self.encoders.max_text_tokens)
        other_clips = [info["clip_id"] for info in infos if info["kind"] == "cross_pair"]
        sample = IndexedSample(
            key=row["clip_id"],
            clip_id=row["clip_id"],
            source_group=row["source_group"],
            shape=list(tensors["latents"].shape),
            subjects=len(row["subjects"]),
            references=len(infos),
            cross_references=len(other_clips),
            reference_clips=sorted(set(other_clips)),
            cut_prompts=int(losses.cut_tokens > 0),
            prompts_with_unknown_words=int(bool(losses.unknown)),
        )
        return sample, members


class Shards(PartStage[ShardsManifest, ShardWork]):
    """Frames, prompts and references become latents, embeddings and target tokens."""

    name = "shards"
    manifest = ShardsManifest
    sections = ("models", "shards")
    worker = ShardsWorker
    parts_in_store = True

    def find_inputs(self, run: Run) -> Inputs:
        models = run.config.models
        frozen = identify_model(models.base, models.base_revision, parts=ENCODERS)
        encoders = (run.config.shards, models.encoder_dtype, models.max_text_tokens, frozen)
        recipe = (*encoders, run.step_of(Subjects).recipe)
        return Inputs((*encoders, run.step_of(Pairs).fingerprint), recipe)

    def list_files(self) -> Mapping[str, str]:
        return {}  # an item is a clip, whose video was looked at by the subjects stage

    def plan(self, run: Run, step: Step) -> dict[str, ShardWork]:
        """Raises: ArtifactError: no clip is left, or the disk has no room for the shards."""
        subjects, pairs = run.step_of(Subjects), run.step_of(Pairs)
        plan = plan_shards(run.config.shards, subjects, pairs, step, run.locations)
        if not plan:
            raise ArtifactError(f"{subjects.folder}: no clip with a subject, so there is nothing to encode.")
        announce_size(step, {name: work.size for name, work in plan.items()}, run.config)
        self.versions = sorted(find_referred(step)) if any(work.is_adopted for work in plan.values()) else []
        null_prompt = join(step.location, NULL_PROMPT_NAME)
        if self.versions and find_size(null_prompt) is None:  # perhaps no worker is started that would write it
            write_bytes(null_prompt, read_bytes(join(step.root, f"{self.versions[0]}/{NULL_PROMPT_NAME}")))
        return plan

    def digest(self, work: ShardWork) -> list[str] | None:
        return None if work.is_adopted else work.digests

    def finish(self, run: Run, step: Step, plan: Mapping[str, ShardWork], commits: Sequence[dict[str, Any]]) -> ShardsManifest:
        made = _COMMITS.validate_python(commits)
        null_prompt = join(step.location, NULL_PROMPT_NAME)
        manifest = ShardsManifest(
            digest=hashlib.sha256("".join(commit.sha256 for commit in made).encode()).hexdigest()[:16],
            samples={split: sum(len(commit.samples) for commit in made if commit.split == split) for split in SPLITS},
            size_bytes=sum(commit.size_bytes for commit in made),
            **asdict(add_up(made)),
            **count_all([outcome for commit in made for outcome in commit.outcomes]),
            parts=tuple(plan),
            made_of=(run.step_of(Subjects).folder.name, run.step_of(Pairs).folder.name),
            versions=tuple(self.versions),
            null_prompt_crc32=zlib.crc32(read_bytes(null_prompt)) if find_size(null_prompt) is not None else None,
            video=run.config.video,
            models=run.config.models,
        )
        # The clips of an adopted part are not in the plan.
        planned = sum(len(commit.outcomes if work.is_adopted else work.clips) for commit, work in zip(made, plan.values()))
        assert manifest.counts["clip"].planned == planned, f"{planned} planned, {manifest.counts} accounted for"
        check_quarantined(manifest.counts, manifest.outcomes, run.config.curation.max_quarantine_fraction)
        return manifest

    def describe(self, manifest: ShardsManifest) -> str:
        train, held_out = manifest.samples["train"], manifest.samples["validation"]
        made = f"{train} training and {held_out} held-out samples with {manifest.references} references"
        lost = {"cut": manifest.cut_prompts, "with unknown words": manifest.prompts_with_unknown_words}
        told = ", ".join(f"{count} prompts {what}" for what, count in lost.items() if count)
        return f"{made} ({told})" if told else made

    def summarise(self, manifest: ShardsManifest) -> dict[str, Any]:
        return {"shards": len(manifest.parts), **manifest.model_dump(include={"references", "samples", "digest"})}

    def log(self, run: Run, step: Step, manifest: ShardsManifest) -> None:
        run.tracker.log_dataset(self.name, name="shards", folder=step.folder, digest=manifest.digest)
        for name, picture in iter_contact_sheets(step, manifest.parts, _MAX_SHEETS):
            run.tracker.log_image(self.name, decode_image(picture), f"contact_sheets/{name}.png")


@lru_cache(maxsize=4)
def _load_rows(file: str, changed_ns: int | None) -> list[ClipRow]:
    """Rows of a part; kept, because neighbouring shards need the same, until the file is written again."""
    return check_table(read_table(file), CLIP_SCHEMA, file).to_pylist()
