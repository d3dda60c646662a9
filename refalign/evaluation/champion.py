"""Challenger against champion on the challenger's own prompts and seeds, and what follows for the registry."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from refalign.config import RunConfig, make_fingerprint
from refalign.errors import ConfigError
from refalign.evaluation.blind import Question, read_votes
from refalign.evaluation.gate import Decision, decide
from refalign.evaluation.launch import EvaluationActor
from refalign.pipeline.ray_data import complete_parts
from refalign.pipeline.steps import Step
from refalign.tracking.promotion import CHAMPION, find_version, promote, record_decision
from refalign.tracking.registry import digest_weights, resolve_model


def run_gate(config: RunConfig, step: Step, evaluated: Mapping[str, Any], registered: Mapping[str, Any], uri: str) -> Decision:
    """Compares the version that a story registered with the champion, records it, and promotes the winner.

    The first champion is compared with the base model, whose videos the evaluation has already.

    Args:
        step: the story's evaluate step.
        evaluated: its manifest.
        registered: manifest of the register step.
        uri: of MLflow.

    Raises:
        ConfigError: the version is champion already.
        ArtifactError: another version became champion meanwhile, or the votes are about another comparison.
    """
    name, version = registered["name"], registered["version"]
    champion = find_version(uri, name, CHAMPION)
    if champion == version:
        raise ConfigError(f"{name}: version {version} is champion already.")
    if champion is None:
        old = {sample["key"]: sample["scores"]["before"] for sample in evaluated["samples"]}
    else:
        old = score_champion(config, step, evaluated, resolve_model(f"models:/{name}/{champion}", uri))
    new = {sample["key"]: sample["scores"]["after"] for sample in evaluated["samples"]}
    sides = {"champion": _to_gate(old), "challenger": _to_gate(new)}
    gate, votes = config.evaluation.gate, None
    if gate.votes is not None:
        comparison = name_comparison(config, step, champion)
        votes = read_votes(Path(gate.votes).expanduser(), comparison, [sample["key"] for sample in evaluated["samples"]])
    decision = decide(sides["champion"], sides["challenger"], gate, seed=config.seed, votes=votes)
    evidence = {f"{side}_scores": scores for side, scores in sides.items()}
    record_decision(uri, name, version, decision={**decision.to_record(), **evidence}, champion=champion)
    if decision.passed:
        promote(uri, name, version, expected=champion)
    return decision


def score_champion(config: RunConfig, step: Step, evaluated: Mapping[str, Any], model: Path) -> dict[str, dict[str, Any]]:
    """Scores by prompt of another model's videos of the same prompts; they are made once per model."""
    mine = _champion_step(step, model)
    plan = {
        f"{CHAMPION}-{sample['key']}.mp4": {
            **{name: sample[name] for name in ("prompt", "seed")},
            # The pictures are parts of the story's own evaluation; an absolute name is taken as it is.
            **{whose: [name and str(step.parts_folder / name) for name in names] for whose, names in sample["pictures"].items()},
            "source": str(model),
            "revision": None,
            "label": CHAMPION,
        }
        for sample in evaluated["samples"]
    }
    with mine.lease():
        records = complete_parts(mine, plan, EvaluationActor, config, label="champion")
        mine.commit({"folder": str(mine.parts_folder), "model": str(model)})
    return {sample["key"]: records[f"{CHAMPION}-{sample['key']}.mp4"]["scores"] for sample in evaluated["samples"]}


def name_comparison(config: RunConfig, step: Step, champion: str | None) -> str:
    """The id of a comparison of this evaluation with a champion (None: with the base model)."""
    return make_fingerprint("blind", step.fingerprint, champion, config.seed)


def collect_questions(
    config: RunConfig, step: Step, evaluated: Mapping[str, Any], champion: str | None, uri: str
) -> list[Question]:
    """Both models' videos of every prompt; the champion's are made where they are missing."""
    others = {sample["key"]: step.folder / sample["videos"]["before"] for sample in evaluated["samples"]}
    if champion is not None:
        model = resolve_model(f"models:/{config.tracking.model_name}/{champion}", uri)
        score_champion(config, step, evaluated, model)
        others = {key: _champion_step(step, model).parts_folder / f"{CHAMPION}-{key}.mp4" for key in others}
    return [
        Question(
            key=sample["key"],
            prompt=sample["prompt"],
            references=tuple((step.folder / reference["file"]).read_bytes() for reference in sample["references"]),
            champion=others[sample["key"]].read_bytes(),
            challenger=(step.folder / sample["videos"]["after"]).read_bytes(),
        )
        for sample in evaluated["samples"]
    ]


def _champion_step(step: Step, model: Path) -> Step:
    return Step.make(step.folder.parent, "evaluate", "champion", digest_weights(model), step.fingerprint)


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
