"""Evaluate: a video per held-out prompt from the base model and from the trained one, scored and kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from refalign.evaluation.fidelity import MEASURED, average_scores
from refalign.evaluation.samples import ChosenSample, choose_samples
from refalign.evaluation.worker import (
    PICTURES,
    EvaluateWorker,
    SeparabilityWork,
    VideoWork,
    name_separability,
    name_video,
    plan_separability,
    plan_videos,
    write_references,
)
from refalign.pipeline.stage import Inputs, Manifest, PartStage, Run
from refalign.pipeline.steps import Step
from refalign.stages.shards import Shards
from refalign.stages.subjects import Subjects
from refalign.stages.train import Train

LABELS = ("before", "after")
"""The base model and the trained one, at the same seeds."""
Work = VideoWork | SeparabilityWork


class Reference(BaseModel):
    """A reference picture; ``file`` is below the stage's folder."""

    subject_id: str
    class_name: str
    kind: str
    file: str


class SampleRecord(BaseModel):
    """One prompt; what is by label has ``before`` and ``after``.

    Attributes:
        videos: files below the stage's folder.
        verdicts: what the judge said of each video, None without a judge.
        pictures: names of the parts that were compared, see `refalign.evaluation.worker.PICTURES`.
    """

    key: str
    prompt: str
    seed: int
    references: list[Reference]
    videos: dict[str, str]
    scores: dict[str, dict[str, Any]]
    verdicts: dict[str, Any]
    pictures: dict[str, list[str | None]]


class EvaluateManifest(Manifest):
    """What the videos are worth.

    Attributes:
        folder: of the videos.
        held_out: whether the samples are of the validation split.
        scores: averages over the samples, by label.
        validation: first and last value of each loss of the training.
        measured: what the scores mean.
    """

    folder: str
    num_samples: int
    split: str
    held_out: bool
    samples: list[SampleRecord]
    scores: dict[str, dict[str, Any]]
    validation: dict[str, Any]
    separability: dict[str, Any]
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
        pictures = {sample.key: write_references(step, sample) for sample in self.samples}
        trained = str(run.step_of(Train).folder / run.manifest_of(Train).export)
        sources = {"before": (config.models.base, config.models.base_revision), "after": (trained, None)}
        plan: dict[str, Work] = {**plan_videos(self.samples, pictures, sources)}
        if config.evaluation.separability_subjects:
            plan |= plan_separability(sources, shards, self.split)
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
            scores={label: average_scores([sample.scores[label] for sample in samples]) for label in LABELS},
            validation=run.manifest_of(Train).validation,
            separability={
                label: commit["separability"]
                for label in LABELS
                if (commit := made.get(name_separability(label))) and commit["separability"]
            },
            measured=MEASURED,
        )

    def describe(self, manifest: EvaluateManifest) -> str:
        judged = [(manifest.scores.get(label) or {}).get("judged") for label in LABELS]
        made = f"{manifest.num_samples} sample videos"
        return made if None in judged else f"{made}; attributes right: base {judged[0]:.0%}, trained {judged[1]:.0%}"

    def summarise(self, manifest: EvaluateManifest) -> dict[str, Any]:
        return {"evaluation": manifest.model_dump(mode="json")}

    def log(self, run: Run, step: Step, manifest: EvaluateManifest) -> None:
        for path in sorted(step.parts_folder.glob("*.mp4")):
            run.tracker.log_file(self.name, path, "videos")


def _describe_sample(sample: ChosenSample, plan: Mapping[str, Work], made: Mapping[str, dict[str, Any]]) -> SampleRecord:
    names = {label: name_video(label, sample) for label in LABELS}
    work = plan[names["after"]]
    assert isinstance(work, VideoWork)
    references = [
        Reference(subject_id=reference.subject_id, class_name=reference.class_name, kind=reference.kind, file=f"parts/{picture}")
        for reference, picture in zip(sample.references, work.own, strict=True)
    ]
    return SampleRecord(
        key=sample.key,
        prompt=sample.prompt,
        seed=sample.seed,
        references=references,
        videos={label: f"parts/{name}" for label, name in names.items()},
        scores={label: made[name]["scores"] for label, name in names.items()},
        verdicts={label: made[name].get("verdict") for label, name in names.items()},
        pictures={whose: getattr(work, whose) for whose in PICTURES},
    )
