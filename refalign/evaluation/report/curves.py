"""What the run's report draws: every term of the loss over the steps, and how far subjects are told apart over the blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from refalign.evaluation.report.charts import Chart, draw_groups, draw_lines, smooth

_TERMS = {
    "flow_matching": "Flow matching: error of the predicted velocity, weighted by noise level",
    "pull": "Pull: cosine distance of reference tokens to the vision encoder's tokens of the same picture",
    "push": "Push: similarity to tokens of other subjects",
    "alignment": "Alignment term as it enters the loss, after gate and weight",
    "total": "Total: what is differentiated",
    "grad_norm": "Gradient norm before clipping",
    "learning_rate": "Learning rate",
}
_MEASURES = {
    "retrieval": "Retrieval: share of pictures whose nearest other one shows the same subject",
    "gap": "Gap: mean cosine of pictures of one subject less that of different ones",
    "silhouette": "Silhouette: from -1 (mixed) to 1 (apart)",
}
_FEW_POINTS = 30
_QUARTERS = ("q1", "q2", "q3", "q4")


def draw_training(records: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Every term over the steps and over held-out samples at fixed noise; none where nothing was recorded."""

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
    # An average over all levels of noise moves with which of them were drawn.
    label = "Flow matching by timestep: quarters of [0, 1000], from the lightest (least noise) to the darkest (most)"
    drawn.append(draw_lines(label, {quarter: smooth(find(f"flow_matching/{quarter}")) for quarter in _QUARTERS}))
    return [chart for chart in drawn if chart]


def draw_separability(measured: Mapping[str, Any]) -> list[Chart]:
    """Curves over blocks and a picture of one block; none where it was not measured.

    Args:
        measured: by side ("before", "after"), what `refalign.evaluation.separability` found.
    """
    sides = {side: (kind, each) for side, kind in (("before", "held-out"), ("after", "line")) if (each := measured.get(side))}
    names = {"before": "base model", "after": "trained"}
    drawn = [
        draw_lines(label, {kind: [(n, block[name]) for n, block in enumerate(each["blocks"])] for kind, each in sides.values()})
        for name, label in _MEASURES.items()
    ]
    for side, (_, each) in sides.items():
        label = f"{names[side]}, block {each['picture_block']}: t-SNE; neighbourhoods mean something, axes and distances do not"
        drawn.append(draw_groups(label, each["points"], each["subjects"]))
    return [chart for chart in drawn if chart]
