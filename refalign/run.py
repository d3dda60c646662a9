"""The story: videos -> subjects -> pairs -> shards -> train -> evaluate -> register, each step skipped where it is done.

A step's folder is named by everything its output depends on, so a changed setting redoes that step and those after it.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from refalign.cli import arm_signals, heed_signal
from refalign.config import RunConfig, make_fingerprint
from refalign.errors import ArtifactError, BackendUnavailable, DataError
from refalign.io.storage import check_disk_space, join, kind_of
from refalign.io.untrusted import hide_secrets
from refalign.io.writing import check_store
from refalign.models.detector_files import check_detector
from refalign.models.loading import ENCODERS, check_local, identify_model, load_grid
from refalign.pipeline.retries import find_retries, reopen
from refalign.pipeline.steps import Step, write_json
from refalign.pipeline.summary import describe_step, explain_no_clip
from refalign.pipeline.tombstones import check_finished, load_tombstones
from refalign.training.earlier import KNOBS, describe_earlier, find_earlier, go_on_from
from refalign.training.records import FILE_NAME, UNSENT, read_records

STEPS = ("subjects", "pairs", "shards", "train", "evaluate", "register")
_IN_STORE = {"subjects", "pairs", "shards"}
"""Steps whose parts go to ``storage.parts``."""
_SMALLEST_FREE_BYTES = 2 * 2**30


def check_train(config: RunConfig, output: Path) -> dict[str, Any]:
    """Finds out what the training step would meet (`refalign.training.check`); the steps before it must be done.

    Raises:
        RefAlignError: the first check that failed.
    """
    output = Path(output).resolve()
    check_start(config, output)
    with ExitStack() as stack:
        story = Story(config, output, stack, "train", check=True)
        story.run()
    return story.manifests["train"]


def run_story(config: RunConfig, output: Path, *, only: str | None = None) -> dict[str, Any]:
    """Runs the story, or one step of it whose predecessors are done, and returns the summary that `summary.json` holds.

    Raises:
        RefAlignError: one line; what was finished stays finished.
    """
    output = Path(output).resolve()
    check_start(config, output)
    with ExitStack() as stack:
        story = Story(config, output, stack, only)
        try:
            story.run()
        except BaseException as error:
            heed_signal()
            story.close("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            if story.summary:
                print(f"summary of this run: {story.summary['summary']}", file=sys.stderr)
            raise
        story.close("FINISHED")
    return story.summary


def check_start(config: RunConfig, output: Path) -> None:
    """What can be known to fail before anything is started.

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
        if getattr(config.models, name):
            check_local(getattr(config.models, name), f"models.{name}")
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


