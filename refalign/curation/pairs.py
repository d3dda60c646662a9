"""The pairs step: which subject of one clip is seen again in another clip of the same source group."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from refalign.config import PairsConfig, RunConfig
from refalign.curation.selection import choose_clips, load_crops, load_verdicts
from refalign.io.storage import in_parallel, read_table
from refalign.io.tables import PAIR_SCHEMA, VERDICT_SCHEMA, VERDICTS_PART, check_table, is_scene
from refalign.pipeline.outcomes import Outcome, count_outcomes
from refalign.pipeline.ray_data import run_parts
from refalign.pipeline.reuse import digest_work
from refalign.pipeline.steps import Step

_CLIPS_PER_PART = 20_000
_BLOCK = 2048
_SHOWN_OUTCOMES = 1000
"""Filtered clips named in the manifest; `clips.parquet` names all."""
Matches = tuple[np.ndarray, np.ndarray, np.ndarray]
_Crop = tuple[str, str, np.ndarray]


def run_pairs(config: RunConfig, step: Step, subjects: Step) -> dict[str, Any]:
    """Runs the step and returns its manifest; `clips.parquet` among its parts holds the verdict on every clip.

    Raises:
        ConfigError, DataError: as `refalign.curation.selection.choose_clips`.
    """
    chosen, unscored = choose_clips(config, step, subjects)
    verdicts = _assign_clips(chosen, config.pairs.validation_fraction)
    step.write_part(VERDICTS_PART, lambda path: _write(path, verdicts, VERDICT_SCHEMA))
    groups = _load_groups(subjects, set(_column(verdicts, "clip_id", kept=True)))
    plan = _plan_parts(groups, subjects, (step.load_commit(VERDICTS_PART) or {}).get("sha256", ""))
    works = {name: work["work"] for name, work in plan.items()}
    records = run_parts(step, plan, PairsActor, config, label="pairs", works=works)
    described = describe_pairs(records, verdicts)
    kept = described["counts"]["clip"]["written"]
    assert sum(record["clips"] for record in records) == kept, "a kept clip was not looked at"
    return step.commit({"parts": list(plan), "made_of": [subjects.folder.name], "unscored": unscored, **described})


def describe_pairs(records: Sequence[dict[str, Any]], verdicts: pa.Table) -> dict[str, Any]:
    """What the manifest says of the parts with these commit records, and of the verdicts on all clips."""
    outcomes = [Outcome("clip", *decided) for decided in zip(_column(verdicts, "clip_id"), _column(verdicts, "reason"))]
    return {
        "pairs": sum(record["pairs"] for record in records),
        "subjects": sum(record["subjects"] for record in records),
        "subjects_with_pair": sum(record["subjects_with_pair"] for record in records),
        "splits": dict(zip(_column(verdicts, "source_group", kept=True), _column(verdicts, "split", kept=True))),
        "clips": {split: _column(verdicts, "split", kept=True).count(split) for split in ("train", "validation")},
        "counts": count_outcomes(outcomes),
        "outcomes": [dataclasses.asdict(outcome) for outcome in outcomes if outcome.reason][:_SHOWN_OUTCOMES],
    }


def describe_rows(pairs: pa.Table) -> dict[str, Any]:
    """What a commit says of the rows of its part."""
    return {"rows": len(pairs), "pairs": len(pairs), "subjects_with_pair": len(set(pairs["subject_id"].to_pylist()))}


def assign_splits(groups: Iterable[str], validation_fraction: float) -> dict[str, str]:
    """``train`` or ``validation`` for every source group, by its name alone, so that new data moves no old group.

    Where no group falls below the fraction, and there are at least two, the one nearest to it is held out.
    """
    position = {group: int(hashlib.sha256(group.encode()).hexdigest()[:8], 16) / 16**8 for group in groups}
    held_out = {group for group, value in position.items() if value < validation_fraction}
    if validation_fraction and not held_out and len(position) > 1:
        held_out = {min(position, key=lambda group: position[group])}
    return {group: "validation" if group in held_out else "train" for group in sorted(position)}


def match_subjects(embeddings: np.ndarray, clips: np.ndarray, config: PairsConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Matches within one group: subjects [M], their references in other clips [M], cosines [M].

    Two subjects match if each is the other's nearest neighbour in the other's clip, with a cosine of at least
    ``min_similarity`` and at most ``max_similarity``. Sorted by subject, the most similar reference first.

    Clips are taken in blocks: whether two subjects match is decided by the products of their two blocks alone, so memory does
    not grow with the group.

    Args:
        embeddings: float32 [N, E], L2-normalised.
        clips: int [N], the clip of each subject; equal numbers adjacent and ascending from 0.
    """
    blocks = _split_blocks(clips)
    found = [_no_matches()]
    for rows in blocks:
        of_block = [_match_blocks(embeddings, clips, rows, columns, config) for columns in blocks]
        found.append(_keep_best(*(np.concatenate(parts) for parts in zip(*of_block)), config.max_references_per_subject))
    subjects, references, values = (np.concatenate(parts) for parts in zip(*found))
    return subjects, references, values


