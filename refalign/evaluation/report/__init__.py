"""One HTML file that tells what a run did: open it anywhere, it needs no network and no other file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from refalign.evaluation.report.curves import draw_separability, draw_training
from refalign.evaluation.report.page import TEMPLATES, Sheets
from refalign.io.writing import write_bytes
from refalign.pipeline.steps import Step
from refalign.training.records import FILE_NAME, read_records

_STORY = ("subjects", "pairs", "shards", "train", "evaluate", "register")


def make_report(summary: Mapping[str, Any], *, output: Path, steps: Mapping[str, Step]) -> Path:
    """Writes ``<output>/report.html`` and returns its path. Steps that did not run leave their sections out.

    Args:
        summary: what ``summary.json`` holds.
        steps: the steps by name, for pictures, curves and videos; unfinished ones may be among them.
    """
    finished = {name: step for name, step in steps.items() if step.load_manifest() is not None}
    path = Path(output) / "report.html"
    write_bytes(path, make_page(summary, finished).encode())
    return path


def make_page(summary: Mapping[str, Any], steps: Mapping[str, Step]) -> str:
    """The whole page, of finished steps. Its policy lets nothing load and nothing run but what is written there."""
    measured = (summary.get("evaluation") or {}).get("separability") or {}
    return TEMPLATES.get_template("report.html").render(
        summary=summary,
        steps=steps,
        missing=[name for name in _STORY if name not in steps],
        separability=draw_separability(measured),
        training=draw_training(read_records(steps["train"].folder / FILE_NAME)) if "train" in steps else [],
        shards=Sheets.load(steps.get("shards")),
    )
