"""The summary of a run: what `summary.json` holds, and the lines that are printed at the end."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from refalign.config import RunConfig
from refalign.io.untrusted import parse_json_object
from refalign.pipeline.outcomes import Counts, Manifest, Outcome, PartsManifest

REPORTS = ("report.html", "curation_report.html")
"""Names of the pages of an output folder."""
FINISHED = "FINISHED"
Summary = dict[str, Any]
"""Plain values; stages add keys of their own (`refalign.pipeline.stage.Stage.summarise`)."""


class _Model(BaseModel):
    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.name} version {self.version}"


class Head(BaseModel):
    """What a summary says of its run.

    Attributes:
        name: the fingerprint of its settings and input; empty in a summary from before runs had names.
        status: FINISHED, FAILED or KILLED.
        ended: date and time (UTC, ISO 8601), or empty.
        folders: its step folders, by stage.
        seconds: of every stage that did something.
        model: the version that it registered.
    """

    name: str = Field("", alias="story")
    status: str = FINISHED
    ended: str = ""
    folders: dict[str, str] = {}
    seconds: dict[str, float] = {}
    model: _Model | None = None


def make_summary(
    config: RunConfig,
    output: Path,
    manifests: Mapping[str, Manifest],
    said: Iterable[Mapping[str, object]],
    seconds: Mapping[str, float],
) -> Summary:
    """What came of every stage so far. Stages that did not run are absent.

    Asserts that planned = written + filtered + quarantined at every level.

    Args:
        said: what each stage adds (`refalign.pipeline.stage.Stage.summarise`).
    """
    summary: Summary = {"output": str(output), "config": config.model_dump(mode="json"), "seconds": seconds}
    counts: dict[str, Counts] = {}
    outcomes: list[Outcome] = []
    filtered: Counter[str] = Counter()
    quarantined: Counter[str] = Counter()
    for name, manifest in manifests.items():
        if isinstance(manifest, PartsManifest) and manifest.counts:
            counts |= {f"{name}.{level}": count for level, count in manifest.counts.items()}
            outcomes += manifest.outcomes
            coarsest = manifest.counts[max(manifest.counts)]  # videos if there are some, not their clips too
            filtered.update(coarsest.filtered)
            quarantined.update(coarsest.quarantined)
    for where, count in counts.items():
        lost = count.planned - count.written - sum(count.filtered.values()) - sum(count.quarantined.values())
        assert lost == 0, f"{where}: {lost} are unaccounted for"
    summary["counts"] = {where: count.model_dump() for where, count in counts.items()}
    summary["outcomes"] = [asdict(each) for each in outcomes]
    summary |= {"filtered": dict(filtered), "quarantined": dict(quarantined)}
    for each in said:
        summary |= each
    return summary


def load_summary(output: Path) -> Summary | None:
    """The last summary written to an output folder; None if there is none or it is damaged."""
    try:
        return parse_json_object((output / "summary.json").read_text())
    except (FileNotFoundError, ValueError):
        return None


def load_head(output: Path) -> Head | None:
    """The same, as far as it is about the run."""
    try:
        return None if (summary := load_summary(output)) is None else Head.model_validate(summary)
    except ValidationError:
        return None


def print_ending(summary: Summary) -> None:
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
        prompt, tracking = shlex.quote(model["example"]["prompt"]), shlex.quote(model["tracking_uri"])
        example = f"--tracking {tracking} {references} --prompt {prompt} --output out.mp4"
        print(f"generate  uv run pipelines/generate.py --model {uri} {example}")
        # MLflow's job runners, some twenty processes, are of no use here.
        mlflow_ui = "MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false uv run mlflow ui --workers 1"
        print(f"runs      {mlflow_ui} --backend-store-uri {tracking}")
    if untrained := summary.get("untrained"):
        print(f"note      {untrained}")
