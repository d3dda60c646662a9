"""A run: the stages in order, each skipped if it is done. What a stage does is written in `refalign.stages`.

A stage's folder is named by everything its output depends on, so a changed setting redoes that stage and those after it.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from refalign.config import RunConfig, make_fingerprint
from refalign.errors import ArtifactError, BackendUnavailable
from refalign.io.storage import check_disk_space, join, kind_of
from refalign.io.untrusted import hide_secrets
from refalign.io.writing import check_store, write_json
from refalign.models.loading import check_local, load_grid
from refalign.pipeline.retries import find_retries, reopen
from refalign.pipeline.signals import arm_signals, heed_signal
from refalign.pipeline.stage import Manifest, Run, Stage
from refalign.pipeline.steps import Step
from refalign.pipeline.summary import FINISHED, Head, Summary, load_head, load_summary, make_summary
from refalign.pipeline.tombstones import check_finished
from refalign.stages import STAGES, Train
from refalign.training.records import UNSENT

AnyStage = Stage[Any]
Stages = Sequence[type[AnyStage]]
_SMALLEST_FREE_BYTES = 2 * 2**30


def check_start(config: RunConfig, output: Path) -> None:
    """Finds what can be known to fail before anything is started.

    Raises:
        GeometryError: the clip's size does not fit the base model's grid.
        ArtifactError: a local model is missing, the disk is nearly full, or a takedown was interrupted.
        ConfigError: the folder of evaluation pictures is missing or holds none, the store of parts cannot be written, or the
            output lies in the input.
    """
    check_finished(output)
    if config.input.path:
        from refalign.curation.sources import check_apart

        check_apart(config.input.path, (output, config.storage.parts))
    for name in ("base", "vision_encoder", "detector", "text_image", "aesthetic", "captioner"):
        if source := getattr(config.models, name):
            check_local(source, f"models.{name}")
    load_grid(config.models).check(config.video.height_px, config.video.width_px, config.video.num_frames)
    if config.evaluation.judge:
        from refalign.evaluation.judging import load_judge

        load_judge(config.evaluation.judge)
    if config.quality.evaluation_references:
        from refalign.curation.selection import list_pictures

        list_pictures(config.quality.evaluation_references)
    if config.training.start_from:
        check_local(f"{config.training.start_from}/export/transformer", "training.start_from")
    if config.storage.parts:
        check_store(config.storage.parts)
    check_disk_space(output, _SMALLEST_FREE_BYTES)


def check_train(config: RunConfig, output: Path) -> None:
    """Finds what the training stage would meet (`refalign.training.check`); the stages before it must be done.

    Raises:
        RefAlignError: the first check that failed.
    """
    output = Path(output).resolve()
    check_start(config, output)
    with ExitStack() as stack:
        loop = Loop(config, output, stack, only=Train.name, stages=STAGES[: STAGES.index(Train)])
        loop.go_through()
        stage = Train()
        loop.start_ray()
        stage.check(loop, loop.make_step(stage))


def run_stages(config: RunConfig, output: Path, *, only: str | None = None) -> Summary:
    """Runs all stages, or one whose predecessors are done, and returns the content of `summary.json`."""
    output = Path(output).resolve()
    check_start(config, output)
    with ExitStack() as stack:
        loop = Loop(config, output, stack, only=only)
        try:
            loop.go_through()
            loop.send_unsent()
        except BaseException as error:
            heed_signal()
            loop.close("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            if loop.summary:
                print(f"summary of this run: {loop.summary['summary']}", file=sys.stderr)
            raise
        loop.close(FINISHED)
    return loop.summary


class Loop(Run):
    """The loop over the stages. Ray and MLflow are only started when a stage has work to do."""

    def __init__(
        self, config: RunConfig, output: Path, stack: ExitStack, *, only: str | None = None, stages: Stages = STAGES
    ) -> None:
        super().__init__(config, output)
        self.stages = [stage for kind in stages if (stage := kind()).is_wanted(config)]
        self.only = only
        self.seconds: dict[str, float] = {}
        self.summary: Summary = {}
        self._stack = stack

    @property
    def fingerprint(self) -> str:
        """Names the run: its settings and the first stage that depends on the data."""
        data = next((self.steps[stage.name] for stage in self.stages if stage.needs_services and stage.name in self.steps), None)
        return make_fingerprint(self.config.model_dump(mode="json", exclude={"cluster", "storage"}), data and data.fingerprint)

    def go_through(self) -> None:
        """All stages in order, up to ``only``."""
        for stage in self.stages:
            self._complete(stage)
            if stage.name == self.only:
                break

    def make_step(self, stage: AnyStage) -> Step:
        """The stage's folder for the present settings and input."""
        inputs = stage.find_inputs(self)
        store = self.config.storage.parts if stage.parts_in_store else None
        self.steps[stage.name] = Step.make(self.output, stage.name, *inputs.settings, store=store, recipe=inputs.recipe)
        return self.steps[stage.name]

    def _complete(self, stage: AnyStage) -> None:
        step = self.make_step(stage)
        is_due = self.only in (None, stage.name)
        files = stage.list_files() if is_due else None
        if files is not None and (names := find_retries(step, files)):
            print(f"{stage.name}: {len(names)} parts had faults that may have passed; they are made again", flush=True)
            reopen(step, names)
        manifest = self._load(stage, step)
        if manifest is not None:
            print(f"{stage.name}: done before, skipped ({step.folder})", flush=True)
        elif not is_due and stage.needs_services:
            raise ArtifactError(f"{step.folder}: not finished; run pipelines/{stage.name}.py with the same settings first.")
        else:
            manifest = self._perform(stage, step)
        self.manifests[stage.name] = manifest
        if self.tracker is not None and stage.needs_services:
            self._log(stage)
        stage.accept(self, manifest)

    def _load(self, stage: AnyStage, step: Step) -> Manifest | None:
        if (manifest := step.read_manifest(stage.manifest)) is None:
            return None
        if step.store and kind_of(join(step.location, "parts")) != "folder":
            print(f"{stage.name}: its parts are gone from {step.location}", flush=True)
        elif stage.is_still_there(self, manifest):
            return manifest
        step.discard_manifest()
        return None

    def _perform(self, stage: AnyStage, step: Step) -> Manifest:
        with step.lease():  # first: a folder that another process holds is refused before anything is started
            if stage.needs_services:
                self._open_services()
            print(f"{stage.name}: started ({step.folder})", flush=True)
            began = time.monotonic()
            manifest = self._load(stage, step)  # another process may have finished it meanwhile
            if manifest is None:
                manifest = stage.perform(self, step)
                step.commit(manifest.model_dump(mode="json"))
        self.seconds[stage.name] = round(time.monotonic() - began, 1)
        print(f"{stage.name}: {stage.describe(manifest)} in {self.seconds[stage.name]} s", flush=True)
        return manifest

    def start_ray(self) -> None:
        """Joins or starts the cluster that workers run on."""
        from refalign.pipeline.ray_data import connect

        self._stack.enter_context(connect(self.config.cluster))
        arm_signals()

    def _open_tracker(self) -> None:
        from refalign.tracking.run import TrackedRun

        sections = {stage.name: stage.sections for stage in self.stages}
        self.tracker = TrackedRun.open(self.config, output=self.output, fingerprint=self.fingerprint, sections=sections)

    def _open_services(self) -> None:
        """Ray and MLflow, side by side: both take many seconds to start."""
        if self.tracker is not None:
            return
        from refalign.tracking.client import check_server, make_tracking_uri, warm_mlflow

        began = time.monotonic()
        check_server(make_tracking_uri(self.config.tracking.uri, self.output))
        warm_mlflow()
        self.start_ray()
        self._open_tracker()
        self.seconds["start-up"] = round(time.monotonic() - began, 1)
        for stage in self.stages:
            if stage.name in self.manifests and stage.needs_services:
                self._log(stage)  # done by an earlier attempt, or for another run

    def send_unsent(self) -> None:
        """Sends what MLflow did not take of an earlier training, if nothing else was left to do."""
        waiting = [each for each in self.stages if each.name in self.steps and (self.steps[each.name].folder / UNSENT).exists()]
        if self.tracker is not None or not waiting:
            return
        try:
            self._open_tracker()
            for stage in waiting:
                self._log(stage)
                print(f"{stage.name}: sent the metrics that MLflow lacked", flush=True)
        except BackendUnavailable as error:
            self.tracker = None
            print(f"metrics wait: {error}", file=sys.stderr, flush=True)

    def _log(self, stage: AnyStage) -> None:
        """Sends a finished stage to its MLflow run and ends that; a second call adds nothing."""
        step, manifest = self.steps[stage.name], self.manifests[stage.name]
        self.tracker.log_totals(step, manifest.model_dump(mode="json"), self.seconds.get(stage.name))
        stage.log(self, step, manifest)
        self.tracker.finish_child(stage.name)

    def close(self, status: str) -> None:
        """Writes summary and report, and ends the MLflow run. A run in which nothing is new leaves all as it is."""
        known = load_head(self.output) or Head()
        is_same = known.name == self.fingerprint
        if self.tracker is None and is_same and self.steps.keys() <= known.folders.keys():
            self.summary = load_summary(self.output) or {}
        elif any(stage.needs_services and stage.name in self.manifests for stage in self.stages):
            self.summary = self._write_summary(status, known.seconds if is_same else {})
        if self.tracker is not None:
            tracker, self.tracker = self.tracker, None
            for name in ("report", "curation_report"):
                if name in self.summary:
                    tracker.log_file(None, Path(self.summary[name]))
            tracker.finish(status)

    def _write_summary(self, status: str, seconds: dict[str, float]) -> Summary:
        from refalign.evaluation.report import make_report
        from refalign.evaluation.report.curation import make_curation_report
        from refalign.pipeline.clean import choose_place
        from refalign.tracking.model_card import load_note

        said = [stage.summarise(self.manifests[stage.name]) for stage in self.stages if stage.name in self.manifests]
        summary = make_summary(self.config, self.output, self.manifests, said, {**seconds, **self.seconds})
        summary |= {
            "story": self.fingerprint,
            "status": status,
            "ended": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": hide_secrets(shlex.join(["uv", "run", *sys.argv])),
            "folders": {name: step.folder.name for name, step in self.steps.items()},
            "untrained": load_note(self.config.models.base),
        }
        place = choose_place(self.output, summary)
        summary["summary"] = str(place / "summary.json")
        summary["report"] = str(make_report(summary, output=place, steps=self.steps))
        if curation := make_curation_report(summary, output=place, steps=self.steps):
            summary["curation_report"] = str(curation)
        write_json(place / "summary.json", summary)
        return summary
