"""Pairs: which clips are used, and which subject of one clip is seen again in another clip of the same source group."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel

from refalign.config import RunConfig
from refalign.curation.matching import match_subjects
from refalign.curation.selection import choose_clips, load_crops, load_verdicts
from refalign.io.storage import in_parallel
from refalign.io.tables import PAIR_SCHEMA, VERDICT_SCHEMA, VERDICTS_PART, check_table, is_scene
from refalign.models.loading import identify_model
from refalign.pipeline.outcomes import Outcome
from refalign.pipeline.reuse import digest_work
from refalign.pipeline.stage import Inputs, PartsManifest, PartStage, Run, count_all
from refalign.pipeline.steps import Step
from refalign.stages.subjects import Subjects

_CLIPS_PER_PART = 20_000
_SHOWN_OUTCOMES = 1000
"""Filtered clips that the manifest names; `clips.parquet` names all."""


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


class PairsCommit(BaseModel):
    """What a part records: rows and pairs, the kept clips that were looked at, and their subjects."""

    rows: int
    pairs: int
    subjects_with_pair: int
    clips: int
    subjects: int
    work: tuple[str, ...]


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


class _Crop(NamedTuple):
    clip_id: str
    subject_id: str
    embedding: np.ndarray


class PairsWorker:
    """Matches the groups of one part; holds no model."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    def make_part(self, step: Step, name: str, work: GroupsWork) -> dict[str, object]:
        """Reads the embeddings of the part's groups, writes PAIR rows and returns the commit."""
        kept, groups = set(_column(load_verdicts(step), "clip_id", kept=True)), set(work.groups)
        # By group, and subjects apart from scenes: a subject is never paired with a scene.
        alike: dict[tuple[str, bool], list[_Crop]] = defaultdict(list)
        clips = 0
        for crops in map(load_crops, work.files):
            takes = [clip_id in kept and group in groups for clip_id, group in zip(crops.clip_ids, crops.source_groups)]
            clips += sum(takes)
            for clip, subject_id, embedding in zip(crops.clips.tolist(), crops.subject_ids, crops.embeddings, strict=True):
                if takes[clip]:
                    key = (crops.source_groups[clip], is_scene(subject_id))
                    alike[key].append(_Crop(crops.clip_ids[clip], subject_id, embedding))
        pairs = pa.concat_tables([PAIR_SCHEMA.empty_table(), *(self._match(alike[key]) for key in sorted(alike))])
        commit = PairsCommit(
            rows=len(pairs),
            pairs=len(pairs),
            subjects_with_pair=len(set(pairs["subject_id"].to_pylist())),
            clips=clips,
            subjects=sum(map(len, alike.values())),
            work=(work.digest,),
        )
        return step.write_part(name, lambda path: _write(path, pairs, PAIR_SCHEMA) or commit.model_dump(mode="json"))

    def _match(self, crops: list[_Crop]) -> pa.Table:
        crops = sorted(crops, key=lambda crop: (crop.clip_id, crop.subject_id))
        clip_ids = pa.array([crop.clip_id for crop in crops], pa.string())
        subject_ids = pa.array([crop.subject_id for crop in crops], pa.string())
        _, clips = np.unique(clip_ids.to_numpy(zero_copy_only=False), return_inverse=True)
        subjects, references, values = match_subjects(np.stack([crop.embedding for crop in crops]), clips, self.config.pairs)
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
        subjects, parts = run.step_of(Subjects), run.manifest_of(Subjects).parts
        files = dict(zip(parts, in_parallel(subjects.locate, parts), strict=True))
        chosen, self.unscored = choose_clips(run.config, step, files)
        self.verdicts = _assign_clips(chosen, run.config.pairs.validation_fraction)
        rows = {"rows": len(self.verdicts)}
        commit = step.write_part(VERDICTS_PART, lambda path: _write(path, self.verdicts, VERDICT_SCHEMA) or rows)
        groups: dict[str, Counter[str]] = defaultdict(Counter)
        for group, part in zip(*(_column(chosen, name, kept=True) for name in ("source_group", "part")), strict=True):
            groups[group][part] += 1
        return _plan_parts(dict(sorted(groups.items())), files, subjects, commit["sha256"])

    def digest(self, work: GroupsWork) -> list[str]:
        return [work.digest]

    def finish(
        self, run: Run, step: Step, plan: Mapping[str, GroupsWork], commits: Sequence[Mapping[str, object]]
    ) -> PairsManifest:
        made = [PairsCommit.model_validate(commit) for commit in commits]
        decided = zip(_column(self.verdicts, "clip_id"), _column(self.verdicts, "reason"), strict=True)
        counted = count_all([Outcome("clip", *each) for each in decided])
        groups, splits = (_column(self.verdicts, name, kept=True) for name in ("source_group", "split"))
        assert sum(commit.clips for commit in made) == counted["counts"]["clip"].written, "a kept clip was not looked at"
        return PairsManifest(
            parts=tuple(plan),
            made_of=(run.step_of(Subjects).folder.name,),
            counts=counted["counts"],
            outcomes=counted["outcomes"][:_SHOWN_OUTCOMES],
            pairs=sum(commit.pairs for commit in made),
            subjects=sum(commit.subjects for commit in made),
            subjects_with_pair=sum(commit.subjects_with_pair for commit in made),
            splits=dict(zip(groups, splits, strict=True)),
            clips={split: splits.count(split) for split in ("train", "validation")},
            unscored=self.unscored,
        )

    def describe(self, manifest: PairsManifest) -> str:
        left_out = ", ".join(f"{count} {reason}" for reason, count in manifest.counts["clip"].filtered.items())
        made = f"{manifest.pairs} pairs for {manifest.subjects_with_pair} subjects"
        return f"{made} ({left_out})" if left_out else made

    def summarise(self, manifest: PairsManifest) -> dict[str, object]:
        return {"pairs": manifest.pairs}