class Story:
    """One run of the story: its steps, their manifests, and what is only opened when a step has work to do."""

    def __init__(self, config: RunConfig, output: Path, stack: ExitStack, only: str | None, *, check: bool = False) -> None:
        self.config, self.output, self.only, self.check = config, output, only, check
        self.steps: dict[str, Step] = {}
        self.manifests: dict[str, dict[str, Any]] = {}
        self.seconds: dict[str, float] = {}
        self.fingerprint = ""
        self.summary: dict[str, Any] = {}
        self._locations: dict[str, str] = {}
        self._stack = stack
        self._tracker: Any = None

    def run(self) -> None:
        """All steps in order, up to ``only``."""
        for name in STEPS:
            getattr(self, f"_{name}")()
            if name == self.only:
                break
        self._send_unsent()

    def _subjects(self) -> None:
        from refalign.curation.launch import find_locations, plan_subjects, run_subjects

        config = self.config
        plan, planned, identity = plan_subjects(config, config.input.path or self._draw_world(), load_tombstones(self.output))
        needs_detector = any(not work["annotation_at"] for part in plan.values() for work in part)
        if needs_detector:
            check_detector(config.models.detector, needs_masks=config.curation.crop == "mask")
        self.fingerprint = make_fingerprint(config.model_dump(mode="json", exclude={"cluster", "storage"}), identity)
        models = config.models
        used = [identify_model(models.vision_encoder, models.vision_encoder_revision), identify_model(models.detector)]
        optional = ((models.text_image, models.text_image_revision), (models.aesthetic, None))
        optional += ((models.captioner, models.captioner_revision),) if config.curation.caption != "source" else ()
        used += [identify_model(source, revision) if source else "" for source, revision in optional]
        settings = config.curation.model_dump(exclude={"max_quarantine_fraction", "max_worker_deaths"})
        recipe = (settings, config.video, models.encoder_dtype, *used)
        step = self._make_step("subjects", identity, *recipe, recipe=recipe)
        self._locations = find_locations(plan)
        self._try_again(step, find_locations(plan, "name"))
        manifest = self._complete(step, lambda: run_subjects(config, step, plan, planned))
        if not manifest["clips"]:
            raise DataError("NO_SUBJECT", explain_no_clip(manifest, config, needs_detector=needs_detector))

    def _pairs(self) -> None:
        from refalign.curation.pairs import run_pairs

        quality = self.config.quality.model_dump(exclude={"evaluation_references"})
        pictures = self.config.quality.evaluation_references
        shown = identify_model(pictures) if pictures else ""
        step = self._make_step("pairs", self.config.pairs, quality, shown, self.steps["subjects"].fingerprint)
        self._complete(step, lambda: run_pairs(self.config, step, self.steps["subjects"]))

    def _shards(self) -> None:
        from refalign.shards.launch import run_shards

        models = self.config.models
        frozen = identify_model(models.base, models.base_revision, parts=ENCODERS)
        encoders = (models.encoder_dtype, models.max_text_tokens, frozen)
        recipe = (self.config.shards, *encoders, self.steps["subjects"].recipe)
        step = self._make_step("shards", self.config.shards, *encoders, self.steps["pairs"].fingerprint, recipe=recipe)
        self._try_again(step, {})
        made_of = self.steps["subjects"], self.steps["pairs"]
        self._complete(step, lambda: run_shards(self.config, step, *made_of, self._locations))

    def _train(self) -> None:
        config = self.config
        settings = config.training.model_dump(mode="json", exclude=set(KNOBS))
        base = identify_model(config.models.base, config.models.base_revision, parts=("transformer",))
        data = (self.manifests["shards"]["digest"], self.steps["shards"].fingerprint, base)
        if config.training.start_from:
            data += (identify_model(config.training.start_from),)
        step = self._make_step("train", settings, config.objective, config.seed, *data)
        if self.check:
            self.manifests["train"] = self._check_train(step)
            return

        def work() -> dict[str, Any]:
            from refalign.training.launch import run_training

            self._consider_earlier(step)
            self.tracker.log_dataset(
                "train", name="shards", folder=self.steps["shards"].folder, digest=self.manifests["shards"]["digest"]
            )
            return run_training(
                config,
                step=step,
                shards=self.steps["shards"].folder,
                tracking_uri=self.tracker.uri,
                run_id=self.tracker.child("train"),
            )

        self._complete(step, work)

    def _consider_earlier(self, step: Step) -> None:
        """Says of another training in this output how it differs, or goes on from it where that changes nothing."""
        if any((step.folder / "checkpoints").glob("step-*/state.json")):
            return
        found = find_earlier(step.folder, self.config, self.steps["shards"].folder)
        if same := next((each for each in found if each.is_beginning), None):
            go_on_from(same, step.folder)
            print(f"train: goes on from step {same.steps} of {same.folder.name}, whose steps are the same", flush=True)
        elif found:
            print(f"train: {describe_earlier(found[0])}", flush=True)

    def _check_train(self, step: Step) -> dict[str, Any]:
        from refalign.pipeline.ray_data import connect
        from refalign.tracking.client import make_tracking_uri
        from refalign.training.check import check_training

        self._stack.enter_context(connect(self.config.cluster))
        arm_signals()
        uri = make_tracking_uri(self.config.tracking.uri, self.output)
        return check_training(self.config, step=step, shards=self.steps["shards"].folder, tracking_uri=uri)

    def _evaluate(self) -> None:
        from refalign.evaluation.launch import run_evaluation

        settings = self.config.evaluation.describe_videos()
        step = self._make_step("evaluate", settings, self.config.seed, self.steps["train"].fingerprint)
        self._complete(step, lambda: run_evaluation(self.config, step=step, steps=self.steps))

    def _register(self) -> None:
        step = self._make_step("register", self.config.tracking, self.steps["evaluate"].fingerprint)
        self._ask_registry(step)

        def work() -> dict[str, Any]:
            from refalign.tracking.registry import run_register

            return run_register(self.config, step=step, steps=self.steps, manifests=self.manifests, tracker=self.tracker)

        self._complete(step, work)

    def _ask_registry(self, step: Step) -> None:
        """A version that was deleted in MLflow is not done, whatever the manifest says."""
        if (manifest := step.load_manifest()) is None:
            return
        from refalign.tracking.client import make_tracking_uri
        from refalign.tracking.registry import has_version

        uri = make_tracking_uri(self.config.tracking.uri, self.output)
        try:
            there = has_version(uri, manifest["name"], manifest["version"])
        except BackendUnavailable as error:
            print(f"register: not checked, the manifest is trusted ({error})", flush=True)
            return
        if not there:
            print(f"register: {manifest['name']} version {manifest['version']} is gone from the registry", flush=True)
            step.discard_manifest()

    def _draw_world(self) -> Path:
        settings = self.config.input
        step = self._make_step("world", settings.world_videos, settings.world_seed, settings.world_split)

        def work() -> dict[str, Any]:
            from refalign.toy.videos import write_world

            world = {"num_videos": settings.world_videos, "seed": settings.world_seed, "split": settings.world_split}
            write_world(step.folder / "videos", **world)
            return step.commit({"videos": settings.world_videos})

        self._complete(step, work)
        return step.folder / "videos"

    def _make_step(self, name: str, *settings: Any, recipe: Sequence[Any] = ()) -> Step:
        store = self.config.storage.parts if name in _IN_STORE else None
        self.steps[name] = Step.make(self.output, name, *settings, store=store, recipe=recipe)
        return self.steps[name]

    def _try_again(self, step: Step, locations: dict[str, str]) -> None:
        """Reopens parts with faults that may have passed since, or whose faulty files have changed."""
        if self.only not in (None, step.name):
            return
        if names := find_retries(step, locations):
            print(f"{step.name}: {len(names)} parts had faults that may have passed; they are made again", flush=True)
            reopen(step, names)

    def _complete(self, step: Step, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The step's manifest: as it stands, or made now."""
        manifest = step.load_manifest()
        if manifest is not None and step.store and kind_of(join(step.location, "parts")) != "folder":
            print(f"{step.name}: its parts are gone from {step.location}", flush=True)
            step.discard_manifest()
            manifest = None
        if manifest is not None:
            print(f"{step.name}: done before, skipped ({step.folder})", flush=True)
        elif self.only not in (None, step.name) and step.name != "world":
            raise ArtifactError(f"{step.folder}: not finished; run pipelines/{step.name}.py with the same settings first.")
        else:
            manifest = self._perform(step, work)
        self.manifests[step.name] = manifest
        if self._tracker is not None and step.name != "world":
            self._log(step)
        return manifest

    def _perform(self, step: Step, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        with step.lease():  # first: a folder that another process holds is told before anything is started
            if step.name != "world":
                self._open_services()
            print(f"{step.name}: started ({step.folder})", flush=True)
            began = time.monotonic()
            manifest = step.load_manifest() or work()
        self.seconds[step.name] = round(time.monotonic() - began, 1)
        print(f"{step.name}: {describe_step(step.name, manifest)} in {self.seconds[step.name]} s", flush=True)
        return manifest

    @property
    def tracker(self) -> Any:
        """The MLflow run of this story."""
        assert self._tracker is not None, "opened before the first step that has work to do"
        return self._tracker

    def _open_services(self) -> None:
        """Ray and MLflow, side by side: both take many seconds to start, and a story with nothing to do needs neither."""
        if self._tracker is not None:
            return
        from refalign.pipeline.ray_data import connect
        from refalign.tracking.client import check_server, make_tracking_uri, warm_mlflow
        from refalign.tracking.run import StoryRun

        began = time.monotonic()
        check_server(make_tracking_uri(self.config.tracking.uri, self.output))
        warm_mlflow()
        self._stack.enter_context(connect(self.config.cluster))
        arm_signals()
        self._tracker = StoryRun.open(self.config, output=self.output, fingerprint=self.fingerprint)
        self.seconds["start-up"] = round(time.monotonic() - began, 1)
        for name in self.manifests.keys() & self.steps.keys():
            if name != "world":
                self._log(self.steps[name])  # done by an earlier attempt, or for another story

    def _send_unsent(self) -> None:
        """Sends what MLflow did not take of an earlier training, where nothing else was left to do."""
        if self._tracker is not None or not any((step.folder / UNSENT).exists() for step in self.steps.values()):
            return
        from refalign.tracking.run import StoryRun

        try:
            self._tracker = StoryRun.open(self.config, output=self.output, fingerprint=self.fingerprint)
            for step in self.steps.values():
                if (step.folder / UNSENT).exists():
                    self._log(step)
                    print(f"{step.name}: sent the metrics that MLflow lacked", flush=True)
        except BackendUnavailable as error:
            self._tracker = None
            print(f"metrics wait: {error}", file=sys.stderr, flush=True)

    def _log(self, step: Step) -> None:
        from refalign.tracking.story import log_step

        if step.name == "train":
            self.tracker.log_records(step.name, read_records(step.folder / FILE_NAME))
            (step.folder / UNSENT).unlink(missing_ok=True)
        log_step(self.tracker, step, self.manifests[step.name], self.seconds.get(step.name))

    def close(self, status: str) -> None:
        """Writes summary and report, and ends the MLflow run. A story in which nothing is new leaves all as it is."""
        from refalign.pipeline.summary import load_summary

        known = load_summary(self.output) or {}
        is_told = known.get("story") == self.fingerprint and self.steps.keys() <= known["folders"].keys()
        if self._tracker is None and is_told:
            self.summary = known
        elif "subjects" in self.manifests:
            self.summary = self._write_summary(status, known.get("seconds", {}) if known.get("story") == self.fingerprint else {})
        if self._tracker is not None:
            tracker, self._tracker = self._tracker, None
            if self.summary:
                for name in ("report", "curation_report"):
                    if name in self.summary:
                        tracker.log_file(None, Path(self.summary[name]))
            tracker.finish(status)

    def _write_summary(self, status: str, seconds: dict[str, float]) -> dict[str, Any]:
        from refalign.evaluation.report import make_report
        from refalign.evaluation.report.curation import make_curation_report
        from refalign.pipeline.clean import choose_place
        from refalign.pipeline.summary import make_summary
        from refalign.tracking.model_card import load_note

        summary = make_summary(self.config, self.output, self.manifests, {**seconds, **self.seconds})
        summary |= {"story": self.fingerprint, "status": status, "ended": datetime.now(UTC).isoformat(timespec="seconds")}
        summary["command"] = hide_secrets(shlex.join(["uv", "run", *sys.argv]))
        summary["folders"] = {name: step.folder.name for name, step in self.steps.items()}
        summary["untrained"] = load_note(self.config.models.base)
        place = choose_place(self.output, summary)
        summary["summary"] = str(place / "summary.json")
        summary["report"] = str(make_report(summary, output=place, steps=self.steps))
        if curation := make_curation_report(summary, output=place, steps=self.steps):
            summary["curation_report"] = str(curation)
        write_json(place / "summary.json", summary)
        return summary
