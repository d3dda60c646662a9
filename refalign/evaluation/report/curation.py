"""``curation_report.html``: what curation kept and left out, with examples, scores and pictures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from refalign.evaluation.report.charts import Chart, draw_histogram
from refalign.evaluation.report.page import TEMPLATES, Sheets
from refalign.io.storage import read_table
from refalign.io.tables import CLIP_SCHEMA, PAIR_SCHEMA, SUBJECT
from refalign.io.writing import write_bytes
from refalign.pipeline.steps import Step

FILE_NAME = "curation_report.html"
_MAX_SUBJECTS, _MAX_PAIRS = 60, 30
_MAX_SCORED = 100_000  # rows in a histogram


def make_curation_report(summary: Mapping[str, Any], *, output: Path, steps: Mapping[str, Step]) -> Path | None:
    """Writes ``<output>/curation_report.html`` and returns its path; None if the subjects step has not finished.

    Args:
        summary: what ``summary.json`` holds.
        steps: the steps by name; unfinished ones may be among them.
    """
    finished = {name: step for name, step in steps.items() if step.load_manifest() is not None}
    if "subjects" not in finished:
        return None
    subjects = finished["subjects"]
    struck = defaultdict(list)
    for outcome in summary.get("outcomes") or []:
        struck[outcome["reason"]].append(outcome)
    page = TEMPLATES.get_template("curation.html").render(
        summary=summary,
        manifest=subjects.load_manifest(),
        reasons=sorted(struck.items(), key=lambda item: -len(item[1])),
        histograms=_draw_histograms(finished),
        subjects=list(islice((each for row in _iter_rows(subjects, ["subjects"]) for each in row["subjects"]), _MAX_SUBJECTS)),
        pairs=_find_pairs(subjects, finished["pairs"]) if "pairs" in finished else [],
        shards=Sheets.load(finished.get("shards")),
    )
    path = output / FILE_NAME
    write_bytes(path, page.encode())
    return path


def _iter_rows(step: Step, columns: list[str]) -> Iterator[dict[str, Any]]:
    """Columns of all rows of a finished step; one part is in memory at a time."""
    for part in (step.load_manifest() or {}).get("parts", []):
        yield from read_table(step.locate(part), columns).to_pylist()


def _draw_histograms(steps: Mapping[str, Step]) -> list[Chart]:
    """One for each score of clips, subjects and pairs; none for a score that was never computed."""
    of_clips, of_subjects = ([field.name for field in kind if pa.types.is_float32(field.type)] for kind in (CLIP_SCHEMA, SUBJECT))
    values = defaultdict(list)
    for row in islice(_iter_rows(steps["subjects"], [*of_clips, "subjects"]), _MAX_SCORED):
        for name in of_clips:
            values[f"clip: {name}"].append(row[name])
        for subject in row["subjects"]:
            for name in of_subjects:
                values[f"subject: {name}"].append(subject[name])
    if "pairs" in steps:
        rows = islice(_iter_rows(steps["pairs"], ["similarity"]), _MAX_SCORED)
        values["pair: similarity"] = [row["similarity"] for row in rows]
    drawn = (draw_histogram(name.replace("_", " "), numbers) for name, numbers in values.items())
    return [chart for chart in drawn if chart]


class ShownPair(NamedTuple):
    """Pictures (PNG) of a subject and of its reference from another clip."""

    similarity: float
    crops: list[bytes]


def _find_pairs(subjects: Step, pairs: Step) -> list[ShownPair]:
    """The first pairs whose pictures are there."""
    found = list(islice(_iter_rows(pairs, PAIR_SCHEMA.names), _MAX_PAIRS))
    names = {pair[key] for pair in found for key in ("subject_id", "reference_subject_id")}
    clips = {pair[key] for pair in found for key in ("clip_id", "reference_clip_id")}
    crops: dict[str, bytes] = {}
    for row in _iter_rows(subjects, ["clip_id", "subjects"]):
        if len(crops) == len(names):
            break
        if row["clip_id"] in clips:
            crops |= {each["subject_id"]: each["crop_png"] for each in row["subjects"] if each["subject_id"] in names}
    sides = [(pair["similarity"], pair["subject_id"], pair["reference_subject_id"]) for pair in found]
    return [ShownPair(similarity, [crops[one], crops[other]]) for similarity, one, other in sides if {one, other} <= crops.keys()]
