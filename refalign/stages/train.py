"""Train: shards in, the fine-tuned Transformer out."""

from __future__ import annotations

from typing import Any

from refalign.models.loading import identify_model
from refalign.pipeline.stage import Inputs, Run, Stage
from refalign.pipeline.steps import Step
from refalign.stages.shards import Shards
from refalign.training.earlier import decisive_settings, describe_earlier, find_earlier, go_on_from
from refalign.training.launch import TrainManifest, run_training
from refalign.training.records import FILE_NAME, UNSENT, read_records

_SHOWN_TERMS = ("flow_matching", "pull")


class Train(Stage[TrainManifest]):
    """Fine-tunes the Transformer with the RA loss; checkpoints in its folder say how far it is."""

    name = "train"
    manifest = TrainManifest
    sections = ("seed", "video", "objective", "training")

    def find_inputs(self, run: Run) -> Inputs:
        config, start = run.config, run.config.training.start_from
        settings = decisive_settings(config.training.model_dump(mode="json"))
        base = identify_model(config.models.base, config.models.base_revision, parts=("transformer",))
        data = (run.manifest_of(Shards).digest, run.step_of(Shards).fingerprint, base)
        return Inputs((settings, config.objective, config.seed, *data, *([identify_model(start)] if start else [])))

    def perform(self, run: Run, step: Step) -> TrainManifest:
        shards = run.step_of(Shards).folder
        self._consider_earlier(run, step)
        run.tracker.log_dataset(self.name, name="shards", folder=shards, digest=run.manifest_of(Shards).digest)
        uri, run_id = run.tracker.uri, run.tracker.child(self.name)
        return run_training(run.config, step=step, shards=shards, tracking_uri=uri, run_id=run_id)

    def check(self, run: Run, step: Step) -> None:
        """Finds out whether `perform` would succeed, and prints it (`refalign.training.check`).

        Raises:
            RefAlignError: the first check that failed.
        """
        from refalign.training.check import check_training

        check_training(run.config, step=step, shards=run.step_of(Shards).folder)

    def describe(self, manifest: TrainManifest) -> str:
        measured = manifest.validation or manifest.loss
        terms = ", ".join(f"{term} {measured[term]['first']:.3f} -> {measured[term]['last']:.3f}" for term in _SHOWN_TERMS)
        return f"{manifest.steps} steps; {'held-out' if manifest.validation else 'training'} {terms}"

    def summarise(self, manifest: TrainManifest) -> dict[str, Any]:
        return {"train": manifest.model_dump(mode="json")}

    def log(self, run: Run, step: Step, manifest: TrainManifest) -> None:
        run.tracker.log_records(self.name, read_records(step.folder / FILE_NAME))
        (step.folder / UNSENT).unlink(missing_ok=True)

    def _consider_earlier(self, run: Run, step: Step) -> None:
        """Resumes from another training in this output if its steps are the same; otherwise says how it differs."""
        if any((step.folder / "checkpoints").glob("step-*/state.json")):
            return
        found = find_earlier(step.folder, run.config, run.step_of(Shards).folder)
        if same := next((each for each in found if each.is_beginning), None):
            go_on_from(same, step.folder)
            print(f"train: goes on from step {same.steps} of {same.folder.name}, whose steps are the same", flush=True)
        elif found:
            print(f"train: {describe_earlier(found[0])}", flush=True)
