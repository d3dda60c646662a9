"""Ray on one screen: the cluster a run uses, and Ray Data over a plan of parts.

Every unfinished part goes to one actor of a pool, which writes and commits it (`refalign.pipeline.steps`) and returns the commit
record. Ray Data places the actors, restarts lost ones and scales the pool; what is done is decided by commits alone.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import TypeAdapter
from pydantic_core import to_json

from refalign.config import ClusterConfig, PoolConfig, RunConfig
from refalign.errors import BackendUnavailable, RefAlignError
from refalign.pipeline.outcomes import may_pass
from refalign.pipeline.ray_start import start_ray
from refalign.pipeline.steps import Step
from refalign.pipeline.telemetry import count_part

_ROOT = Path(__file__).resolve().parents[2]


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
    options: dict[str, Any] = {"logging_level": logging.WARNING, "runtime_env": {"env_vars": _worker_env(config)}}
    if started_here:
        start_ray(options)
    else:
        try:
            ray.init(**options)
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


def find_done(step: Step, plan: Mapping[str, Any], works: Mapping[str, Any] | None = None) -> dict[str, dict[str, Any]]:
    """Commits of the parts that need not be made; others are reopened.

    Args:
        works: part name to what its commit must say of its ``work``; parts that are not named may say anything.
    """

    def is_settled(name: str, commit: dict[str, Any]) -> bool:
        return not may_pass(commit) and (works is None or name not in works or works[name] == commit.get("work"))

    done = step.load_parts(plan)
    again = [name for name, commit in done.items() if not is_settled(name, commit)]
    if again:
        step.reopen(again)
    return {name: commit for name, commit in done.items() if name not in again}


def run_parts(
    step: Step,
    plan: Mapping[str, Any],
    actor: type,
    config: RunConfig,
    *,
    label: str,
    works: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Completes every part of ``plan`` and returns the commit records in plan order.

    Args:
        step: the folder that the parts are written to; its name chooses the pool, ``cluster.<step>``.
        plan: part name to what the actor needs to make it: a dataclass or plain values.
        actor: a class with ``__init__(config)`` and ``make_part(step, name, work) -> record``.
        label: what the progress bar says.
        works: as of `find_done`.
    """
    from tqdm import tqdm

    done = find_done(step, plan, works)
    todo = [name for name in plan if name not in done]
    with tqdm(total=len(plan), initial=len(done), desc=label, unit="part", file=sys.stderr) as progress:
        if todo:
            for row in _map_parts(step, plan, todo, actor, config):
                if row["error"]:
                    raise RefAlignError.from_record(json.loads(row["error"]))
                record = json.loads(row["record"])
                done[record["part"]] = record
                count_part(step.name, record)
                progress.update()
    return [done[name] for name in plan]


def complete_parts(
    step: Step, plan: Mapping[str, Any], actor: type, config: RunConfig, *, label: str
) -> dict[str, dict[str, Any]]:
    """Commit records by part name, for a step outside of the story: Ray is joined only if a part is missing."""
    records = step.load_parts(plan)
    if records.keys() != plan.keys():
        with connect(config.cluster):
            records = dict(zip(plan, run_parts(step, plan, actor, config, label=label), strict=True))
    return records


def _map_parts(step: Step, plan: Mapping[str, Any], todo: list[str], actor: type, config: RunConfig) -> Iterator[dict[str, Any]]:
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # its warnings speak of its own progress bars
    rows = [{"name": name, "work": to_json(plan[name]).decode()} for name in todo]
    pool: PoolConfig = getattr(config.cluster, step.name, PoolConfig())
    data = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        _PartWorker,
        fn_constructor_kwargs={"actor": actor, "step": step, "config": config},
        batch_size=1,
        batch_format="numpy",
        num_cpus=pool.cpus,
        num_gpus=pool.gpus,
        resources=pool.resources or None,
        # One at first: Ray adds others while parts wait. Never more actors than parts: the rest would load models for nothing.
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=min(pool.max_actors, len(rows))),
    )
    yield from data.iter_rows()


def read_work(actor: Any, text: str) -> Any:
    """A part's work from JSON, as the class that the actor's ``make_part`` takes."""
    return TypeAdapter(get_type_hints(actor.make_part).get("work", Any)).validate_json(text)


class _PartWorker:
    """Adapts a step's actor to Ray Data's batches of one row.

    Our own errors travel as rows: raised in a worker they would come back wrapped, and an actor that cannot be built would be
    started again for ever.
    """

    def __init__(self, actor: type, step: Step, config: RunConfig) -> None:
        self._make_actor = lambda: actor(config)
        self._actor: Any = None
        self._step = step

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        name = str(batch["name"][0])
        try:
            # A part finished just before its worker was lost is done: the commit decides, not the scheduler.
            record = self._step.load_part(name)
            if record is None:
                self._actor = self._actor or self._make_actor()
                record = self._actor.make_part(self._step, name, read_work(self._actor, str(batch["work"][0])))
        except RefAlignError as error:
            return {"record": [""], "error": [json.dumps(error.to_record())]}
        return {"record": [json.dumps(record)], "error": [""]}
