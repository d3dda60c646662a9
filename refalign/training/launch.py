"""Starting a training run: under Ray Train, under torchrun, or in this process. All three call `train_worker`.

    run_training(config, step=..., shards=...)                                  Ray Train, the default
    run_training(..., launch=launch_in_process)                                 one rank, here
    torchrun --nproc-per-node 8 -m refalign.training.launch <folder>/launch.json

Checkpoints in the step's folder are the truth: whoever starts next, and however, goes on from the newest one. Nothing here
imports torch or diffusers into the driver before the checks have passed.
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
from typing import Any

from refalign.config import RunConfig, check_config
from refalign.errors import ArtifactError, NonFiniteLoss, RefAlignError
from refalign.io.writing import write_json
from refalign.pipeline.stage import Manifest
from refalign.pipeline.steps import Step
from refalign.training.earlier import LAUNCH_FILE
from refalign.training.follower import follow
from refalign.training.records import FILE_NAME, read_records, summarize_records

_COLLECTIVE_TIMEOUT_S = 600  # far below torch's 30 minutes: a lost rank should be noticed, a slow checkpoint not

Settings = dict[str, Any]
"""What a worker is told, as JSON: config, shards and folder; for `refalign.training.check` also tracking_uri."""
Notice = Callable[[], bool]
RankWork = Callable[[RunConfig, Settings, Notice | None], dict[str, Any]]
"""What a rank does once it is in its group."""


class TrainManifest(Manifest):
    """What a training made; paths are relative to its folder.

    Attributes:
        loss, validation: ``first`` and ``last`` value of each term.
        weights: which the export holds: ``average`` or ``last``.
        seconds: of this attempt; ``steps_s`` those of all steps.
        data_wait_fraction: share of the steps' time that ranks waited for data.
        resumed_from: the step that this attempt went on from, None from the start.
    """

    steps: int
    samples: int
    stages: list[str]
    loss: dict[str, dict[str, float]]
    validation: dict[str, dict[str, float]]
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


def run_training(
    config: RunConfig,
    *,
    step: Step,
    shards: Path,
    tracking_uri: str | None = None,
    run_id: str | None = None,
    progress: bool = True,
    launch: Callable[[Settings, RunConfig], dict[str, Any]] | None = None,
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
        launch: how ranks are started; None is `launch_on_ray`.

    Raises:
        RefAlignError: of the kind the ranks met, or that ranks were lost more often than ``training.parallel.max_restarts``.
    """
    from refalign.training.preflight import check_before_start  # torch

    digest = check_before_start(config, shards, step.folder).digest
    settings = make_settings(config, shards, step.folder)
    write_json(step.folder / LAUNCH_FILE, settings)
    start_s = time.monotonic()
    total_steps = sum(stage.steps for stage in config.training.stages)
    with follow(step.folder / FILE_NAME, total_steps, tracking_uri=tracking_uri, run_id=run_id, progress=progress):
        result = (launch or launch_on_ray)(settings, config)
    return _make_manifest(config, step.folder, result, digest, time.monotonic() - start_s)


def make_settings(config: RunConfig, shards: Path, folder: Path) -> Settings:
    """What `train_worker` needs, with absolute paths: Ray's workers have another working directory."""
    tree = config.model_dump(mode="json")
    base = Path(config.models.base).expanduser()
    if base.is_dir():
        tree["models"]["base"] = str(base.resolve())
    return {"config": tree, "shards": str(Path(shards).resolve()), "folder": str(Path(folder).resolve())}


def train_rank(config: RunConfig, settings: Settings, notice: Notice | None) -> dict[str, Any]:
    """Trains; returns what `refalign.training.loop.train` returns."""
    from refalign.training.loop import train

    return train(config, shards=Path(settings["shards"]), folder=Path(settings["folder"]), notice=notice)


def train_worker(settings: Settings, notice: Notice | None = None, work: RankWork = train_rank) -> dict[str, Any]:
    """One rank: joins whatever process group there is and does its work."""
    config = check_config(settings["config"])
    with _join_single_group(config):
        return work(config, settings, notice)


def launch_in_process(settings: Settings, config: RunConfig, work: RankWork = train_rank) -> dict[str, Any]:
    """One rank in this process. A SIGTERM that it answered with a checkpoint then takes its usual course."""
    from refalign.training.preemption import Preempted

    try:
        return train_worker(settings, work=work)
    except Preempted:
        signal.raise_signal(signal.SIGTERM)
        raise


