"""Shards: CLIP and PAIR rows in, committed WebDataset shards out."""

from __future__ import annotations

import hashlib
import json
import traceback
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

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
from refalign.shards.plan import ShardWork, count_views, plan_shards
from refalign.shards.writer import NULL_PROMPT_NAME, SHEET_FRAMES, SHEET_PX, iter_contact_sheets, write_tar
from refalign.stages.pairs import Pairs
from refalign.stages.subjects import Subjects

_COUNTED = ("references", "cross_references", "cut_prompts", "prompts_with_unknown_words")
"""What the index counts of a sample; the last two are not in older commits."""
_MAX_SHEETS = 3


class ShardsManifest(PartsManifest):
    """What was encoded.

    Attributes:
        digest: names the data set by content.
        samples: by split.
        cut_prompts: captions longer than ``models.max_text_tokens``.
        null_prompt_crc32: of the empty prompt's embedding.
    """

    digest: str
    samples: dict[str, int]
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
        """Encodes the clips of one shard, writes the tar and returns the commit record with the byte index.

        Raises:
            BackendUnavailable: the input is gone as a whole; nothing is stored.
        """
        self._write_null_prompt(step)
        with step.open_journal(name) as journal:
            return self._make_part(step, name, work, journal)

    def _make_part(self, step: Step, name: str, work: ShardWork, journal: Journal) -> dict[str, Any]:
        rows = {row["clip_id"]: row for file in work.files for row in _load_clips(file, changed_at(file))}
        pairs: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for pair in work.pairs:
            pairs[pair["clip_id"]].append(pair)
        outcomes: list[Outcome] = []
        index: dict[str, dict[str, Any]] = {}

        def samples() -> Iterator[tuple[str, dict[str, bytes]]]:
            wanted = [rows[clip_id] for clip_id in work.clips]
            for clip_id, frames in self._iter_frames(wanted, journal, work.videos):
                try:
                    if isinstance(frames, DataError):
                        raise frames
                    members, index[clip_id] = self._make_sample(rows[clip_id], pairs[clip_id], rows, frames, work.split)
                except DataError as error:
                    outcomes.append(Outcome("clip", clip_id, error.reason, str(error)))
                except Exception:
                    outcomes.append(Outcome("clip", clip_id, "CRASH", traceback.format_exc(limit=-3)))
                else:
                    outcomes.append(Outcome("clip", clip_id))
                    yield clip_id, members

        def write(path: Path) -> dict[str, Any]:
            offsets = write_tar(path, samples())
            return {
                "split": work.split,
                "work": work.digests,
                "samples": [{"key": key, **index[key], "members": offsets[key]} for key in offsets],
                **{kind: sum(index[key][kind] for key in offsets) for kind in _COUNTED},
                "outcomes": [asdict(outcome) for outcome in outcomes],
            }

        return step.write_part(name, write)

    def _write_null_prompt(self, step: Step) -> None:
        """The empty prompt's embedding, which stands in where training drops the text; the same bytes whoever writes them."""
        from safetensors.torch import save

        location = join(step.location, NULL_PROMPT_NAME)
        if find_size(location) is None:
            write_bytes(location, save({"prompt_embeds": self.encoders.encode_text("")}))

    def _iter_frames(
        self, rows: list[dict[str, Any]], journal: Journal, locations: Mapping[str, str]
    ) -> Iterator[tuple[str, np.ndarray | DataError]]:
        """Frames of each clip, one decode pass per video; none of a video that workers died on.

        Raises:
            BackendUnavailable: the input is gone as a whole.
        """
        by_video: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for row in rows:
            by_video[row["video_id"]].append(row)
        paths = {video_id: locations.get(video_id, clips[0]["video_path"]) for video_id, clips in by_video.items()}
        for video_id, clips in by_video.items():
            path = paths[video_id]
            specs = [ClipSpec(row["start_s"], tuple(round(value) for value in row["crop_xyxy_px"])) for row in clips]
            try:
                if (deaths := journal.begin(video_id)) >= self.config.curation.max_worker_deaths:
                    raise DataError("KILLS_WORKERS", describe_deaths(path, deaths))
                videos: list[Any] = read_clips(path, specs, self.config.video, self.config.curation)
            except DataError as error:
                fault = judge_fault(error, path, video_id)
                if belongs_to_place(fault.reason):
                    check_place(self.config.input.path, list(paths.values()))
                videos = [fault] * len(clips)
            yield from ((row["clip_id"], frames) for row, frames in zip(clips, videos, strict=True))

    def _make_sample(
        self, row: dict[str, Any], pairs: list[dict[str, Any]], rows: dict[str, Any], frames: np.ndarray, split: str
    ) -> tuple[dict[str, bytes], dict[str, Any]]:
        from safetensors.torch import save

        references = list(self._iter_references(row, pairs, rows))
        tensors = self.encoders.encode(frames, row["caption"], references)
        said = {
            key: row[key] for key in ("clip_id", "video_id", "caption", "license", "consent", "source_group", "start_s", "fps")
        }
        info = {**said, "split": split, "references": [reference.info for reference in references]}
        shown = np.linspace(0, len(frames) - 1, SHEET_FRAMES).round().astype(int)
        sheet = make_contact_sheet([frames[shown], [reference.pixels for reference in references]], SHEET_PX)
        members = {
            "safetensors": save(tensors),
            "json": json.dumps(info, sort_keys=True, ensure_ascii=False).encode(),
            "jpg": encode_jpeg(sheet),
        }
        shape = list(tensors["latents"].shape)
        entry = {"clip_id": row["clip_id"], "source_group": row["source_group"], "shape": shape, "subjects": len(row["subjects"])}
        losses = self.encoders.text.find_losses(row["caption"], self.encoders.max_text_tokens)
        entry |= {"cut_prompts": int(losses.cut_tokens > 0), "prompts_with_unknown_words": int(bool(losses.unknown))}
        cross = [reference.info["clip_id"] for reference in references if reference.info["kind"] == "cross_pair"]
        counted = {"references": len(references), "cross_references": len(cross), "reference_clips": sorted(set(cross))}
        return members, entry | counted

    def _iter_references(self, row: dict[str, Any], pairs: list[dict[str, Any]], rows: dict[str, Any]) -> Iterator[Any]:
        """Each subject's picture in its own clip, then its pictures in other clips."""
        from refalign.shards.encode import make_reference

        sizes_px = (self.config.video.height_px, self.config.video.width_px, self.encoders.grid.token_px)
        for position, subject in enumerate(row["subjects"]):
            views = [("in_pair", row["clip_id"], subject, 1.0)]
            for pair in pairs:
                if pair["subject_id"] == subject["subject_id"]:
                    there = rows[pair["reference_clip_id"]]["subjects"]
                    found = next(other for other in there if other["subject_id"] == pair["reference_subject_id"])
                    views.append(("cross_pair", pair["reference_clip_id"], found, pair["similarity"]))
            for kind, clip_id, view, similarity in views:
                info = {
                    "subject_index": position,
                    "subject_id": view["subject_id"],
                    "clip_id": clip_id,
                    "kind": kind,
                    "similarity": round(similarity, 6),
                    "class_name": view["class_name"],
                    "box_xyxy_px": [round(value, 2) for value in view["box_xyxy_px"]],
                    "score": round(view["score"], 6),
                }
                count = count_views(view["subject_id"], self.config.shards)
                if not count:
                    yield make_reference(view["crop_png"], *sizes_px, info)
                for variant in range(count):
                    rng = np.random.default_rng(_seed_of(row["clip_id"], view["subject_id"], variant))
                    yield make_reference(view["crop_png"], *sizes_px, {**info, "variant": variant}, rng)


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
        for version in self.versions:
            _copy_null_prompt(step, version)
        return plan

    def digest(self, work: ShardWork) -> list[str] | None:
        return None if work.is_adopted else work.digests

    def finish(self, run: Run, step: Step, plan: Mapping[str, ShardWork], commits: Sequence[dict[str, Any]]) -> ShardsManifest:
        outcomes = [Outcome(**outcome) for commit in commits for outcome in commit["outcomes"]]
        manifest = ShardsManifest(
            digest=hashlib.sha256("".join(commit["sha256"] for commit in commits).encode()).hexdigest()[:16],
            samples={
                split: sum(len(commit["samples"]) for commit in commits if commit["split"] == split)
                for split in ("train", "validation")
            },
            **{name: sum(commit.get(name, 0) for commit in commits) for name in (*_COUNTED, "size_bytes")},
            **count_all(outcomes),
            parts=tuple(plan),
            made_of=(run.step_of(Subjects).folder.name, run.step_of(Pairs).folder.name),
            versions=tuple(self.versions),
            null_prompt_crc32=_digest_null_prompt(step),
            video=run.config.video,
            models=run.config.models,
        )
        planned = sum(len(work.clips) for work in plan.values())
        planned += sum(len(commit["outcomes"]) for commit in commits if plan[commit["part"]].is_adopted)
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


def _digest_null_prompt(step: Step) -> int | None:
    location = join(step.location, NULL_PROMPT_NAME)
    return None if find_size(location) is None else zlib.crc32(read_bytes(location))


def _copy_null_prompt(step: Step, version: str) -> None:
    """From another version's folder, where this one may have no worker that would write it."""
    location = join(step.location, NULL_PROMPT_NAME)
    if find_size(location) is None:
        write_bytes(location, read_bytes(join(step.root, f"{version}/{NULL_PROMPT_NAME}")))


def _seed_of(*names: Any) -> int:
    """A number that depends on the names alone, for the draws of one augmented view."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, names)).encode()).digest()[:8])


@lru_cache(maxsize=4)
def _load_clips(file: str, changed_ns: int | None) -> list[dict[str, Any]]:
    """Rows of a part; kept, because neighbouring shards need the same, until the file is written again."""
    return check_table(read_table(file), CLIP_SCHEMA, file).to_pylist()
