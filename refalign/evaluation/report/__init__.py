"""One HTML file about a run. It needs no network and no other file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from refalign.evaluation.report.charts import Chart, draw_groups, draw_lines, smooth
from refalign.evaluation.report.page import TEMPLATES, Sheets
from refalign.evaluation.results import Separability
from refalign.io.writing import write_bytes
from refalign.pipeline.steps import Step
from refalign.training.records import FILE_NAME, read_records

_STEPS = ("subjects", "pairs", "shards", "train", "evaluate", "register")
_TERMS = {
    "flow_matching": "Flow matching: error of the predicted velocity, weighted by noise level",
    "pull": "Pull: cosine distance of reference tokens to the vision encoder's tokens of the same picture",
    "push": "Push: similarity to tokens of other subjects",
    "alignment": "Alignment term as it enters the loss, after gate and weight",
    "total": "Total: what is differentiated",
    "grad_norm": "Gradient norm before clipping",
    "learning_rate": "Learning rate",
}
_QUARTERS = "Flow matching by timestep: quarters of [0, 1000], from the lightest (least noise) to the darkest (most)"
_MEASURES = {
    "retrieval": "Retrieval: share of pictures whose nearest other one shows the same subject",
    "gap": "Gap: mean cosine of pictures of one subject less that of different ones",
    "silhouette": "Silhouette: from -1 (mixed) to 1 (apart)",
}
_FEW_POINTS = 30


def make_report(summary: Mapping[str, Any], *, output: Path, steps: Mapping[str, Step]) -> Path:
    """Writes ``<output>/report.html`` and returns its path. Steps that did not run have no section.

    Args:
        summary: what ``summary.json`` holds.
        steps: by name, for pictures, curves and videos; unfinished ones may be among them.
    """
    finished = {name: step for name, step in steps.items() if step.load_manifest() is not None}
    path = output / "report.html"
    write_bytes(path, make_page(summary, finished).encode())
    return path


def make_page(summary: Mapping[str, Any], steps: Mapping[str, Step]) -> str:
    """The whole page, of finished steps. Its policy lets nothing be loaded and only its own script run."""
    measured = (summary.get("evaluation") or {}).get("separability") or {}
    return TEMPLATES.get_template("report.html").render(
        summary=summary,
        steps=steps,
        missing=[name for name in _STEPS if name not in steps],
        separability=_draw_separability({side: Separability.model_validate(each) for side, each in measured.items() if each}),
        training=_draw_training(read_records(steps["train"].folder / FILE_NAME)) if "train" in steps else [],
        shards=Sheets.load(steps.get("shards")),
    )


def _draw_training(records: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Every recorded term over the steps, of training and of held-out samples at fixed noise."""

    def find(name: str) -> list[tuple[float, float]]:
        return [(record["step"], record[name]) for record in records if isinstance(record.get(name), int | float)]

    begun: dict[str, float] = {}
    for record in records:
        if record["step"] > 0 and "stage" in record:
            begun.setdefault(str(record["stage"]), record["step"])
    stages = [(step, stage) for stage, step in begun.items()][1:]
    drawn = []
    for name, label in _TERMS.items():
        raw = find(name)
        plain = name == "learning_rate" or len(raw) <= _FEW_POINTS
        curves = {"line": raw} if plain else {"raw": raw, "line": smooth(raw)}
        drawn.append(draw_lines(label, {**curves, "held-out": find(f"validation/{name}")}, stages))
    # An average over all noise levels moves with the levels that were drawn.
    quarters = {quarter: smooth(find(f"flow_matching/{quarter}")) for quarter in ("q1", "q2", "q3", "q4")}
    return [chart for chart in (*drawn, draw_lines(_QUARTERS, quarters)) if chart]


def _draw_separability(measured: Mapping[str, Separability]) -> list[Chart]:
    """Curves over blocks, and a picture of one block by side ("before", "after")."""
    sides = {"before": ("held-out", "before training"), "after": ("line", "trained")}
    drawn = []
    for name, label in _MEASURES.items():
        values = {side: [getattr(block, name) for block in each.blocks] for side, each in measured.items()}
        drawn.append(draw_lines(label, {sides[side][0]: [*enumerate(values[side])] for side in sides if side in values}))
    for side, (_, title) in sides.items():
        if each := measured.get(side):
            label = f"{title}, block {each.picture_block}: t-SNE; neighbourhoods mean something, axes and distances do not"
            drawn.append(draw_groups(label, each.points, each.subjects))
    return [chart for chart in drawn if chart]
