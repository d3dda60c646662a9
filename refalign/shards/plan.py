"""Which clip goes into which shard, with which references. Decided once, before any encoding."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from refalign.config import ShardsConfig
from refalign.errors import SchemaError
from refalign.estimates.storage import ShardSize
from refalign.io.storage import in_parallel, read_table
from refalign.io.tables import CLIP_SCHEMA, PAIR_SCHEMA, SUBJECT, VERDICT_SCHEMA, VERDICTS_PART, check_table, is_scene
from refalign.pipeline.reuse import adopt_parts, cut_parts, digest_work
from refalign.pipeline.steps import Step

SPLITS = ("train", "validation")
_DECIDING = [name for name in CLIP_SCHEMA.names if name not in ("subjects", "video_path", "look")]
_DECIDING += [f"subjects.list.element.{field.name}" for field in SUBJECT if field.name not in ("crop_png", "embedding")]
"""Columns that tell one row from another: pictures and embeddings follow from the video, the box and the settings."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A PAIR row: another picture of a subject."""

    clip_id: str
    subject_id: str
    reference_clip_id: str
    reference_subject_id: str
    similarity: float


@dataclass(frozen=True)
class ShardWork:
    """One shard. There is nothing to do for an adopted part, which an earlier version made."""

    split: str
    digests: list[str]  # one for each clip, of all that its sample is made of
    clips: list[str]  # in order
    pairs: list[Pair]  # of the clips
    references: int  # pictures that are stored
    caption_bytes: int
    files: list[str]  # parts of CLIP rows that hold the clips and those that references are from
    videos: dict[str, str]  # where the clips' videos lie now, by id
    is_adopted: bool

    @property
    def size(self) -> ShardSize:
        """What its bytes follow from."""
        return ShardSize(len(self.clips), self.references, self.caption_bytes)


@dataclass(frozen=True, slots=True)
class _Clip:
    file: str  # the part that holds its row
    row: str  # digest of its row
    subjects: list[str]
    caption_bytes: int


def plan_shards(
    config: ShardsConfig, subjects: Step, pairs: Step, step: Step | None = None, locations: Mapping[str, str] | None = None
) -> dict[str, ShardWork]:
    """Shard name to its work: the kept clips in order, each with the pictures of its subjects in other clips.

    Clips of one video are adjacent, so that a shard decodes a video once.

    Args:
        step: of the shards, if they are to be made. Parts of earlier versions stand for some of the clips
            (`refalign.pipeline.reuse.adopt_parts`), and parts that a takedown deleted keep their other clips.
        locations: where each video of the present input lies, by its id.

    Raises:
        SchemaError: a pair joins the training and the validation split.
    """
    subjects_manifest, pairs_manifest = subjects.load_manifest(), pairs.load_manifest()
    assert subjects_manifest and pairs_manifest, "shards are planned from finished steps"
    verdicts = check_table(read_table(pairs.locate(VERDICTS_PART)), VERDICT_SCHEMA, VERDICTS_PART)
    split_of = {row["clip_id"]: row["split"] for row in verdicts.to_pylist() if not row["reason"]}
    clips = _load_clips(in_parallel(subjects.locate, subjects_manifest["parts"]), split_of)
    pairs_of = _load_pairs(pairs, pairs_manifest["parts"], split_of)
    digests = {}
    for clip_id, clip in clips.items():
        shown = [[asdict(pair), clips[pair.reference_clip_id].row] for pair in pairs_of[clip_id]]
        digests[clip_id] = digest_work(split_of[clip_id], clip.row, shown)
    adopted = adopt_parts(step, set(digests.values())) if step else {}
    done = {digest for part in adopted.values() for digest in part}
    places = locations or {}
    plan: dict[str, ShardWork] = {}
    for split in SPLITS:
        left = [clip_id for clip_id in sorted(clips) if split_of[clip_id] == split and digests[clip_id] not in done]
        shards: dict[str, list[str]] = {name: [] for name in adopted if name.startswith(f"{split}-")}
        shards |= cut_parts(step, left, config.samples_per_shard, split, ".tar", adopted)
        for name, chosen in sorted(shards.items()):
            references = [pair for clip_id in chosen for pair in pairs_of[clip_id]]
            shown = [subject_id for clip_id in chosen for subject_id in clips[clip_id].subjects]
            shown += [pair.subject_id for pair in references]
            needed = [*chosen, *(pair.reference_clip_id for pair in references)]
            videos = {clip_id.rpartition("-")[0] for clip_id in chosen} & places.keys()
            plan[name] = ShardWork(
                split=split,
                digests=[digests[clip_id] for clip_id in chosen],
                clips=chosen,
                pairs=references,
                references=sum(max(1, count_views(subject_id, config)) for subject_id in shown),
                caption_bytes=sum(clips[clip_id].caption_bytes for clip_id in chosen),
                files=sorted({clips[clip_id].file for clip_id in needed}),
                videos={video_id: places[video_id] for video_id in videos},
                is_adopted=name in adopted,
            )
    return plan


def count_views(subject_id: str, config: ShardsConfig) -> int:
    """How many augmented views of a reference are stored; 0: it is stored as it is, as scenes are, which stay upright."""
    return 0 if is_scene(subject_id) else config.augmented_references


def _load_clips(files: Sequence[str], kept: Mapping[str, str]) -> dict[str, _Clip]:
    clips = {}
    for file in files:
        for row in read_table(file, _DECIDING).to_pylist():
            if row["clip_id"] in kept:
                subjects = [subject["subject_id"] for subject in row["subjects"]]
                clips[row["clip_id"]] = _Clip(file, digest_work(row), subjects, len(row["caption"].encode()))
    return clips


def _load_pairs(step: Step, parts: Sequence[str], split_of: Mapping[str, str]) -> dict[str, list[Pair]]:
    pairs: dict[str, list[Pair]] = defaultdict(list)
    for part in parts:
        for row in check_table(read_table(step.locate(part)), PAIR_SCHEMA, part).to_pylist():
            pair = Pair(**row)
            split, other = split_of[pair.clip_id], split_of[pair.reference_clip_id]
            if split != other:
                raise SchemaError(
                    f"{part}: clip {pair.clip_id} ({split}) is paired with {pair.reference_clip_id} ({other}); the held-out "
                    "split would leak."
                )
            pairs[pair.clip_id].append(pair)
    return pairs
