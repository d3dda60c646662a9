"""What ``pipelines/register.py promote | ask | rollback | list`` do, and print.

A challenger is compared with the champion on the challenger's own prompts and seeds. Without a champion it is compared with the
base model, whose videos are part of its evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from pydantic import TypeAdapter

from refalign.config import RunConfig, make_fingerprint
from refalign.errors import ArtifactError, ConfigError, NotPromoted
from refalign.evaluation.blind import Question, export_questions, read_votes
from refalign.evaluation.gate import GateScores, decide
from refalign.evaluation.results import SampleRecord, VideoScores
from refalign.evaluation.worker import EvaluateWorker, Model, VideoWork, name_video
from refalign.pipeline.ray_data import complete_parts
from refalign.pipeline.steps import Step
from refalign.pipeline.summary import load_summary
from refalign.tracking.client import make_tracking_uri
from refalign.tracking.promotion import CHAMPION, find_version, list_versions, promote, record_decision, rollback
from refalign.tracking.registry import digest_weights, resolve_model

_SAMPLES = TypeAdapter(list[SampleRecord])


class Contest:
    """The model that a run registered (the challenger), and the one that it is compared with.

    Attributes:
        step, samples: the evaluation of the challenger.
        name, version: of the challenger.
        champion: version of the champion; None: the base model.
        comparison: an id, to which votes refer.

    Raises:
        ArtifactError: the run is not finished.
    """

    def __init__(self, config: RunConfig, output: Path) -> None:
        folders = (load_summary(output) or {}).get("folders", {})
        steps = {name: Step.open(output / folder) for name, folder in folders.items()}
        evaluated, registered = (steps[name].load_manifest() if name in steps else None for name in ("evaluate", "register"))
        if evaluated is None or registered is None:
            raise ArtifactError(f"{output}: no registered model; finish pipelines/full.py with this output first.")
        self.step, self.samples = steps["evaluate"], _SAMPLES.validate_python(evaluated["samples"])
        self.name, self.version = str(registered["name"]), str(registered["version"])
        self.uri = make_tracking_uri(config.tracking.uri, output)
        self.champion = find_version(self.uri, self.name, CHAMPION)
        self.comparison = make_fingerprint("blind", self.step.fingerprint, self.champion, config.seed)

    def find_champion(self) -> Path | None:
        """The champion's folder."""
        return resolve_model(f"models:/{self.name}/{self.champion}", self.uri) if self.champion else None


def run_promote(config: RunConfig, output: Path) -> None:
    """Asks the gate about the model of a finished run, records the decision, and promotes the model if it passed.

    Raises:
        NotPromoted: the champion stays.
        ConfigError: the version is champion already.
        ArtifactError: the run is not finished, another version became champion meanwhile, or the votes are about another
            comparison.
    """
    contest, gate, votes = Contest(config, output), config.evaluation.gate, None
    name, version = contest.name, contest.version
    if contest.champion == version:
        raise ConfigError(f"{name}: version {version} is champion already.")
    before, after = ({each.key: each.scores[label] for each in contest.samples} for label in ("before", "after"))
    if model := contest.find_champion():
        before = score_champion(config, contest.step, contest.samples, model)
    old, new = ({key: _to_gate(scores) for key, scores in each.items()} for each in (before, after))
    if gate.votes is not None:
        votes = read_votes(Path(gate.votes).expanduser(), contest.comparison, list(after))
    decision = decide(old, new, gate, seed=config.seed, votes=votes)
    evidence = {**asdict(decision), "champion_scores": old, "challenger_scores": new}
    record_decision(contest.uri, name, version, decision=evidence, champion=contest.champion)
    if decision.passed:
        promote(contest.uri, name, version, expected=contest.champion)
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
        ArtifactError: the run is not finished.
    """
    contest = Contest(config, output)
    step, others = contest.step, {each.key: contest.step.folder / each.videos["before"] for each in contest.samples}
    if model := contest.find_champion():
        score_champion(config, step, contest.samples, model)
        others = {key: _champion_step(step, model).parts_folder / name_video(CHAMPION, key) for key in others}
    questions = [
        Question(
            key=each.key,
            prompt=each.prompt,
            references=tuple((step.folder / reference.file).read_bytes() for reference in each.references),
            champion=others[each.key].read_bytes(),
            challenger=(step.folder / each.videos["after"]).read_bytes(),
        )
        for each in contest.samples
    ]
    table = export_questions(output / "ask" / contest.comparison, contest.comparison, questions)
    print(f"{len(questions)} questions: {table}; its column answer takes left, right or same")
    print("then: pipelines/register.py promote --set evaluation.gate.votes=<the table with answers, or a folder of them>")


def run_rollback(config: RunConfig, output: Path) -> None:
    """Gives the alias back to the champion before."""
    name = config.tracking.model_name
    before, now = rollback(make_tracking_uri(config.tracking.uri, output), name)
    print(f"{name}: version {now} is champion again, version {before} is not")


def run_list(config: RunConfig, output: Path) -> None:
    """Prints every version with its aliases and what the gate said."""
    for each in list_versions(make_tracking_uri(config.tracking.uri, output), config.tracking.model_name):
        aliases = ", ".join(each.aliases) or "-"
        print(f"{each.version:>4}  {aliases:22} shards {each.digest[:12] or '?':12}  {each.gate}: {each.reason}".rstrip(": "))


def score_champion(config: RunConfig, step: Step, samples: Sequence[SampleRecord], model: Path) -> dict[str, VideoScores]:
    """Scores by prompt of another model's videos of the same prompts. The videos are made once per model.

    Args:
        step: the challenger's evaluate step.
    """
    mine, plan = _champion_step(step, model), {}
    for each in samples:
        pictures = each.pictures.below(step.parts_folder)  # parts of the run's own evaluation
        plan[name_video(CHAMPION, each.key)] = VideoWork(CHAMPION, Model(str(model)), each.prompt, each.seed, pictures)
    with mine.lease():
        commits = complete_parts(mine, plan, EvaluateWorker, config, label="champion")
        mine.commit({"folder": str(mine.parts_folder), "model": str(model)})
    return {each.key: VideoScores.model_validate(commits[name_video(CHAMPION, each.key)]["scores"]) for each in samples}


def _champion_step(step: Step, model: Path) -> Step:
    return Step.make(step.folder.parent, "evaluate", "champion", digest_weights(model), step.fingerprint)


def _to_gate(scores: VideoScores) -> GateScores:
    """Confusion is how often another sample's reference fits the video better than its own; a tie counts half."""
    confusion = None if scores.own_above_other is None else 1 - scores.own_above_other
    return {"fidelity": scores.fidelity, "confusion": confusion, "copy_paste": scores.copy_paste}
