"""Which clip goes into which shard, with which references. Decided once, before any encoding."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

from refalign.config import ShardsConfig
from refalign.errors import SchemaError
from refalign.io.storage import in_parallel, read_table
from refalign.io.tables import CLIP_SCHEMA, PAIR_SCHEMA, SUBJECT, VERDICT_SCHEMA, VERDICTS_PART, check_table, is_scene
from refalign.pipeline.reuse import digest_work
from refalign.pipeline.steps import Step

_DECIDING = [name for name in CLIP_SCHEMA.names if name not in ("subjects", "video_path", "look")]
_DECIDING += [f"subjects.list.element.{field.name}" for field in SUBJECT if field.name not in ("crop_png", "embedding")]
"""Columns that tell one row from another: pictures and embeddings follow from the video, the box and the settings."""


def plan_shards(
    config: ShardsConfig, subjects: Step, pairs: Step, adopt: Callable[[set[str]], dict[str, list[str]]] | None = None
) -> dict[str, dict[str, Any]]:
    """Shard name to its work: the clips that the pairs step kept, in order, and for each the pictures of its subjects in others.

    Clips of one video are adjacent, so that a shard decodes a video once.

    Args:
        adopt: takes the digests of all clips' work and returns the parts of earlier versions that stand for some of it
            (`refalign.pipeline.reuse.adopt_parts`); what is left is cut into shards.

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
    adopted = adopt(set(works.values())) if adopt else {}
    done = {digest for part in adopted.values() for digest in part}
    plan: dict[str, dict[str, Any]] = {}
    for split in ("train", "validation"):
        kept = [name for name in adopted if name.startswith(f"{split}-")]
        plan |= dict.fromkeys(kept, {"clips": [], "adopted": True})
        clips = sorted(clip_id for clip_id in file_of if split_of[clip_id] == split and works[clip_id] not in done)
        for number, start in enumerate(range(0, len(clips), config.samples_per_shard), len(kept)):
            chosen = clips[start : start + config.samples_per_shard]
            shown = [subject for clip_id in chosen for subject in subjects_of[clip_id]]
            shown += [pair["subject_id"] for clip_id in chosen for pair in references[clip_id]]
            needed = [*chosen, *(pair["reference_clip_id"] for clip_id in chosen for pair in references[clip_id])]
            plan[f"{split}-{number:06d}.tar"] = {
                "split": split,
                "work": [works[clip_id] for clip_id in chosen],
                "clips": chosen,
                "pairs": [pair for clip_id in chosen for pair in references[clip_id]],
                "references": sum(max(1, count_views(subject_id, config)) for subject_id in shown),
                "caption_bytes": sum(caption_bytes[clip_id] for clip_id in chosen),
                "files": sorted({file_of[clip_id] for clip_id in needed}),
            }
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
