"""What the judge said of each subject: a row a subject and model, a cell an attribute, right or wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from refalign.evaluation.judging import Verdict
from refalign.evaluation.report import html

_LABELS = {"before": "base model", "after": "trained"}


def make_verdicts(verdicts: Mapping[str, Verdict | None]) -> str:
    """The table of one sample; empty where no judge was asked or none could say anything."""
    told = {label: verdict for label, verdict in verdicts.items() if verdict}
    if not told:
        return ""
    names = list(dict.fromkeys(name for verdict in told.values() for subject in verdict for name in subject["attributes"]))
    rows = [
        (f"{html.text(subject['name'])}, {_LABELS.get(label, html.text(label))}", *_make_cells(subject["attributes"], names))
        for number in range(max(map(len, told.values())))
        for label, verdict in told.items()
        for subject in verdict[number : number + 1]
    ]
    head = ("", *(name.replace("_", " ") for name in names))
    return f'<div class="verdict">{html.table(head, rows, numbers_from=len(head))}</div>'


def _make_cells(attributes: Mapping[str, Mapping[str, Any]], names: list[str]) -> list[str]:
    cells = []
    for answer in map(attributes.get, names):
        if answer is None:  # this subject was not asked for it
            cells.append("")
            continue
        wanted, shown = html.text(answer["wanted"]), answer["shown"]
        if shown == answer["wanted"]:
            cells.append(f'<span class="right" title="as wanted">\u2713 {wanted}</span>')
        else:
            seen = "unclear" if shown is None else html.text(shown)
            cells.append(f'<span class="wrong" title="wanted: {wanted}">\u2717 {seen}</span>')
    return cells
