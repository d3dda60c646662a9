"""What ``pipelines/register.py promote | ask | rollback | list`` do, and print."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from refalign.config import RunConfig
from refalign.errors import ArtifactError, NotPromoted
from refalign.pipeline.steps import Step
from refalign.pipeline.summary import load_summary
from refalign.tracking.client import make_tracking_uri


def run_promote(config: RunConfig, output: Path) -> None:
    """Asks the gate about the model of a finished story.

    Raises:
        NotPromoted: the champion stays.
        ArtifactError: the story is not finished, or another promotion won.
    """
    from refalign.evaluation.champion import run_gate

    step, evaluated, registered = _load_story(output)
    decision = run_gate(config, step, evaluated, registered, make_tracking_uri(config.tracking.uri, output))
    for each in decision.comparisons:
        interval = f"[{each.low:+.3f}, {each.high:+.3f}]"
        print(f"  {each.score:12} {each.gain:+.3f} {interval} over {each.prompts} prompts, p {each.p_value:.4f}")
    if votes := decision.votes:
        interval = f"[{votes.low:.3f}, {votes.high:.3f}]"
        print(f"  {'votes':12}  {votes.share:.3f} {interval} of {votes.raters} people over {votes.prompts} prompts")
    if not decision.passed:
        raise NotPromoted(f"{registered['name']} version {registered['version']} stays challenger: {decision.reason}.")
    print(f"{registered['name']} version {registered['version']} is champion: {decision.reason}")


def run_ask(config: RunConfig, output: Path) -> None:
    """Writes the page on which people choose between the challenger and the champion.

    Raises:
        ArtifactError: the story is not finished.
    """
    from refalign.evaluation.champion import collect_questions, name_comparison
    from refalign.evaluation.report.blind import make_blind_page
    from refalign.io.writing import write_bytes
    from refalign.tracking.promotion import CHAMPION, find_version

    step, evaluated, registered = _load_story(output)
    uri = make_tracking_uri(config.tracking.uri, output)
    champion = find_version(uri, registered["name"], CHAMPION)
    comparison = name_comparison(config, step, champion)
    page = make_blind_page(comparison, collect_questions(config, step, evaluated, champion, uri))
    path = output / f"ask-{comparison}.html"
    write_bytes(path, page.encode())
    print(f"{len(evaluated['samples'])} questions: {path}")
    print("then: pipelines/register.py promote --set evaluation.gate.votes=<the saved answers, or a folder of them>")


def _load_story(output: Path) -> tuple[Step, dict[str, Any], dict[str, Any]]:
    """The evaluate step, its manifest and that of the register step."""
    folders = (load_summary(output) or {}).get("folders", {})
    steps = {name: Step.open(output / folder) for name, folder in folders.items()}
    evaluated, registered = (steps[name].load_manifest() if name in steps else None for name in ("evaluate", "register"))
    if evaluated is None or registered is None:
        raise ArtifactError(f"{output}: no registered model; finish pipelines/full.py with this output first.")
    return steps["evaluate"], evaluated, registered


def run_rollback(config: RunConfig, output: Path) -> None:
    """Gives the alias back."""
    from refalign.tracking.promotion import rollback

    name = config.tracking.model_name
    before, now = rollback(make_tracking_uri(config.tracking.uri, output), name)
    print(f"{name}: version {now} is champion again, version {before} is not")


def run_list(config: RunConfig, output: Path) -> None:
    """Every version with its aliases and what the gate said."""
    from refalign.tracking.promotion import list_versions

    for each in list_versions(make_tracking_uri(config.tracking.uri, output), config.tracking.model_name):
        aliases = ", ".join(each["aliases"]) or "-"
        print(
            f"{each['version']:>4}  {aliases:22} shards {each['shards'] or '?':12}  {each['gate']}: {each['reason']}".rstrip(": ")
        )
