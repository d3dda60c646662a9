"""Who is champion: what ``pipelines/register.py promote | ask | rollback | list`` do, and print.

A challenger is compared with the champion on the challenger's own prompts and seeds. The first one is compared with the base
model, whose videos its evaluation has already.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from refalign.config import RunConfig, make_fingerprint
from refalign.errors import ArtifactError, ConfigError, NotPromoted
from refalign.evaluation.blind import Question, export_questions, read_votes
from refalign.evaluation.gate import decide
from refalign.evaluation.worker import EvaluateWorker, VideoWork
from refalign.pipeline.ray_data import complete_parts
from refalign.pipeline.steps import Step
from refalign.pipeline.summary import load_summary
from refalign.tracking.client import make_tracking_uri
from refalign.tracking.promotion import CHAMPION, find_version, list_versions, promote, record_decision, rollback
from refalign.tracking.registry import digest_weights, resolve_model


def run_promote(config: RunConfig, output: Path) -> None:
    """Asks the gate about the model of a finished story, records what it says, and promotes the winner.

    Raises:
        NotPromoted: the champion stays.
        ConfigError: the version is champion already.
        ArtifactError: the story is not finished, another version became champion meanwhile, or the votes are about another
            comparison.
    """
    step, evaluated, name, version = _load_story(output)
    uri = make_tracking_uri(config.tracking.uri, output)
    champion = find_version(uri, name, CHAMPION)
    if champion == version:
        raise ConfigError(f"{name}: version {version} is champion already.")
    before, after = ({each["key"]: each["scores"][label] for each in evaluated["samples"]} for label in ("before", "after"))
    if champion is not None:
        before = score_champion(config, step, evaluated, resolve_model(f"models:/{name}/{champion}", uri))
    old, new, gate, votes = _to_gate(before), _to_gate(after), config.evaluation.gate, None
    if gate.votes is not None:
        votes = read_votes(Path(gate.votes).expanduser(), name_comparison(config, step, champion), list(after))
    decision = decide(old, new, gate, seed=config.seed, votes=votes)
    evidence = {"champion_scores": old, "challenger_scores": new}
    record_decision(uri, name, version, decision=decision.to_record() | evidence, champion=champion)
    if decision.passed:
        promote(uri, name, version, expected=champion)
    for each in decision.comparisons:
        interval = f"[{each.low:+.3f}, {each.high:+.3f}]"
        print(f"  {each.score:12} {each.gain:+.3f} {interval} over {each.prompts} prompts, p {each.p_value:.4f}")
    if votes:
        interval = f"[{votes.low:.3f}, {votes.high:.3f}]"
        print(f"  {'votes':12}  {votes.share:.3f} {interval} of {votes.raters} people over {votes.prompts} prompts")
    if not decision.passed:
        raise NotPromoted(f"{name} version {version} stays challenger: {decision.reason}.")
    print(f"{name} version {version} is champion: {decision.reason}")


def run_ask(config: RunConfig, output: Path) -> None:
    """Exports pairs of videos, for people to choose between the challenger and the champion.

    Raises:
        ArtifactError: the story is not finished.
    """
    step, evaluated, name, _ = _load_story(output)
    uri = make_tracking_uri(config.tracking.uri, output)
    champion = find_version(uri, name, CHAMPION)
    others = {sample["key"]: step.folder / sample["videos"]["before"] for sample in evaluated["samples"]}
    if champion is not None:
        model = resolve_model(f"models:/{name}/{champion}", uri)
        score_champion(config, step, evaluated, model)
        others = {key: _champion_step(step, model).parts_folder / _video_name(key) for key in others}
    questions = [
        Question(
            key=sample["key"],
            prompt=sample["prompt"],
            references=tuple((step.folder / reference["file"]).read_bytes() for reference in sample["references"]),
            champion=others[sample["key"]].read_bytes(),
            challenger=(step.folder / sample["videos"]["after"]).read_bytes(),
        )
        for sample in evaluated["samples"]
    ]
    comparison = name_comparison(config, step, champion)
    table = export_questions(output / "ask" / comparison, comparison, questions)
    print(f"{len(questions)} questions: {table}; its column answer takes left, right or same")
    print("then: pipelines/register.py promote --set evaluation.gate.votes=<the table with answers, or a folder of them>")


def run_rollback(config: RunConfig, output: Path) -> None:
    """Gives the alias back to the champion before."""
    name = config.tracking.model_name
    before, now = rollback(make_tracking_uri(config.tracking.uri, output), name)
    print(f"{name}: version {now} is champion again, version {before} is not")


def run_list(config: RunConfig, output: Path) -> None:
    """Every version with its aliases and what the gate said."""
    for each in list_versions(make_tracking_uri(config.tracking.uri, output), config.tracking.model_name):
        aliases = ", ".join(each.aliases) or "-"
        print(f"{each.version:>4}  {aliases:22} shards {each.digest[:12] or '?':12}  {each.gate}: {each.reason}".rstrip(": "))


def score_champion(config: RunConfig, step: Step, evaluated: Mapping[str, Any], model: Path) -> dict[str, dict[str, Any]]:
    """Scores by prompt of another model's videos of the same prompts; they are made once per model.

    Args:
        step: the challenger's evaluate step, with ``evaluated`` its manifest.
    """
    mine = _champion_step(step, model)
    plan = {
        _video_name(sample["key"]): VideoWork(
            label=CHAMPION,
            source=str(model),
            revision=None,
            prompt=sample["prompt"],
            seed=sample["seed"],
            # The pictures are parts of the run's own evaluation; an absolute name is taken as it is.
            **{whose: [name and str(step.parts_folder / name) for name in names] for whose, names in sample["pictures"].items()},
        )
        for sample in evaluated["samples"]
    }
    with mine.lease():
        records = complete_parts(mine, plan, EvaluateWorker, config, label="champion")
        mine.commit({"folder": str(mine.parts_folder), "model": str(model)})
    return {sample["key"]: records[_video_name(sample["key"])]["scores"] for sample in evaluated["samples"]}


def name_comparison(config: RunConfig, step: Step, champion: str | None) -> str:
    """The id of a comparison of this evaluation with a champion (None: with the base model)."""
    return make_fingerprint("blind", step.fingerprint, champion, config.seed)


def _load_story(output: Path) -> tuple[Step, dict[str, Any], str, str]:
    """The evaluate step and its manifest, and name and version of the model that was registered after it."""
    folders = (load_summary(output) or {}).get("folders", {})
    steps = {name: Step.open(output / folder) for name, folder in folders.items()}
    evaluated, registered = (steps[name].load_manifest() if name in steps else None for name in ("evaluate", "register"))
    if evaluated is None or registered is None:
        raise ArtifactError(f"{output}: no registered model; finish pipelines/full.py with this output first.")
    return steps["evaluate"], evaluated, registered["name"], registered["version"]


def _champion_step(step: Step, model: Path) -> Step:
    return Step.make(step.folder.parent, "evaluate", "champion", digest_weights(model), step.fingerprint)


def _video_name(key: str) -> str:
    return f"{CHAMPION}-{key}.mp4"


def _to_gate(scores: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    """The evaluation's scores under the gate's names; confusion is how often a stranger's reference fits as well or better."""
    return {
        key: {
            "fidelity": each["fidelity"],
            "confusion": None if each["own_above_other"] is None else 1 - each["own_above_other"],
            "copy_paste": each.get("copy_paste"),
        }
        for key, each in scores.items()
    }
