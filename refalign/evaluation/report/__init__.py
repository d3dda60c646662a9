"""One HTML file that tells what a run did: open it anywhere, it needs no network and no other file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from refalign.evaluation.report import html, sections, separability
from refalign.pipeline.steps import Step, write_bytes

_STORY = ("subjects", "pairs", "shards", "train", "evaluate", "register")
# Videos that are compared start together; who asked for less motion starts them by hand.
_SCRIPT = """
const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
for (const row of document.querySelectorAll(".row")) {
  const videos = [...row.querySelectorAll("video")];
  if (calm) for (const video of videos) { video.removeAttribute("autoplay"); video.pause(); }
  for (const video of videos) video.addEventListener("play", () => {
    for (const other of videos) if (other !== video && other.paused) { other.currentTime = video.currentTime; other.play(); }
  });
}
"""


def make_report(summary: Mapping[str, Any], *, output: Path, steps: Mapping[str, Step]) -> Path:
    """Writes ``<output>/report.html`` and returns its path. Steps that did not run leave their sections out.

    Args:
        summary: what ``summary.json`` holds.
        steps: the steps by name, for pictures, curves and videos; unfinished ones may be among them.
    """
    finished = {name: step for name, step in steps.items() if step.load_manifest() is not None}
    page = make_page(summary, finished)
    path = Path(output) / "report.html"
    write_bytes(path, page.encode())
    return path


def make_page(summary: Mapping[str, Any], steps: Mapping[str, Step]) -> str:
    """The whole page. Its policy lets nothing load and nothing run but what is written here."""
    body = (
        _make_head(summary, steps),
        sections.make_samples(summary, steps),
        sections.make_scores(summary),
        separability.make_separability(summary),
        sections.make_training(summary, steps),
        sections.make_data_flow(summary),
        sections.make_sheets(steps),
        sections.make_model(summary),
        sections.make_provenance(summary, steps),
    )
    return html.page("RefAlign run", body, _SCRIPT)


def _make_head(summary: Mapping[str, Any], steps: Mapping[str, Step]) -> str:
    missing = [name for name in _STORY if name not in steps]
    title = "From videos to a reference-to-video model" if not missing else "A run that is not finished"
    notes = [summary["untrained"]] if summary.get("untrained") else []
    if missing:
        notes.append(f"Not done: {', '.join(missing)}. The same command goes on from here.")
    said = "".join(f'<p class="note">{html.text(note)}</p>' for note in notes)
    return f"<h1>{title}</h1>{said}{sections.make_tiles(summary)}"
