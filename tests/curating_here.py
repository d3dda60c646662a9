"""Videos to shards in this process: the real stages and models of the toy preset, without Ray and MLflow."""

import json
from contextlib import ExitStack
from pathlib import Path

import pytest
from pydantic_core import to_json

from refalign.config import RunConfig, apply_overrides
from refalign.config.presets import toy_tiny
from refalign.curation import selection
from refalign.pipeline import stage
from refalign.pipeline.ray_data import find_done, read_work
from refalign.pipeline.steps import Step
from refalign.run import Loop
from refalign.stages import Pairs, Shards, Subjects

CURATION = (Subjects, Pairs, Shards)
_WORKERS: dict = {}


def make_config(*overrides: str) -> RunConfig:
    return apply_overrides(toy_tiny(), ["curation.videos_per_part=2", "shards.samples_per_shard=4", *overrides])


def run_parts_here(step, plan, worker, config, *, label, works=None):
    """What `refalign.pipeline.ray_data.run_parts` does: one worker, in this process, kept for later calls."""
    done = find_done(step, plan, works)
    for name, work in plan.items():
        if name not in done:
            key = (worker, str(config))
            made = _WORKERS[key] = _WORKERS.get(key) or worker(config)
            done[name] = json.loads(json.dumps(made.make_part(step, name, read_work(made, to_json(work).decode()))))
    return [done[name] for name in plan]


class LoopHere(Loop):
    """Starts neither Ray nor MLflow."""

    def _open_services(self) -> None:
        pass


@pytest.fixture()
def here(monkeypatch):
    do_without_ray(monkeypatch)


def do_without_ray(monkeypatch):
    for module in (stage, selection):
        monkeypatch.setattr(module, "run_parts", run_parts_here)


def make_loop(config: RunConfig, where: Path | str, output: Path, store: str | None = None, stages=CURATION) -> LoopHere:
    given = {"input": config.input.model_copy(update={"path": str(where)})}
    given |= {"storage": config.storage.model_copy(update={"parts": store})}
    return LoopHere(config.model_copy(update=given), Path(output), ExitStack(), stages=stages)


def curate_here(config: RunConfig, where: Path | str, output: Path, store: str | None = None, stages=CURATION) -> dict[str, Step]:
    """The finished stages, as `refalign.run` goes through them."""
    loop = make_loop(config, where, output, store, stages)
    loop.go_through()
    return loop.steps
