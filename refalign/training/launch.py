"""Starting a training run: under Ray Train, under torchrun, or in this process. All three call `run_rank`.

    run_training(config, step=..., shards=...)                                  Ray Train, the default
    run_training(..., launch=launch_in_process)                                 one rank, here
    torchrun --nproc-per-node 8 -m refalign.training.launch <folder>/launch.json

Whichever starts next resumes from the newest checkpoint in the step's folder. Nothing here imports torch or diffusers into the
driver before the checks have passed.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from refalign.config import RunConfig, describe_problems
from refalign.errors import ArtifactError, NonFiniteLoss, RefAlignError
from refalign.io.untrusted import parse_json_object
from refalign.io.writing import write_json
from refalign.pipeline.stage import Manifest
from refalign.pipeline.steps import Step
from refalign.training.earlier import LAUNCH_FILE
from refalign.training.follower import follow
from refalign.training.records import FILE_NAME, Ends, Trained, read_records, summarize_records

_COLLECTIVE_TIMEOUT_S = 600  # torch's 30 minutes are too long to notice a lost rank; a slow checkpoint takes less than this

R = TypeVar("R")
Notice = Callable[[], bool]


class LaunchSettings(BaseModel):
    """What a rank is told: ``launch.json``. Paths are absolute, because Ray's workers have another working directory."""

    model_config = ConfigDict(frozen=True)

    config: RunConfig
    shards: Path
    folder: Path

    @classmethod
    def load(cls, path: Path) -> LaunchSettings:
        """Reads the file.

        Raises:
            ArtifactError: it is damaged, or has settings that this version does not know.
        """
        try:
            return cls.model_validate(parse_json_object(path.read_bytes()))
        except ValueError as error:
            reason = describe_problems(error) if isinstance(error, ValidationError) else error
            raise ArtifactError(f"{path}: damaged ({reason}); start the run with pipelines/train.py.") from error


RankWork = Callable[[LaunchSettings, Notice | None], R]
"""What a rank does once it is in its group."""


class TrainManifest(Manifest):
    """What a training made; paths are relative to its folder.

    Attributes:
        loss, validation: of each term.
        weights: those in the export, ``average`` or ``last``.
        seconds: of this attempt; ``steps_s`` those of all steps.
        data_wait_fraction: share of the steps' time that ranks waited for data.
        resumed_from: the step from which this attempt resumed, 0 from the start.
    """

    steps: int
    samples: int
    stages: list[str]
    loss: dict[str, Ends]
    validation: dict[str, Ends]
    weights: str
    seconds: float
    steps_s: float
    data_wait_fraction: float
    resumed_from: int | None
    checkpoint: str
    best_checkpoint: str | None
    export: str
    metrics: str
    shard_digest: str


def make_settings(config: RunConfig, shards: Path, folder: Path) -> LaunchSettings:
    """The settings with absolute paths."""
    base = Path(config.models.base).expanduser()
    if base.is_dir():
        models = config.models.model_copy(update={"base": str(base.resolve())})
        config = config.model_copy(update={"models": models})
    return LaunchSettings(config=config, shards=Path(shards).resolve(), folder=Path(folder).resolve())


def train_rank(settings: LaunchSettings, notice: Notice | None) -> Trained:
    """One rank's part of a training."""
    from refalign.training.loop import train

    return train(settings.config, shards=settings.shards, folder=settings.folder, notice=notice)


def run_rank(work: RankWork[R], settings: LaunchSettings, notice: Notice | None = None) -> R:
    """Does the work of one rank, in the process group that its launcher made."""
    with _join_single_group(settings.config):
        return work(settings, notice)


def launch_in_process(work: RankWork[R], settings: LaunchSettings) -> R:
    """One rank in this process. After the checkpoint that a SIGTERM asked for, the signal takes its usual effect."""
    from refalign.training.preemption import Preempted

    try:
        return run_rank(work, settings)
    except Preempted:
        signal.raise_signal(signal.SIGTERM)
        raise


