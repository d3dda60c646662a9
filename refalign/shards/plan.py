"""Which clip goes into which shard, with which references. Decided once, before any encoding."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from refalign.config import ShardsConfig
from refalign.errors import SchemaError
from refalign.estimates.storage import ShardSize
from refalign.io.storage import in_parallel, read_table
from refalign.io.tables import CLIP_SCHEMA, PAIR_SCHEMA, SUBJECT, VERDICT_SCHEMA, VERDICTS_PART, check_table, is_scene
from refalign.pipeline.reuse import adopt_parts, cut_parts, digest_work
from refalign.pipeline.steps import Step

_DECIDING = [name for name in CLIP_SCHEMA.names if name not in ("subjects", "video_path", "look")]
_DECIDING += [f"subjects.list.element.{field.name}" for field in SUBJECT if field.name not in ("crop_png", "embedding")]
"""Columns that tell one row from another: pictures and embeddings follow from the video, the box and the settings."""


@dataclass(frozen=True)
class ShardWork:
    """One shard: its clips in order, and for each the pictures of its subjects in others. All empty for an adopted part.

    Attributes:
        digests: of all that each clip's sample is made of.
        pairs: PAIR rows of the clips.
        references: pictures that are stored in all.
        files: parts of CLIP rows with the clips and those that references are from.
        videos: where the clips' videos lie now, by id.
        is_adopted: an earlier version made it.
    """

    split: str = ""
    digests: list[str] = field(default_factory=list)
    clips: list[str] = field(default_factory=list)
    pairs: list[dict[str, Any]] = field(default_factory=list)
    references: int = 0
    caption_bytes: int = 0
    files: list[str] = field(default_factory=list)
    videos: dict[str, str] = field(default_factory=dict)
    is_adopted: bool = False

    @property
    def size(self) -> ShardSize:
        """What its bytes follow from."""
        return ShardSize(len(self.clips), self.references, self.caption_bytes)


def plan_shards(
    config: ShardsConfig, subjects: Step, pairs: Step, step: Step | None = None, locations: Mapping[str, str] | None = None
) -> dict[str, ShardWork]:
    """Shard name to its work: the clips that the pairs step kept, in order, and for each the pictures of its subjects in others.

    Clips of one video are adjacent, so that a shard decodes a video once.

    Args:
        step: of the shards, where they are to be made: parts of earlier versions stand for some of the clips
            (`refalign.pipeline.reuse.adopt_parts`), and parts that a takedown deleted keep their other clips. What is left is cut
            into shards.
        locations: where each video of the present input lies, by its id.

    Raises:
        SchemaError: a pair joins the training and the validation split.
    """
    subjects_manifest, pairs_manifest = subjects.load_manifest(), pairs.load_manifest()
    assert subjects_manifest and pairs_manifest, "shards are planned from finished steps"
    verdicts = check_table(read_table(pairs.locate(VERDICTS_PART)), VERDICT_SCHEMA, VERDICTS_PART)
    split_of = {row["clip_id"]: row["split"] for row in verdicts.to_pylist() if not row["reason"]}
    file_of: dict[str, str] = {}
    rows: dict[str, str] = {}
    subjects_of: dict[str, list[str]] = {}
    caption_bytes: dict[str, int] = {}
    for file in in_parallel(subjects.locate, subjects_manifest["parts"]):
        for row in read_table(file, _DECIDING).to_pylist():
            if row["clip_id"] in split_of:
                file_of[row["clip_id"]], rows[row["clip_id"]] = file, digest_work(row)
                subjects_of[row["clip_id"]] = [subject["subject_id"] for subject in row["subjects"]]
                caption_bytes[row["clip_id"]] = len(row["caption"].encode())
    references = _load_references(pairs, pairs_manifest["parts"], split_of)
    works = {clip_id: _digest_clip(split_of[clip_id], rows, clip_id, references[clip_id]) for clip_id in file_of}
    adopted = adopt_parts(step, set(works.values())) if step else {}
    done = {digest for part in adopted.values() for digest in part}
    plan: dict[str, ShardWork] = {}
    places = locations or {}
    for split in ("train", "validation"):
        clips = [clip_id for clip_id in sorted(file_of) if split_of[clip_id] == split and works[clip_id] not in done]
        shards: dict[str, list[str]] = {name: [] for name in adopted if name.startswith(f"{split}-")}
        shards |= cut_parts(step, clips, config.samples_per_shard, split, ".tar", adopted)
        for name, chosen in sorted(shards.items()):
            shown = [subject for clip_id in chosen for subject in subjects_of[clip_id]]
            shown += [pair["subject_id"] for clip_id in chosen for pair in references[clip_id]]
            needed = [*chosen, *(pair["reference_clip_id"] for clip_id in chosen for pair in references[clip_id])]
            videos = {clip_id.rpartition("-")[0] for clip_id in chosen} & places.keys()
            plan[name] = ShardWork(
                split=split,
                digests=[works[clip_id] for clip_id in chosen],
                clips=chosen,
                pairs=[pair for clip_id in chosen for pair in references[clip_id]],
                references=sum(max(1, count_views(subject_id, config)) for subject_id in shown),
                caption_bytes=sum(caption_bytes[clip_id] for clip_id in chosen),
                files=sorted({file_of[clip_id] for clip_id in needed}),
                videos={video_id: places[video_id] for video_id in videos},
                is_adopted=name in adopted,
            )
    return plan


def count_views(subject_id: str, config: ShardsConfig) -> int:
    """Augmented views of a reference that are stored, 0 where it is stored as it is: scenes are shown upright."""
    return 0 if is_scene(subject_id) else config.augmented_references


def _digest_clip(split: str, rows: dict[str, str], clip_id: str, pairs: list[dict[str, Any]]) -> str:
    """Of all that a sample is made of: its split, its row, its pairs, and the rows of the clips that its references are from."""
    return digest_work(split, rows[clip_id], [[pair, rows[pair["reference_clip_id"]]] for pair in pairs])


def _load_references(pairs: Step, parts: list[str], split_of: dict[str, str]) -> dict[str, list[dict[str, Any]]]:
    references: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for part in parts:
        for pair in check_table(read_table(pairs.locate(part)), PAIR_SCHEMA, part).to_pylist():
            if split_of[pair["clip_id"]] != split_of[pair["reference_clip_id"]]:
                raise SchemaError(
                    f"{part}: clip {pair['clip_id']} ({split_of[pair['clip_id']]}) is paired with "
                    f"{pair['reference_clip_id']} ({split_of[pair['reference_clip_id']]}); the held-out split would leak."
                )
            references[pair["clip_id"]].append(pair)
    return references
