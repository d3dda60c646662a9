"""The Ray cluster of a run, and Ray Data over a plan of parts.

Every unfinished part goes to one worker of a pool, which writes it, commits it and returns the commit. Ray Data places the
workers, restarts lost ones and scales the pool. Only commits say what is done.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Protocol, TypedDict, TypeVar, cast, get_type_hints

from pydantic import TypeAdapter
from pydantic_core import to_json

from refalign.config import ClusterConfig, PoolConfig, RunConfig
from refalign.errors import BackendUnavailable, RefAlignError
from refalign.pipeline.outcomes import Commit
from refalign.pipeline.ray_start import start_ray
from refalign.pipeline.steps import Step
from refalign.pipeline.telemetry import count_part

_ROOT = Path(__file__).resolve().parents[2]
W = TypeVar("W")
W_contra = TypeVar("W_contra", contravariant=True)


class Worker(Protocol[W_contra]):
    """Makes parts in a Ray actor; loads its models once."""

    def __init__(self, config: RunConfig) -> None: ...

    def make_part(self, step: Step, name: str, work: W_contra) -> Mapping[str, object]:
        """Makes one part, commits it (`Step.write_part`) and returns the commit."""
        ...


@contextmanager
def connect(config: ClusterConfig) -> Iterator[None]:
    """Joins the Ray cluster of the environment (``RAY_ADDRESS``, a submitted job), or starts one on this machine.

    Raises:
        BackendUnavailable: the cluster does not answer.
    """
    started_here = not os.environ.get("RAY_ADDRESS")
    if started_here:
        # A cold start on a busy machine outlasts the default 15 s; a token of its own keeps strangers out of its ports.
        os.environ.setdefault("RAY_raylet_start_wait_time_s", "240")
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        # Its C++ side prints advice about Ray Data's own actors at error level; real errors arrive as exceptions.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    # Driver and workers share one environment: without this a driver under `uv run` starts every worker through uv.
    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        yield
        return
    environment = {"env_vars": _worker_env(config)}
    if started_here:
        start_ray(environment)
    else:
        try:
            ray.init(logging_level=logging.WARNING, runtime_env=environment)
        except Exception as error:  # what Ray raises here has no type of its own
            where = os.environ["RAY_ADDRESS"]
            raise BackendUnavailable(
                f"Ray at {where} does not answer ({error}); check RAY_ADDRESS and RAY_AUTH_TOKEN."
            ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _worker_env(config: ClusterConfig) -> dict[str, str]:
    threads = str(config.threads)
    path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH", "")]))
    return {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "PYTHONPATH": path,
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }


def find_done(step: Step, plan: Mapping[str, object], works: Mapping[str, Sequence[str]] | None = None) -> dict[str, Commit]:
    """Commits of the parts that need not be made; others are reopened.

    Args:
        works: what a part's commit must say of its ``work``, by part name; other parts may say anything.
    """
    commits = step.load_parts(plan)
    done = {
        name: commit
        for name, commit in commits.items()
        if not commit.may_pass and (works is None or name not in works or works[name] == commit.get("work"))
    }
    if again := commits.keys() - done.keys():
        step.reopen(sorted(again))
    return done


def run_parts(
    step: Step,
    plan: Mapping[str, W],
    worker: type[Worker[W]],
    config: RunConfig,
    *,
    label: str,
    works: Mapping[str, Sequence[str]] | None = None,
) -> list[Commit]:
    """Completes every part of ``plan`` and returns the commits in plan order.

    Args:
        step: the folder that the parts are written to; its name chooses the pool, ``cluster.<step>``.
        plan: part name to what the worker needs to make it: a dataclass or plain values. It travels as JSON.
        label: of the progress bar.
        works: as of `find_done`.
    """
    from tqdm import tqdm

    done = find_done(step, plan, works)
    todo = {name: work for name, work in plan.items() if name not in done}
    with tqdm(total=len(plan), initial=len(done), desc=label, unit="part", file=sys.stderr) as progress:
        for row in _map_parts(step, todo, worker, config) if todo else ():
            if row["error"]:
                raise RefAlignError.from_record(json.loads(row["error"]))
            commit = Commit(json.loads(row["commit"]))
            done[commit["part"]] = commit
            count_part(step.name, commit)
            progress.update()
    return [done[name] for name in plan]


def complete_parts(
    step: Step, plan: Mapping[str, W], worker: type[Worker[W]], config: RunConfig, *, label: str
) -> dict[str, Commit]:
    """Commits by part name, for a step that is not a stage of a run: Ray is joined only if a part is missing."""
    commits = step.load_parts(plan)
    if commits.keys() != plan.keys():
        with connect(config.cluster):
            commits = dict(zip(plan, run_parts(step, plan, worker, config, label=label), strict=True))
    return commits


class _Row(TypedDict):
    """What comes back of one part, as JSON: its commit, or the error that stops the run."""

    commit: str
    error: str


def _map_parts(step: Step, todo: Mapping[str, W], worker: type[Worker[W]], config: RunConfig) -> Iterator[_Row]:
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # its warnings are about its own progress bars
    rows = [{"name": name, "work": to_json(work).decode()} for name, work in todo.items()]
    pool: PoolConfig = getattr(config.cluster, step.name, PoolConfig())
    data = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        _PartActor,
        fn_constructor_kwargs={"worker": worker, "step": step, "config": config},
        batch_size=1,
        batch_format="numpy",
        num_cpus=pool.cpus,
        num_gpus=pool.gpus,
        resources=pool.resources or None,
        # One at first: Ray adds others while parts wait. Never more actors than parts: the rest would load models for nothing.
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=min(pool.max_actors, len(rows))),
    )
    yield from cast(Iterator[_Row], data.iter_rows())


def read_work(worker: Worker[Any], text: str) -> Any:
    """A part's work from JSON, as the class that the worker's ``make_part`` takes."""
    return TypeAdapter(get_type_hints(worker.make_part).get("work", object)).validate_json(text)


class _PartActor:
    """Adapts a worker to Ray Data's batches of one row.

    Our own errors travel as rows: raised, they would come back wrapped, and an actor that cannot be built would be started again
    for ever.
    """

    def __init__(self, worker: type[Worker[Any]], step: Step, config: RunConfig) -> None:
        self._step = step
        self._make_worker = cache(lambda: worker(config))

    def __call__(self, batch: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
        name = str(batch["name"][0])
        try:
            # A part finished just before its worker was lost is done: the commit decides, not the scheduler.
            commit = self._step.load_part(name)
            if commit is None:
                worker = self._make_worker()
                commit = worker.make_part(self._step, name, read_work(worker, str(batch["work"][0])))
        except RefAlignError as error:
            return {"commit": [""], "error": [json.dumps(error.to_record())]}
        return {"commit": [json.dumps(commit)], "error": [""]}
