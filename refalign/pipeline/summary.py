"""The summary of a run, as a plain dict, as `summary.json` and as the lines a person reads at the end."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from refalign.config import RunConfig
from refalign.io.untrusted import parse_json_object
from refalign.pipeline.outcomes import Counted, Counts, Outcome

REPORTS = ("report.html", "curation_report.html")
"""Names of the pages of an output folder."""


def make_summary(
    config: RunConfig,
    output: Path,
    manifests: Mapping[str, BaseModel],
    said: Sequence[Mapping[str, Any]],
    seconds: dict[str, float],
) -> dict[str, Any]:
    """What came of every stage so far. Stages that did not run are absent.

    Asserts that planned = written + filtered + quarantined at every level.

    Args:
        said: what each stage adds (`refalign.pipeline.stage.Stage.summarise`).
    """
    summary: dict[str, Any] = {"output": str(output), "config": config.model_dump(mode="json"), "seconds": seconds}
    counts: dict[str, Counts] = {}
    outcomes: list[Outcome] = []
    for name, manifest in manifests.items():
        if isinstance(manifest, Counted):
            counts |= {f"{name}.{level}": count for level, count in manifest.counts.items()}
            outcomes += manifest.outcomes
    for where, count in counts.items():
        lost = count.planned - count.written - sum(count.filtered.values()) - sum(count.quarantined.values())
        assert lost == 0, f"{where}: {lost} are unaccounted for"
    summary["counts"] = {where: count.model_dump() for where, count in counts.items()}
    summary["outcomes"] = [asdict(each) for each in outcomes]
    for kind in ("filtered", "quarantined"):
        levels = [manifest.counts for manifest in manifests.values() if isinstance(manifest, Counted) and manifest.counts]
        coarsest = [getattr(each[max(each)], kind) for each in levels]  # videos where there are some, not their clips too
        summary[kind] = dict(sum((Counter(each) for each in coarsest), Counter()))
    for each in said:
        summary |= each
    return summary


def load_summary(output: Path) -> dict[str, Any] | None:
    """The last summary written to an output folder."""
    try:
        return parse_json_object((output / "summary.json").read_text())
    except (FileNotFoundError, ValueError):
        return None


def print_ending(summary: dict[str, Any]) -> None:
    """Where everything is, and what to do next."""
    print(f"\nsummary   {summary['summary']}")
    if report := summary.get("report"):
        print(f"report    {report}   (open it in a browser: pictures, curves, sample videos)")
    if evaluation := summary.get("evaluation"):
        print(f"videos    {evaluation['folder']}")
    if model := summary.get("model"):
        uri = f"models:/{model['name']}@{model['alias']}"
        print(f"model     {uri} (version {model['version']})")
        references = " ".join(f"--reference {shlex.quote(path)}" for path in model["example"]["references"])
        prompt = shlex.quote(model["example"]["prompt"])
        where = f"--tracking {shlex.quote(model['tracking_uri'])}"
        print(f"generate  uv run pipelines/generate.py --model {uri} {where} {references} --prompt {prompt} --output out.mp4")
        # MLflow's job runners, some twenty processes, are of no use here.
        mlflow_ui = "MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false uv run mlflow ui --workers 1"
        print(f"runs      {mlflow_ui} --backend-store-uri {shlex.quote(model['tracking_uri'])}")
    if untrained := summary.get("untrained"):
        print(f"note      {untrained}")