def assign_splits(groups: Iterable[str], validation_fraction: float) -> dict[str, str]:
    """``train`` or ``validation`` for every source group, by its name alone, so that new data moves no old group.

    Where no group falls below the fraction, and there are at least two, the one nearest to it is held out.
    """
    position = {group: int(hashlib.sha256(group.encode()).hexdigest()[:8], 16) / 16**8 for group in groups}
    held_out = {group for group, value in position.items() if value < validation_fraction}
    if validation_fraction and not held_out and len(position) > 1:
        held_out = {min(position, key=lambda group: position[group])}
    return {group: "validation" if group in held_out else "train" for group in sorted(position)}


def _write(path: Path, table: pa.Table, schema: pa.Schema) -> None:
    pq.write_table(check_table(table.cast(schema), schema, path.name), path)


def _column(verdicts: pa.Table, name: str, *, kept: bool = False) -> list[str]:
    table = verdicts.filter(pc.field("reason") == "") if kept else verdicts
    return table[name].to_pylist()


def _assign_clips(chosen: pa.Table, validation_fraction: float) -> pa.Table:
    """`refalign.io.tables.VERDICT_SCHEMA`: the split of every clip that is kept."""
    splits = assign_splits(set(_column(chosen, "source_group", kept=True)), validation_fraction)
    rows = zip(_column(chosen, "source_group"), _column(chosen, "reason"))
    assigned = pa.array(["" if reason else splits[group] for group, reason in rows], pa.string())
    return chosen.append_column("split", assigned).select(VERDICT_SCHEMA.names)


def _plan_parts(
    groups: Mapping[str, Counter[str]], files: Mapping[str, str], subjects: Step, verdicts: str
) -> dict[str, GroupsWork]:
    """Whole groups together, about ``_CLIPS_PER_PART`` clips a part.

    Args:
        groups: the clips of each group by the part of CLIP rows that holds them; ``files`` says where it lies.
        verdicts: digest of the verdicts.
    """
    cut: list[list[str]] = []
    clips = _CLIPS_PER_PART
    for group, parts in groups.items():
        if clips >= _CLIPS_PER_PART:
            cut.append([])
            clips = 0
        cut[-1].append(group)
        clips += parts.total()
    plan: dict[str, GroupsWork] = {}
    for names in cut:
        parts = sorted({part for name in names for part in groups[name]})
        digests = [(commit or {})["sha256"] for commit in in_parallel(subjects.load_commit, parts)]
        plan[f"pairs-{len(plan):06d}.parquet"] = GroupsWork(
            groups=names, files=[files[part] for part in parts], digest=digest_work(names, verdicts, digests)
        )
    return plan