def launch_on_ray(work: RankWork[R], settings: LaunchSettings) -> R:
    """Ranks as Ray Train workers; a lost rank restarts the group, which resumes from the newest checkpoint.

    Raises:
        RefAlignError: see `run_training`.
    """
    from ray.train.v2.api.exceptions import TrainingFailedError

    failure, record = settings.folder / "failure.json", settings.folder / "ray"
    failure.unlink(missing_ok=True)
    shutil.rmtree(record, ignore_errors=True)  # Ray's own record of an earlier attempt; ours is in checkpoints/
    trainer = _make_trainer(work, settings)
    try:
        # Not in the main thread: there, Ray would replace the process's Ctrl-C handler for good, and exit with 0 on it.
        # An interrupt leaves this call at once; the ranks end with the driver, which owns them.
        result = _run_in_thread(trainer.fit).return_value
    except TrainingFailedError as error:
        _raise_recorded(failure)
        reason = " ".join(str(error).split())[-400:]
        most = settings.config.training.parallel.max_restarts
        raise RefAlignError(
            f"{settings.folder}: ranks were lost more than training.parallel.max_restarts={most} times "
            f"(last: {reason}). Run the same command again to resume from the newest checkpoint."
        ) from error
    _raise_recorded(failure)
    shutil.rmtree(record, ignore_errors=True)
    return result


def run_training(
    config: RunConfig,
    *,
    step: Step,
    shards: Path,
    tracking_uri: str | None = None,
    run_id: str | None = None,
    progress: bool = True,
    launch: Callable[[RankWork[Trained], LaunchSettings], Trained] = launch_on_ray,
) -> TrainManifest:
    """Trains all stages in the step's folder. Interrupted, it resumes when called again.

    Metrics go to MLflow from here, by following the run's ``metrics.jsonl``: importing MLflow in a rank would cost it half a
    minute of CPU.

    Args:
        config: the run's settings.
        step: names the folder, whose lease the caller holds; its fingerprint must cover everything that changes the result.
        shards: folder of the finished shards step.
        tracking_uri: MLflow server of ``run_id``; None logs to the folder alone.
        run_id: MLflow run that gets the metrics.
        progress: show a progress bar.
        launch: how ranks are started.

    Raises:
        RefAlignError: of the kind the ranks met, or that ranks were lost more often than ``training.parallel.max_restarts``.
    """
    from refalign.training.preflight import check_before_start  # torch

    digest = check_before_start(config, shards, step.folder).digest
    settings = make_settings(config, shards, step.folder)
    write_json(step.folder / LAUNCH_FILE, settings.model_dump(mode="json"))
    start_s = time.monotonic()
    steps = config.training.total_steps
    with follow(step.folder / FILE_NAME, steps, tracking_uri=tracking_uri, run_id=run_id, progress=progress):
        trained = launch(train_rank, settings)
    return _make_manifest(settings, trained, digest, time.monotonic() - start_s)


def _make_trainer(work: RankWork[R], settings: LaunchSettings) -> Any:
    """A `TorchTrainer` with the ranks and resources of the settings."""
    import ray
    from ray.train.torch import TorchConfig

    # By their full names: an environment variable decides whether `ray.train` means V1 or V2.
    from ray.train.v2.api.config import FailureConfig, LoggingConfig, ScalingConfig
    from ray.train.v2.api.config import RunConfig as TrainRunConfig
    from ray.train.v2.torch.torch_trainer import TorchTrainer

    # A busy machine imports torch for more than Ray's 60 s.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "300")
    watches = not ray.is_initialized() or len(ray.nodes()) > 1
    if not watches:
        # Nobody announces the loss of the only node: one process less to start.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    process, parallel = settings.config.cluster.train, settings.config.training.parallel
    uses_gpu = process.gpus > 0
    resources = {"CPU": process.cpus} | ({"GPU": process.gpus} if uses_gpu else {}) | process.resources
    ranks = (parallel.min_ranks, parallel.ranks) if parallel.min_ranks else parallel.ranks
    return TorchTrainer(
        _ray_worker,
        train_loop_config={"settings": settings, "watches_preemption": watches, "work": work},
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if uses_gpu else "gloo", timeout_s=_COLLECTIVE_TIMEOUT_S),
        scaling_config=ScalingConfig(num_workers=ranks, use_gpu=uses_gpu, resources_per_worker=resources),
        run_config=TrainRunConfig(
            name="ray",
            storage_path=str(settings.folder),
            failure_config=FailureConfig(max_failures=parallel.max_restarts),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )


