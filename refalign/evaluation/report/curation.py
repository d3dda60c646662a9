"""``curation_report.html``: what curation kept and left out, with examples, scores and pictures to look at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from refalign.errors import DataError
from refalign.evaluation.report import html, sections
from refalign.evaluation.report.charts import make_histogram
from refalign.io.images import decode_image, encode_png, make_contact_sheet
from refalign.io.storage import read_table
from refalign.io.tables import CLIP_SCHEMA, PAIR_SCHEMA, SUBJECT
from refalign.pipeline.steps import Step, write_bytes

FILE_NAME = "curation_report.html"
_THUMBNAIL_PX = 96
_MAX_SUBJECTS, _MAX_PAIRS, _MAX_EXAMPLES = 60, 30, 3
_MAX_SCORED = 100_000
"""Rows whose scores are drawn; more would change no histogram that a person can tell apart."""


def make_curation_report(summary: Mapping[str, Any], *, output: Path, steps: Mapping[str, Step]) -> Path | None:
    """Writes ``<output>/curation_report.html`` and returns its path; None where the subjects step has not finished.

    Args:
        summary: what ``summary.json`` holds.
        steps: the steps by name; unfinished ones may be among them.
    """
    finished = {name: step for name, step in steps.items() if step.load_manifest() is not None}
    if "subjects" not in finished:
        return None
    page = html.page(
        "Curation",
        (
            "<h1>What curation made of the videos</h1>",
            sections.make_tiles(summary),
            sections.make_data_flow(summary),
            _make_reasons(summary.get("outcomes") or []),
            _make_unusual(summary.get("unusual") or {}),
            _make_terms(finished["subjects"]),
            _make_histograms(finished),
            _make_subjects(finished["subjects"]),
            _make_pairs(finished),
            sections.make_sheets(finished),
        ),
    )
    path = Path(output) / FILE_NAME
    write_bytes(path, page.encode())
    return path


def iter_rows(step: Step, columns: list[str]) -> Iterator[dict[str, Any]]:
    """Some columns of the rows of a finished step, one part at a time."""
    for part in (step.load_manifest() or {}).get("parts", []):
        yield from read_table(step.locate(part), columns).to_pylist()


def _make_reasons(outcomes: list[Mapping[str, Any]]) -> str:
    """Each reason with a few of the items it struck."""
    by_reason: dict[str, list[Mapping[str, Any]]] = {}
    for outcome in outcomes:
        by_reason.setdefault(outcome["reason"], []).append(outcome)
    rows = [
        (html.text(reason), html.count(len(struck)), "<br>".join(html.text(each["message"]) for each in struck[:_MAX_EXAMPLES]))
        for reason, struck in sorted(by_reason.items(), key=lambda item: -len(item[1]))
    ]
    return html.section("Reasons", html.table(("reason", "items", "for example"), rows, numbers_from=3)) if rows else ""


def _make_unusual(unusual: Mapping[str, int]) -> str:
    """Videos that a player shows otherwise than they are stored, or whose frames do not all follow one another."""
    rows = [(html.text(kind), html.count(count)) for kind, count in unusual.items()]
    return html.section("Unusual videos", html.table(("what", "videos"), rows, numbers_from=1)) if rows else ""


def _make_terms(subjects: Step) -> str:
    manifest = subjects.load_manifest() or {}
    rows = [
        (html.text(title), html.text(name), html.count(count))
        for title, counts in (("licence", "licenses"), ("consent", "consents"), ("caption from", "captions"))
        for name, count in manifest.get(counts, {}).items()
    ]
    return html.section("Licences and consent; captions", html.table(("", "says", "clips"), rows, numbers_from=2)) if rows else ""


def _make_histograms(steps: Mapping[str, Step]) -> str:
    """One for each score of clips, subjects and pairs that was computed for any of them."""
    groups: dict[str, list[float]] = {}
    clip_scores = [field.name for field in CLIP_SCHEMA if pa.types.is_float32(field.type)]
    subject_scores = [field.name for field in SUBJECT if pa.types.is_float32(field.type)]
    for row in islice(iter_rows(steps["subjects"], [*clip_scores, "subjects"]), _MAX_SCORED):
        for name in clip_scores:
            groups.setdefault(f"clip: {name}", []).append(row[name])
        for subject in row["subjects"]:
            for name in subject_scores:
                groups.setdefault(f"subject: {name}", []).append(subject[name])
    if "pairs" in steps:
        for row in islice(iter_rows(steps["pairs"], ["similarity"]), _MAX_SCORED):
            groups.setdefault("pair: similarity", []).append(row["similarity"])
    charts = [(name, make_histogram(values, label=name)) for name, values in groups.items()]
    figures = "".join(html.figure(svg, name.replace("_", " ")) for name, svg in charts if svg)
    return html.section("Scores", f'<div class="charts">{figures}</div>') if figures else ""


def _make_subjects(step: Step) -> str:
    """The first subjects, each with what the detector said of it."""
    figures = []
    for row in iter_rows(step, ["subjects"]):
        for subject in row["subjects"]:
            if len(figures) < _MAX_SUBJECTS:
                caption = f"{subject['class_name']}, score {subject['score']:.2f}, sharpness {subject['sharpness']:.0f}"
                figures.append(_make_thumbnail(subject["crop_png"], caption))
        if len(figures) >= _MAX_SUBJECTS:
            break
    gallery = f'<div class="gallery">{"".join(figures)}</div>'
    note = f'<p class="soft">The first {len(figures)} of {(step.load_manifest() or {}).get("subjects", 0):,}.</p>'
    return html.section("Subjects", gallery, note) if figures else ""


def _make_pairs(steps: Mapping[str, Step]) -> str:
    """Some pairs, side by side: a subject, and its reference from another clip."""
    if "pairs" not in steps:
        return ""
    pairs = list(islice(iter_rows(steps["pairs"], PAIR_SCHEMA.names), _MAX_PAIRS))
    wanted = {pair[key] for pair in pairs for key in ("subject_id", "reference_subject_id")}
    clips = {pair[key] for pair in pairs for key in ("clip_id", "reference_clip_id")}
    crops: dict[str, bytes] = {}
    for row in iter_rows(steps["subjects"], ["clip_id", "subjects"]) if wanted else ():
        if row["clip_id"] in clips:
            crops |= {each["subject_id"]: each["crop_png"] for each in row["subjects"] if each["subject_id"] in wanted}
        if len(crops) == len(wanted):
            break
    figures = []
    for pair in pairs:
        sides = [crops.get(pair[key]) for key in ("subject_id", "reference_subject_id")]
        if all(sides):
            pictures = [_fit(side) for side in sides if side]
            figures.append(html.figure(f'<div class="pair">{"".join(pictures)}</div>', f"similarity {pair['similarity']:.3f}"))
    gallery = f'<div class="gallery">{"".join(figures)}</div>'
    return html.section("Pairs: a subject, and the same one in another clip", gallery) if figures else ""


def _make_thumbnail(crop_png: bytes, caption: str) -> str:
    return html.figure(_fit(crop_png), caption)


def _fit(crop_png: bytes) -> str:
    """The crop on white, scaled down; an empty picture where it is damaged."""
    try:
        picture = decode_image(crop_png)
    except DataError:
        return ""
    return html.image(encode_png(make_contact_sheet([[picture]], _THUMBNAIL_PX, gap_px=0)), "image/png", "crop")