def launch_on_ray(settings: Settings, config: RunConfig, work: RankWork = train_rank) -> dict[str, Any]:
    """Ranks as Ray Train workers; a lost rank restarts the group, which goes on from the newest checkpoint.

    Raises:
        RefAlignError: see `run_training`.
    """
    from ray.train.v2.api.exceptions import TrainingFailedError

    folder = Path(settings["folder"])
    failure = folder / "failure.json"
    failure.unlink(missing_ok=True)
    shutil.rmtree(folder / "ray", ignore_errors=True)  # Ray's own record of an earlier attempt; ours is in checkpoints/
    trainer = _make_trainer(settings, config, work)
    try:
        # Not in the main thread: there, Ray would replace the process's Ctrl-C handler for good, and exit with 0 on it.
        # An interrupt leaves this call at once; the ranks end with the driver, which owns them.
        result = _run_in_thread(trainer.fit).return_value
    except TrainingFailedError as error:
        _raise_recorded(failure)
        reason = " ".join(str(error).split())[-400:]
        raise RefAlignError(
            f"{folder}: ranks were lost more than training.parallel.max_restarts={config.training.parallel.max_restarts} times "
            f"(last: {reason}). Run the same command again to resume from the newest checkpoint."
        ) from error
    _raise_recorded(failure)
    shutil.rmtree(folder / "ray", ignore_errors=True)
    return result


def _make_trainer(settings: Settings, config: RunConfig, work: RankWork) -> Any:
    """A `TorchTrainer` with the ranks and resources of ``config``."""
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
    process, parallel = config.cluster.train, config.training.parallel
    uses_gpu = process.gpus > 0
    resources = {"CPU": process.cpus} | ({"GPU": process.gpus} if uses_gpu else {}) | process.resources
    ranks = (parallel.min_ranks, parallel.ranks) if parallel.min_ranks else parallel.ranks
    return TorchTrainer(
        _ray_worker,
        train_loop_config=settings | {"watches_preemption": watches, "work": work},
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if uses_gpu else "gloo", timeout_s=_COLLECTIVE_TIMEOUT_S),
        scaling_config=ScalingConfig(num_workers=ranks, use_gpu=uses_gpu, resources_per_worker=resources),
        run_config=TrainRunConfig(
            name="ray",
            storage_path=settings["folder"],
            failure_config=FailureConfig(max_failures=parallel.max_restarts),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )


def _ray_worker(settings: Settings) -> dict[str, Any]:
    """`train_worker` with an end to restarts that cannot help: our own errors would come back in every attempt."""
    failure = Path(settings["folder"]) / "failure.json"
    if failure.exists():
        return {}  # restarted after such an error: ends the run, and the driver raises what is recorded
    try:
        # Preempted is none of our errors: it goes to Ray, which restarts the group on other nodes.
        return train_worker(settings, _ask_ray if settings["watches_preemption"] else None, settings["work"])
    except RefAlignError as error:
        write_json(failure, error.to_record())
        if isinstance(error, NonFiniteLoss) or settings["config"]["training"]["parallel"]["ranks"] == 1:
            return {}  # no rank is left waiting for this one, so that there is no need to end the group by force
        raise


def _ask_ray() -> bool:
    """Whether a node of this group is about to be taken away; asks the first rank, so that all must call it."""
    from ray.train import get_preemption_info

    return get_preemption_info() is not None


def _run_in_thread(function: Callable[[], Any]) -> Any:
    """Calls ``function`` in another thread and waits; its result or exception is this call's."""
    outcome: Future[Any] = Future()

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
    """bfloat16 on one rank uses FSDP2 too, which needs a process group; nothing to do where a launcher made one."""
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


def _make_manifest(config: RunConfig, folder: Path, result: dict[str, Any], shard_digest: str, seconds: float) -> TrainManifest:
    from refalign.objective.total import LossTerms

    records = read_records(folder / FILE_NAME)
    steps = [record for record in records if "step_s" in record]
    busy_s = sum(record["step_s"] for record in steps)
    wait_s = sum(record["data_wait_s"] for record in steps)
    validation = tuple(f"validation/{name}" for name in LossTerms._fields)
    return TrainManifest(
        steps=len(steps),
        samples=len(steps) * config.training.global_batch,
        stages=[stage.name for stage in config.training.stages],
        loss=summarize_records(records, LossTerms._fields),
        validation={name.removeprefix("validation/"): ends for name, ends in summarize_records(records, validation).items()},
        weights="average" if config.training.optimizer.ema_decay else "last",
        seconds=round(seconds, 1),
        steps_s=round(busy_s, 1),
        data_wait_fraction=wait_s / (busy_s + wait_s),
        resumed_from=result["resumed_from"],
        checkpoint=str(Path(result["checkpoint"]).relative_to(folder)),
        best_checkpoint=str(Path(result["best"]).relative_to(folder)) if result["best"] else None,
        export=str(Path(result["export"]).relative_to(folder)),
        metrics=FILE_NAME,
        shard_digest=shard_digest,
    )


def main(arguments: list[str]) -> None:
    """A rank under torchrun: reads the launch.json that `run_training` or `make_settings` wrote."""
    import torch
    import torch.distributed as dist

    from refalign.training.preemption import EXIT_CODE, Preempted

    if len(arguments) != 1 or not Path(arguments[0]).is_file():
        raise ArtifactError("expected the path of a launch.json: torchrun ... -m refalign.training.launch <folder>/launch.json")
    uses_gpu = torch.cuda.is_available()
    if uses_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if uses_gpu else "gloo")
    try:
        train_worker(json.loads(Path(arguments[0]).read_text()))
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