def _split_blocks(clips: np.ndarray) -> list[slice]:
    """Ranges of about ``_BLOCK`` subjects that begin and end with a clip."""
    starts = np.flatnonzero(np.diff(clips, prepend=-1)) if len(clips) else np.zeros(0, int)
    chosen: list[int] = []
    for start in starts.tolist():
        if not chosen or start - chosen[-1] >= _BLOCK:
            chosen.append(start)
    return [slice(*ends) for ends in zip(chosen, [*chosen[1:], len(clips)])]


def _match_blocks(embeddings: np.ndarray, clips: np.ndarray, rows: slice, columns: slice, config: PairsConfig) -> Matches:
    """The mutual nearest neighbours of two blocks within the limits, in no particular order."""
    similarity = embeddings[rows] @ embeddings[columns].T
    there, value = _nearest_per_clip(np.ascontiguousarray(similarity.T), clips[columns])  # [clips of columns, rows]
    here, _ = _nearest_per_clip(similarity, clips[rows])  # [clips of rows, columns]
    good = (value >= config.min_similarity) & (value <= config.max_similarity)
    clip, subject = np.nonzero(good)
    reference, value = there[clip, subject], value[clip, subject]
    own_clip = clips[rows] - clips[rows.start]
    mutual = here[own_clip[subject], reference] == subject
    mutual &= clips[rows][subject] != clips[columns][reference]
    return subject[mutual] + rows.start, reference[mutual] + columns.start, value[mutual]


