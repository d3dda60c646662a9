"""Evaluate: a video per held-out prompt from the model that training started from and from the trained one, with scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from refalign.evaluation.fidelity import MEASURED
from refalign.evaluation.results import SampleRecord, Separability, average_scores
from refalign.evaluation.samples import ChosenSample, choose_samples
from refalign.evaluation.worker import (
    EvaluateWorker,
    Model,
    SeparabilityWork,
    VideoWork,
    name_video,
    plan_videos,
    write_pictures,
)
from refalign.pipeline.stage import Inputs, Manifest, PartStage, Run
from refalign.pipeline.steps import Step
from refalign.stages.shards import Shards
from refalign.stages.subjects import Subjects
from refalign.stages.train import Train
from refalign.training.records import Ends

LABELS = ("before", "after")
"""The model that training started from and the trained one, at the same seeds."""
Work = VideoWork | SeparabilityWork


class EvaluateManifest(Manifest):
    """Videos and their scores; the dictionaries are by label, but ``validation`` is by term of the loss.

    Attributes:
        folder: of the videos.
        held_out: whether the samples are of the validation split.
        scores: averages over the samples; a score that was not measured is absent.
        validation: first and last value of each term in training.
        measured: what the scores mean.
    """

    folder: str
    num_samples: int
    split: str
    held_out: bool
    samples: list[SampleRecord]
    scores: dict[str, dict[str, float]]
    validation: dict[str, Ends]
    separability: dict[str, Separability]
    measured: str


class Evaluate(PartStage[EvaluateManifest, Work]):
    """Both models at the same prompts, references and seeds; every video is a part."""

    name = "evaluate"
    manifest = EvaluateManifest
    sections = ("seed", "evaluation")
    worker = EvaluateWorker

    def find_inputs(self, run: Run) -> Inputs:
        return Inputs((run.config.evaluation.describe_videos(), run.config.seed, run.step_of(Train).fingerprint))

    def plan(self, run: Run, step: Step) -> dict[str, Work]:
        """Raises: ArtifactError: a stage before this one is damaged."""
        config, shards = run.config, run.step_of(Shards).folder
        count = config.evaluation.num_samples
        self.samples, self.split = choose_samples(shards, run.step_of(Subjects).folder, count=count, seed=config.seed)
        for sample in self.samples:
            write_pictures(step, sample)
        trained = str(run.step_of(Train).folder / run.manifest_of(Train).export)
        start = config.training.start_from
        before = Model(config.models.base, config.models.base_revision, start and f"{start}/export")
        models = {"before": before, "after": Model(trained)}
        plan: dict[str, Work] = {**plan_videos(self.samples, models)}
        if config.evaluation.separability_subjects:
            for label, model in models.items():
                plan[f"separability-{label}.json"] = SeparabilityWork(label, model, str(shards), self.split)
        return plan

    def finish(self, run: Run, step: Step, plan: Mapping[str, Work], commits: Sequence[dict[str, Any]]) -> EvaluateManifest:
        made = {commit["part"]: commit for commit in commits}
        samples = [_describe_sample(sample, plan, made) for sample in self.samples]
        return EvaluateManifest(
            folder=str(step.parts_folder),
            num_samples=len(samples),
            split=self.split,
            held_out=self.split == "validation",
            samples=samples,
            scores={label: average_scores(sample.scores[label] for sample in samples) for label in LABELS},
            validation=run.manifest_of(Train).validation,
            separability={each["label"]: each["separability"] for each in commits if each.get("separability")},
            measured=MEASURED,
        )

    def describe(self, manifest: EvaluateManifest) -> str:
        before, after = (manifest.scores.get(label, {}).get("judged") for label in LABELS)
        judged = "" if before is None or after is None else f"; attributes right: {before:.0%} before training, {after:.0%} after"
        return f"{manifest.num_samples} sample videos{judged}"

    def summarise(self, manifest: EvaluateManifest) -> dict[str, Any]:
        return {"evaluation": manifest.model_dump(mode="json")}

    def log(self, run: Run, step: Step, manifest: EvaluateManifest) -> None:
        for path in sorted(step.parts_folder.glob("*.mp4")):
            run.tracker.log_file(self.name, path, "videos")


def _describe_sample(sample: ChosenSample, plan: Mapping[str, Work], made: Mapping[str, dict[str, Any]]) -> SampleRecord:
    names = {label: name_video(label, sample.key) for label in LABELS}
    work = plan[names["after"]]
    assert isinstance(work, VideoWork)
    return SampleRecord(
        key=sample.key,
        prompt=sample.prompt,
        seed=sample.seed,
        references=sample.references,
        videos={label: f"parts/{name}" for label, name in names.items()},
        scores={label: made[name]["scores"] for label, name in names.items()},
        verdicts={label: made[name].get("verdict") for label, name in names.items()},
        pictures=work.pictures,
    )
