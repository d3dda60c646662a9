"""The report's section on how far the Transformer itself tells subjects apart, before and after training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from refalign.evaluation.report import html
from refalign.evaluation.report.charts import Line, make_chart, make_scatter

_SIDES = {"before": "base model", "after": "trained"}
_MEASURES = {
    "retrieval": "Retrieval: share of pictures whose nearest other one shows the same subject",
    "gap": "Gap: mean cosine of pictures of one subject less that of different ones",
    "silhouette": "Silhouette: from -1 (mixed) to 1 (apart)",
}


def make_separability(summary: Mapping[str, Any]) -> str:
    """Curves over blocks and a picture of one block; empty where it was not measured."""
    told = (summary.get("evaluation") or {}).get("separability") or {}
    sides = {side: told[side] for side in _SIDES if told.get(side)}
    if not sides:
        return ""
    charts = []
    for name, label in _MEASURES.items():
        kinds = {"before": "held-out", "after": "line"}
        lines = [
            Line([(number, block[name]) for number, block in enumerate(each["blocks"])], kinds[side], dots=side == "before")
            for side, each in sides.items()
        ]
        charts.append(html.figure(make_chart(lines, label=label), label))
    for side, each in sides.items():
        label = f"{_SIDES[side]}, block {each['picture_block']}: t-SNE; neighbourhoods mean something, axes and distances do not"
        charts.append(html.figure(make_scatter(each["points"], each["subjects"], label=label), label))
    block = next(iter(sides.values()))["picture_block"]
    rows = [
        (html.text(name.capitalize()), *(html.number(each["blocks"][block].get(name)) for each in sides.values()))
        for name in (*_MEASURES, "chance")
    ]
    subjects = next(iter(sides.values()))["subjects"]
    shown = f"{len(subjects)} pictures of {len(set(subjects))} held-out subjects"
    intro = (
        f"{shown}, each alone beside noise and without text, as the mean of the Transformer's own tokens over the subject. "
        "No projector is involved. Over the blocks: blue trained, orange the base model."
    )
    table = html.table((f"block {block}", *(_SIDES[side] for side in sides)), rows)
    return html.section(
        "Are subjects told apart?",
        f'<p class="soft">{html.text(intro)}</p>',
        table,
        f'<div class="charts">{"".join(charts)}</div>',
    )
