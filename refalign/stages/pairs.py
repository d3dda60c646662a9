"""Pairs: which clips are used, and which subject of one clip is seen again in another clip of the same source group."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from refalign.config import RunConfig
from refalign.curation.matching import match_subjects
from refalign.curation.selection import choose_clips, load_crops, load_verdicts
from refalign.io.storage import in_parallel, read_table
from refalign.io.tables import PAIR_SCHEMA, VERDICT_SCHEMA, VERDICTS_PART, check_table, is_scene
from refalign.models.loading import identify_model
from refalign.pipeline.outcomes import Outcome
from refalign.pipeline.reuse import digest_work
from refalign.pipeline.stage import Inputs, PartsManifest, PartStage, Run, count_all
from refalign.pipeline.steps import Step
from refalign.stages.subjects import Subjects

_CLIPS_PER_PART = 20_000
_SHOWN_OUTCOMES = 1000
"""Filtered clips named in the manifest; `clips.parquet` names all."""
_Crop = tuple[str, str, np.ndarray]


class PairsManifest(PartsManifest):
    """What was kept and matched.

    Attributes:
        subjects: of the kept clips.
        splits: ``train`` or ``validation`` of each source group.
        clips: kept clips by split.
        unscored: clips that passed a limit only for want of a score, by column.
    """

    pairs: int
    subjects: int
    subjects_with_pair: int
    splits: dict[str, str]
    clips: dict[str, int]
    unscored: dict[str, int] = {}


@dataclass(frozen=True)
class GroupsWork:
    """Whole source groups.

    Attributes:
        files: parts of CLIP rows that hold clips of the groups.
        digest: of the groups, the verdicts and the files' content.
    """

    groups: list[str]
    files: list[str]
    digest: str


class PairsWorker:
    """Matches the groups of one part; holds no model."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    def make_part(self, step: Step, name: str, work: GroupsWork) -> dict[str, Any]:
        """Reads the embeddings of the part's groups, writes PAIR rows and returns the commit record."""
        wanted = set(work.groups)
        verdicts = load_verdicts(step)
        kept = set(_column(verdicts, "clip_id", kept=True))
        by_group: dict[str, list[_Crop]] = defaultdict(list)
        clips = 0
        for crops in map(load_crops, work.files):
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
            return {
                **_write(path, pairs, PAIR_SCHEMA),
                "pairs": len(pairs),
                "subjects_with_pair": len(set(pairs["subject_id"].to_pylist())),
                "clips": clips,
                "subjects": sum(map(len, by_group.values())),
                "work": [work.digest],
            }

        return step.write_part(name, write)

    def _match_group(self, crops: list[_Crop]) -> pa.Table:
        crops = sorted(crops, key=lambda crop: crop[:2])
        clip_ids, subject_ids = (pa.array([crop[index] for crop in crops], pa.string()) for index in (0, 1))
        _, clips = np.unique(clip_ids.to_numpy(zero_copy_only=False), return_inverse=True)
        subjects, references, values = match_subjects(np.stack([crop[2] for crop in crops]), clips, self.config.pairs)
        columns = [clip_ids.take(subjects), subject_ids.take(subjects), clip_ids.take(references), subject_ids.take(references)]
        return pa.Table.from_arrays([*columns, pa.array(values, pa.float32())], schema=PAIR_SCHEMA)