def _ray_worker(told: dict[str, Any]) -> object:
    """`run_rank`, recording our own errors: they would come back in every attempt, so that no restart can help."""
    settings: LaunchSettings = told["settings"]
    failure = settings.folder / "failure.json"
    if failure.exists():
        return None  # restarted after such an error: ends the run, and the driver raises what is recorded
    try:
        # Preempted is none of our errors: it goes to Ray, which restarts the group on other nodes.
        return run_rank(told["work"], settings, _ask_ray if told["watches_preemption"] else None)
    except RefAlignError as error:
        write_json(failure, error.to_record())
        if isinstance(error, NonFiniteLoss) or settings.config.training.parallel.ranks == 1:
            return None  # no rank is left waiting for this one, so that there is no need to end the group by force
        raise


def _ask_ray() -> bool:
    """Whether a node of this group is about to be taken away; asks the first rank, so that all must call it."""
    from ray.train import get_preemption_info

    return get_preemption_info() is not None


def _run_in_thread(function: Callable[[], R]) -> R:
    """Calls ``function`` in another thread and waits; its result or exception is this call's."""
    outcome: Future[R] = Future()

    def work() -> None:
        try:
            outcome.set_result(function())
        except BaseException as error:  # noqa: BLE001 - raised again in the waiting thread
            outcome.set_exception(error)

    threading.Thread(target=work, name="ray-train", daemon=True).start()
    return outcome.result()


def _raise_recorded(failure: Path) -> None:
    if failure.exists():
        raise RefAlignError.from_record(json.loads(failure.read_text()))


@contextmanager
def _join_single_group(config: RunConfig) -> Iterator[None]:
    """Makes a process group for a bfloat16 rank without one: FSDP2 needs it, which bfloat16 uses even on one rank."""
    import torch.distributed as dist

    if dist.is_initialized() or config.training.precision == "float32":
        yield
        return
    import torch

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _make_manifest(settings: LaunchSettings, trained: Trained, shard_digest: str, seconds: float) -> TrainManifest:
    from refalign.objective.total import LossTerms

    training, folder = settings.config.training, settings.folder
    records = read_records(folder / FILE_NAME)
    steps = [record for record in records if "step_s" in record]
    busy_s, wait_s = sum(record["step_s"] for record in steps), sum(record["data_wait_s"] for record in steps)
    validation = summarize_records(records, [f"validation/{name}" for name in LossTerms._fields])
    return TrainManifest(
        steps=len(steps),
        samples=len(steps) * training.global_batch,
        stages=[stage.name for stage in training.stages],
        loss=summarize_records(records, LossTerms._fields),
        validation={name.removeprefix("validation/"): ends for name, ends in validation.items()},
        weights="average" if training.optimizer.ema_decay else "last",
        seconds=round(seconds, 1),
        steps_s=round(busy_s, 1),
        data_wait_fraction=wait_s / (busy_s + wait_s),
        resumed_from=trained.resumed_from,
        checkpoint=str(trained.checkpoint.relative_to(folder)),
        best_checkpoint=str(trained.best.relative_to(folder)) if trained.best else None,
        export=str(trained.export.relative_to(folder)),
        metrics=FILE_NAME,
        shard_digest=shard_digest,
    )


def main(arguments: list[str]) -> None:
    """A rank under torchrun: reads the launch.json that `run_training` wrote."""
    import torch
    import torch.distributed as dist

    from refalign.training.preemption import EXIT_CODE, Preempted

    if len(arguments) != 1 or not Path(arguments[0]).is_file():
        raise ArtifactError("expected the path of a launch.json: torchrun ... -m refalign.training.launch <folder>/launch.json")
    settings = LaunchSettings.load(Path(arguments[0]))
    uses_gpu = torch.cuda.is_available()
    if uses_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if uses_gpu else "gloo")
    try:
        run_rank(train_rank, settings)
    except Preempted as notice:
        print(notice, file=sys.stderr, flush=True)
        os._exit(EXIT_CODE)  # at once: whoever asked may not wait for libraries to shut down
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except RefAlignError as error:
        sys.exit(str(error))
