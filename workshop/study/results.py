"""Results of jobs: one JSON each, and what is averaged over their clips."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from workshop.judging.clips import OPTIONS

Result = dict[str, Any]
Clip = dict[str, Any]
SCORES = ("fidelity", "confusion", "copy_paste", "action", "text", "chance")
"""Of one clip, as `run.rate_clip` makes them."""


def load_result(path: Path) -> dict[str, Any] | None:
    """A finished result, or None."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and record.get("complete") is True else None


def load_results(folder: Path) -> list[Result]:
    """All finished results, in the order of their names."""
    return [record for path in sorted((folder / "results").glob("*.json")) if (record := load_result(path)) is not None]


def find_clips(result: Result, step: int | None = None, guidance: float | None = None) -> list[Clip]:
    """Clips of one evaluation: by default the last step at the preset's guidance, which the primary endpoint reads."""
    step = result["budget"]["steps"] if step is None else step
    guidance = OPTIONS["reference_guidance_scale"] if guidance is None else guidance
    found = (each for each in result["evaluations"] if (each["step"], each["reference_guidance"]) == (step, guidance))
    return next(found)["records"]


def average(clips: Sequence[Clip], score: str) -> float:
    """Mean of a score over the clips that have it; NaN where none has."""
    values = [clip[score] for clip in clips if clip[score] is not None]
    return float(np.mean(values)) if values else float("nan")


def summarise_job(result: Result) -> dict[str, float]:
    """Every score at the endpoint, for a tracker."""
    values = {name: average(find_clips(result), name) for name in SCORES}
    return {name: value for name, value in values.items() if np.isfinite(value)}