class Pairs(PartStage[PairsManifest, GroupsWork]):
    """Verdicts on all clips (`clips.parquet`), then pairs by source group."""

    name = "pairs"
    manifest = PairsManifest
    sections = ("quality", "pairs")
    worker = PairsWorker
    parts_in_store = True

    def find_inputs(self, run: Run) -> Inputs:
        quality = run.config.quality.model_dump(exclude={"evaluation_references"})
        pictures = run.config.quality.evaluation_references
        shown = identify_model(pictures) if pictures else ""
        return Inputs((run.config.pairs, quality, shown, run.step_of(Subjects).fingerprint))

    def plan(self, run: Run, step: Step) -> dict[str, GroupsWork]:
        """Raises: ConfigError, DataError: as `refalign.curation.selection.choose_clips`."""
        subjects = run.step_of(Subjects)
        chosen, self.unscored = choose_clips(run.config, step, subjects)
        self.verdicts = _assign_clips(chosen, run.config.pairs.validation_fraction)
        step.write_part(VERDICTS_PART, lambda path: _write(path, self.verdicts, VERDICT_SCHEMA))
        groups = _load_groups(subjects, run.manifest_of(Subjects).parts, set(_column(self.verdicts, "clip_id", kept=True)))
        return _plan_parts(groups, subjects, (step.load_commit(VERDICTS_PART) or {}).get("sha256", ""))

    def digest(self, work: GroupsWork) -> list[str]:
        return [work.digest]

    def finish(self, run: Run, step: Step, plan: Mapping[str, GroupsWork], commits: Sequence[dict[str, Any]]) -> PairsManifest:
        manifest = describe_pairs(list(plan), commits, self.verdicts, self.unscored, run.step_of(Subjects).folder.name)
        looked_at = sum(commit["clips"] for commit in commits)
        assert looked_at == manifest.counts["clip"].written, "a kept clip was not looked at"
        return manifest

    def describe(self, manifest: PairsManifest) -> str:
        left_out = ", ".join(f"{count} {reason}" for reason, count in manifest.counts["clip"].filtered.items())
        made = f"{manifest.pairs} pairs for {manifest.subjects_with_pair} subjects"
        return f"{made} ({left_out})" if left_out else made

    def summarise(self, manifest: PairsManifest) -> dict[str, Any]:
        return {"pairs": manifest.pairs}


def describe_pairs(
    parts: Sequence[str], commits: Sequence[Mapping[str, Any]], verdicts: pa.Table, unscored: dict[str, int], subjects: str
) -> PairsManifest:
    """The manifest of parts with these commits, and of the verdicts on all clips.

    Args:
        subjects: folder of the subjects stage.
    """
    decided = zip(_column(verdicts, "clip_id"), _column(verdicts, "reason"), strict=True)
    counted = count_all([Outcome("clip", *each) for each in decided])
    counted["outcomes"] = counted["outcomes"][:_SHOWN_OUTCOMES]
    splits = _column(verdicts, "split", kept=True)
    return PairsManifest(
        parts=tuple(parts),
        made_of=(subjects,),
        **counted,
        **{name: sum(commit[name] for commit in commits) for name in ("pairs", "subjects", "subjects_with_pair")},
        splits=dict(zip(_column(verdicts, "source_group", kept=True), splits, strict=True)),
        clips={split: splits.count(split) for split in ("train", "validation")},
        unscored=unscored,
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


def _load_groups(subjects: Step, parts: Iterable[str], kept: set[str]) -> dict[str, dict[str, int]]:
    """Per source group with a kept clip: the part files that hold it, with the number of its clips in each."""
    groups: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for part in parts:
        table = read_table(subjects.locate(part), ["clip_id", "source_group"])
        for clip_id, group in zip(table["clip_id"].to_pylist(), table["source_group"].to_pylist(), strict=True):
            if clip_id in kept:
                groups[group][part] += 1
    return dict(sorted((group, dict(files)) for group, files in groups.items()))


def _plan_parts(groups: Mapping[str, Mapping[str, int]], subjects: Step, verdicts: str) -> dict[str, GroupsWork]:
    """Whole groups together, about ``_CLIPS_PER_PART`` clips a part."""
    plan: dict[str, GroupsWork] = {}
    names: list[str] = []
    clips, last = 0, next(reversed(list(groups)), None)
    for group, files in groups.items():
        names.append(group)
        clips += sum(files.values())
        if clips >= _CLIPS_PER_PART or group == last:
            parts = sorted({part for name in names for part in groups[name]})
            commits = in_parallel(subjects.load_commit, parts)
            plan[f"pairs-{len(plan):06d}.parquet"] = GroupsWork(
                groups=names,
                files=[subjects.locate(part, commit) for part, commit in zip(parts, commits, strict=True)],
                digest=digest_work(names, verdicts, [(commit or {})["sha256"] for commit in commits]),
            )
            names, clips = [], 0
    return plan