def _nearest_per_clip(similarity: np.ndarray, clips: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per clip and column the row of the clip with the largest value, the first of equals, and that value; both [clips, M].

    Clips hold few subjects, so this goes through their first, second, third subject ... of all clips at once.
    """
    first = np.flatnonzero(np.diff(clips, prepend=clips[0] - 1))
    sizes = np.diff(first, append=len(clips))
    value = similarity[first]
    nearest = np.repeat(first[:, None], similarity.shape[1], axis=1)
    for position in range(1, sizes.max()):
        has = np.flatnonzero(sizes > position)
        rows = first[has] + position
        candidate = similarity[rows]
        is_better = candidate > value[has]
        value[has] = np.where(is_better, candidate, value[has])
        nearest[has] = np.where(is_better, rows[:, None], nearest[has])
    return nearest, value


def _keep_best(subjects: np.ndarray, references: np.ndarray, values: np.ndarray, limit: int) -> Matches:
    """The ``limit`` largest values of each subject; of equal ones the reference that comes first.

    Args:
        references: ascending for each subject.
        values: float32, not negative.
    """
    # One key in place of two: the bits of floats that are not negative are in the order of the floats.
    falling = np.uint64(2**32 - 1) - np.abs(values).view(np.uint32).astype(np.uint64)
    key = (subjects.astype(np.uint64) << np.uint64(32)) | falling
    order = np.argsort(key, kind="stable")
    subjects = subjects[order]
    is_first = np.diff(subjects, prepend=-1) != 0
    rank = np.arange(len(subjects)) - np.flatnonzero(is_first)[np.cumsum(is_first) - 1] if len(subjects) else subjects
    kept = order[rank < limit]
    return subjects[rank < limit], references[kept], values[kept]


def _no_matches() -> Matches:
    return np.zeros(0, int), np.zeros(0, int), np.zeros(0, np.float32)


class PairsActor:
    """Matches the groups of one part; holds no model."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    def make_part(self, step: Step, name: str, work: dict[str, Any]) -> dict[str, Any]:
        """Reads the embeddings of the part's groups, writes PAIR rows and returns the commit record."""
        wanted = set(work["groups"])
        verdicts = load_verdicts(step)
        kept = set(_column(verdicts, "clip_id", kept=True))
        by_group: dict[str, list[_Crop]] = defaultdict(list)
        clips = 0
        for crops in map(load_crops, work["files"]):
            takes = [
                group in wanted and clip_id in kept for clip_id, group in zip(crops.clip_ids, crops.source_groups, strict=True)
            ]
            clips += sum(takes)
            for clip, subject_id, embedding in zip(crops.clips.tolist(), crops.subject_ids, crops.embeddings, strict=True):
                if takes[clip]:
                    by_group[crops.source_groups[clip]].append((crops.clip_ids[clip], subject_id, embedding))
        matched = [self._match_group(crops) for group in sorted(by_group) for crops in _split_kinds(by_group[group])]
        pairs = pa.concat_tables([PAIR_SCHEMA.empty_table(), *matched])

        def write(path: Path) -> dict[str, Any]:
            written = _write(path, pairs, PAIR_SCHEMA)
            counts = {"clips": clips, "subjects": sum(map(len, by_group.values()))}
            return written | describe_rows(pairs) | counts | {"work": work["work"]}

        return step.write_part(name, write)

    def _match_group(self, crops: list[_Crop]) -> pa.Table:
        crops = sorted(crops, key=lambda crop: crop[:2])
        clip_ids, subject_ids = (pa.array([crop[index] for crop in crops], pa.string()) for index in (0, 1))
        _, clips = np.unique(clip_ids.to_numpy(zero_copy_only=False), return_inverse=True)
        subjects, references, values = match_subjects(np.stack([crop[2] for crop in crops]), clips, self.config.pairs)
        columns = [clip_ids.take(subjects), subject_ids.take(subjects), clip_ids.take(references), subject_ids.take(references)]
        return pa.Table.from_arrays([*columns, pa.array(values, pa.float32())], schema=PAIR_SCHEMA)


def _split_kinds(crops: list[_Crop]) -> list[list[_Crop]]:
    """Subjects and scenes: the one is never a picture of the other."""
    kinds = ([crop for crop in crops if is_scene(crop[1]) == wanted] for wanted in (False, True))
    return [kind for kind in kinds if kind]


def _write(path: Path, table: pa.Table, schema: pa.Schema) -> dict[str, Any]:
    pq.write_table(check_table(table.cast(schema), schema, path.name), path)
    return {"rows": len(table)}


def _column(verdicts: pa.Table, name: str, *, kept: bool = False) -> list[str]:
    table = verdicts.filter(pc.field("reason") == "") if kept else verdicts
    return table[name].to_pylist()


def _assign_clips(verdicts: pa.Table, validation_fraction: float) -> pa.Table:
    """Fills in the split of every clip that is kept."""
    splits = assign_splits(set(_column(verdicts, "source_group", kept=True)), validation_fraction)
    rows = zip(_column(verdicts, "source_group"), _column(verdicts, "reason"))
    assigned = pa.array(["" if reason else splits[group] for group, reason in rows], pa.string())
    return verdicts.set_column(verdicts.column_names.index("split"), "split", assigned)


def _load_groups(subjects: Step, kept: set[str]) -> dict[str, dict[str, int]]:
    """Per source group with a kept clip: the part files that hold it, with the number of its clips in each."""
    manifest = subjects.load_manifest()
    assert manifest is not None, f"{subjects.folder} is not finished"
    groups: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for part in manifest["parts"]:
        table = read_table(subjects.locate(part), ["clip_id", "source_group"])
        for clip_id, group in zip(table["clip_id"].to_pylist(), table["source_group"].to_pylist(), strict=True):
            if clip_id in kept:
                groups[group][part] += 1
    return dict(sorted((group, dict(files)) for group, files in groups.items()))


def _plan_parts(groups: Mapping[str, Mapping[str, int]], subjects: Step, verdicts: str) -> dict[str, dict[str, Any]]:
    """Whole groups together, about ``_CLIPS_PER_PART`` clips a part; its ``work`` tells when it must be made again."""
    plan: dict[str, dict[str, Any]] = {}
    names: list[str] = []
    clips, last = 0, next(reversed(list(groups)), None)
    for group, files in groups.items():
        names.append(group)
        clips += sum(files.values())
        if clips >= _CLIPS_PER_PART or group == last:
            parts = sorted({part for name in names for part in groups[name]})
            commits = in_parallel(subjects.load_commit, parts)
            plan[f"pairs-{len(plan):06d}.parquet"] = {
                "groups": names,
                "files": [subjects.locate(part, commit) for part, commit in zip(parts, commits, strict=True)],
                "work": [digest_work(names, verdicts, [(commit or {})["sha256"] for commit in commits])],
            }
            names, clips = [], 0
    return plan
