"""Results of jobs: one JSON each, and the scores of their clips."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from pydantic import BaseModel, ValidationError

from refalign.toy.identities import HIDDEN_ATTRIBUTES, SPOKEN_ATTRIBUTES
from workshop.judging.benchmark import OPTIONS, Record
from workshop.judging.confusion import CONFUSED
from workshop.study.arms import Budget, Job

PRESET_GUIDANCE = OPTIONS["reference_guidance_scale"]
Score = Literal["fidelity", "confusion", "copy_paste", "action", "text", "chance"]
SCORES: tuple[Score, ...] = get_args(Score)


class Clip(BaseModel):
    """The scores of one clip; None if there is nothing to score."""

    key: str
    fidelity: float | None
    chance: float | None  # fidelity to another case's looks
    text: float | None
    action: float | None
    confusion: float | None
    copy_paste: float | None


class Evaluation(BaseModel):
    """The clips of one checkpoint at one reference guidance scale."""

    step: int
    reference_guidance: float
    records: list[Clip]


class Result(BaseModel):
    """A finished job."""

    job: Job
    budget: Budget
    primary: str
    shard_digest: str
    objective: dict[str, Any]
    step_s: float
    validation: dict[str, float]
    machine: dict[str, Any]
    transformer_sha256: str  # of the last weights before averaging
    separability: dict[str, list[dict[str, float]]]  # of each block, "before" and "after"; empty with too few references
    costs: dict[str, int | float]  # train_s, evaluate_s, clips
    evaluations: list[Evaluation]
    complete: Literal[True]

    def find_clips(self, step: int | None = None, guidance: float = PRESET_GUIDANCE) -> list[Clip]:
        """Clips of one evaluation: by default the last step at the preset's guidance, which the primary endpoint reads."""
        wanted = (self.budget.steps if step is None else step, guidance)
        return next(each.records for each in self.evaluations if (each.step, each.reference_guidance) == wanted)


def load_result(path: Path) -> Result | None:
    """A finished result; None if there is none, or a part of one."""
    try:
        return Result.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def load_results(folder: Path) -> list[Result]:
    """All finished results, in the order of their names."""
    return [result for path in sorted((folder / "results").glob("*.json")) if (result := load_result(path))]


def rate_clip(record: Record) -> Clip:
    """The scores of one clip from the benchmark's record of it."""
    right = record["right"]
    named = [each for each, is_named in zip(right, record["named"], strict=True) if is_named]
    fates = record["fates"] if record["subjects"] > 1 else []
    return Clip(
        key=record["key"],
        fidelity=_mean(each[name] for each in right for name in HIDDEN_ATTRIBUTES),
        chance=_mean(each[name] for each in record["chance"] for name in HIDDEN_ATTRIBUTES),
        text=_mean(each[name] for each in named for name in SPOKEN_ATTRIBUTES),
        action=_mean(each["action"] for each in right),
        confusion=_mean(fate in CONFUSED for fate in fates),
        copy_paste=_mean(record["copy_paste"]),
    )


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def average(clips: Sequence[Clip], score: Score) -> float:
    """Mean of a score over the clips that have it; NaN if none has."""
    mean = _mean(getattr(clip, score) for clip in clips)
    return float("nan") if mean is None else mean
