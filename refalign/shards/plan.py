"""Which clip goes into which shard, with which references. Decided once, before any encoding."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pyarrow.parquet as pq

from refalign.config import ShardsConfig
from refalign.errors import SchemaError
from refalign.schemas import PAIR_SCHEMA, VERDICT_SCHEMA, VERDICTS_PART, check_table
from refalign.steps import Step


def plan_shards(config: ShardsConfig, subjects: Step, pairs: Step) -> dict[str, dict[str, Any]]:
    """Shard name to its work: the clips that the pairs step kept, in order, and for each the pictures of its subjects in others.

    Clips of one video are adjacent, so that a shard decodes a video once.

    Raises:
        SchemaError: a pair joins the training and the validation split.
    """
    subjects_manifest, pairs_manifest = subjects.load_manifest(), pairs.load_manifest()
    assert subjects_manifest and pairs_manifest, "shards are planned from finished steps"
    verdicts = check_table(pq.read_table(pairs.parts_folder / VERDICTS_PART), VERDICT_SCHEMA, VERDICTS_PART)
    split_of = {row["clip_id"]: row["split"] for row in verdicts.to_pylist() if not row["reason"]}
    file_of: dict[str, str] = {}
    for part in subjects_manifest["parts"]:
        for clip_id in pq.read_table(subjects.parts_folder / part, columns=["clip_id"])["clip_id"].to_pylist():
            if clip_id in split_of:
                file_of[clip_id] = part
    references = _load_references(pairs, pairs_manifest["parts"], split_of)
    plan: dict[str, dict[str, Any]] = {}
    for split in ("train", "validation"):
        clips = sorted(clip_id for clip_id in file_of if split_of[clip_id] == split)
        for start in range(0, len(clips), config.samples_per_shard):
            chosen = clips[start : start + config.samples_per_shard]
            needed = [*chosen, *(pair["reference_clip_id"] for clip_id in chosen for pair in references[clip_id])]
            plan[f"{split}-{start // config.samples_per_shard:06d}.tar"] = {
                "split": split,
                "clips": chosen,
                "pairs": [pair for clip_id in chosen for pair in references[clip_id]],
                "files": [str(subjects.parts_folder / part) for part in sorted({file_of[clip_id] for clip_id in needed})],
            }
    return plan


def _load_references(pairs: Step, parts: list[str], split_of: dict[str, str]) -> dict[str, list[dict[str, Any]]]:
    references: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for part in parts:
        for pair in check_table(pq.read_table(pairs.parts_folder / part), PAIR_SCHEMA, part).to_pylist():
            if split_of[pair["clip_id"]] != split_of[pair["reference_clip_id"]]:
                raise SchemaError(
                    f"{part}: clip {pair['clip_id']} ({split_of[pair['clip_id']]}) is paired with "
                    f"{pair['reference_clip_id']} ({split_of[pair['reference_clip_id']]}); the held-out split would leak."
                )
            references[pair["clip_id"]].append(pair)
    return references
