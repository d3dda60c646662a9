"""The pairs step: which subject of one clip is seen again in another clip of the same source group."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from refalign.config import PairsConfig, RunConfig
from refalign.parts import run_parts
from refalign.schemas import PAIR_SCHEMA, check_table
from refalign.steps import Step

_CROPS_PER_PART = 20_000


def run_pairs(config: RunConfig, step: Step, subjects: Step) -> dict[str, Any]:
    """Runs the step and returns its manifest, which also holds the split of every source group."""
    groups = _load_groups(subjects)
    splits = assign_splits(groups, config.pairs.validation_fraction)
    plan = _plan_parts(groups, subjects)
    records = run_parts(step, plan, PairsActor, config, label="pairs")
    return step.commit(
        {
            "parts": list(plan),
            "pairs": sum(record["pairs"] for record in records),
            "subjects_with_pair": sum(record["subjects_with_pair"] for record in records),
            "splits": splits,
            "clips": dict(_count_clips(groups, splits)),
        }
    )


def assign_splits(groups: Iterable[str], validation_fraction: float) -> dict[str, str]:
    """``train`` or ``validation`` for every source group, by its name alone, so that new data moves no old group.

    Where no group falls below the fraction, and there are at least two, the one nearest to it is held out.
    """
    position = {group: int(hashlib.sha256(group.encode()).hexdigest()[:8], 16) / 16**8 for group in groups}
    held_out = {group for group, value in position.items() if value < validation_fraction}
    if validation_fraction and not held_out and len(position) > 1:
        held_out = {min(position, key=lambda group: position[group])}
    return {group: "validation" if group in held_out else "train" for group in sorted(position)}


def match_subjects(embeddings: np.ndarray, clips: np.ndarray, config: PairsConfig) -> list[tuple[int, int, float]]:
    """Matches within one group: (subject, its reference in another clip, cosine).

    Two subjects match if each is the other's nearest neighbour in the other's clip, with a cosine of at least
    ``min_similarity`` and at most ``max_similarity``.

    Args:
        embeddings: float [N, E], L2-normalised.
        clips: int [N], the clip of each subject; equal numbers adjacent and ascending from 0.
    """
    if not len(clips) or clips[-1] == 0:
        return []
    first = np.searchsorted(clips, np.arange(clips[-1] + 1))
    slot = np.arange(len(clips)) - first[clips]
    similarity = embeddings @ embeddings.T
    # [N, clips, most subjects of a clip]: the nearest neighbour of each subject in each clip is then one argmax.
    table = np.full((len(clips), len(first), slot.max() + 1), -np.inf, np.float32)
    table[:, clips, slot] = similarity
    nearest = first[None] + table.argmax(2)
    here = np.arange(len(clips))
    other = nearest[here[:, None], np.arange(len(first))[None]]
    value = np.take_along_axis(similarity, other, 1)
    mutual = nearest[other, clips[:, None]] == here[:, None]
    good = mutual & (value >= config.min_similarity) & (value <= config.max_similarity)
    good[here, clips] = False
    pairs = []
    for subject in np.flatnonzero(good.any(1)):
        columns = np.flatnonzero(good[subject])
        best = columns[np.argsort(-value[subject, columns], kind="stable")][: config.max_references_per_subject]
        pairs += [(int(subject), int(other[subject, column]), float(value[subject, column])) for column in best]
    return pairs


class PairsActor:
    """Matches the groups of one part; holds no model."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    def make_part(self, step: Step, name: str, work: dict[str, Any]) -> dict[str, Any]:
        """Reads the embeddings of the part's groups, writes PAIR rows and returns the commit record."""
        wanted = set(work["groups"])
        by_group: dict[str, list[tuple[str, str, np.ndarray]]] = defaultdict(list)
        for file in work["files"]:
            table = pq.read_table(file, columns=["clip_id", "source_group", "subjects"])
            for row in table.to_pylist():
                if row["source_group"] in wanted:
                    for subject in row["subjects"]:
                        entry = (row["clip_id"], subject["subject_id"], np.asarray(subject["embedding"], np.float32))
                        by_group[row["source_group"]].append(entry)
        rows = [row for group in sorted(by_group) for row in self._match_group(by_group[group])]

        def write(path: Path) -> dict[str, Any]:
            pq.write_table(check_table(pa.Table.from_pylist(rows, schema=PAIR_SCHEMA), PAIR_SCHEMA, name), path)
            return {
                "pairs": len(rows),
                "subjects_with_pair": len({row["subject_id"] for row in rows}),
            }

        return step.write_part(name, write)

    def _match_group(self, entries: list[tuple[str, str, np.ndarray]]) -> list[dict[str, Any]]:
        entries = sorted(entries, key=lambda entry: entry[:2])
        _, clips = np.unique([clip_id for clip_id, _, _ in entries], return_inverse=True)
        matches = match_subjects(np.stack([embedding for _, _, embedding in entries]), clips, self.config.pairs)
        return [
            {
                "clip_id": entries[subject][0],
                "subject_id": entries[subject][1],
                "reference_clip_id": entries[reference][0],
                "reference_subject_id": entries[reference][1],
                "similarity": similarity,
            }
            for subject, reference, similarity in matches
        ]


def _load_groups(subjects: Step) -> dict[str, dict[str, int]]:
    """Per source group: the part files that hold it, with the number of its clips in each."""
    manifest = subjects.load_manifest()
    assert manifest is not None, f"{subjects.folder} is not finished"
    groups: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for part in manifest["parts"]:
        for group in pq.read_table(subjects.parts_folder / part, columns=["source_group"])["source_group"].to_pylist():
            groups[group][part] += 1
    return dict(sorted((group, dict(files)) for group, files in groups.items()))


def _count_clips(groups: Mapping[str, Mapping[str, int]], splits: Mapping[str, str]) -> dict[str, int]:
    counts = {"train": 0, "validation": 0}
    for group, files in groups.items():
        counts[splits[group]] += sum(files.values())
    return counts


def _plan_parts(groups: Mapping[str, Mapping[str, int]], subjects: Step) -> dict[str, dict[str, Any]]:
    """Whole groups together, about ``_CROPS_PER_PART`` clips a part."""
    plan: dict[str, dict[str, Any]] = {}
    names: list[str] = []
    clips, last = 0, next(reversed(list(groups)), None)
    for group, files in groups.items():
        names.append(group)
        clips += sum(files.values())
        if clips >= _CROPS_PER_PART or group == last:
            parts = sorted({part for name in names for part in groups[name]})
            plan[f"pairs-{len(plan):06d}.parquet"] = {
                "groups": names,
                "files": [str(subjects.parts_folder / part) for part in parts],
            }
            names, clips = [], 0
    return plan
