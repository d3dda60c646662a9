"""Videos to shards in this process: the real steps and models of the toy preset, without Ray and MLflow."""

import json
from pathlib import Path

import pytest

from refalign.config import RunConfig, apply_overrides
from refalign.config.presets import toy_tiny
from refalign.curation import launch, pairs, selection
from refalign.pipeline import retries
from refalign.pipeline.ray_data import find_done
from refalign.pipeline.steps import Step
from refalign.pipeline.tombstones import load_tombstones
from refalign.shards import launch as shards_launch

_ACTORS: dict = {}


def make_config(*overrides: str) -> RunConfig:
    return apply_overrides(toy_tiny(), ["curation.videos_per_part=2", "shards.samples_per_shard=4", *overrides])


def run_parts_here(step, plan, actor, config, *, label, works=None):
    """What `refalign.pipeline.ray_data.run_parts` does: one actor, in this process, kept for later calls."""
    done = find_done(step, plan, works)
    for name, work in plan.items():
        if name not in done:
            key = (actor, str(config))
            made = _ACTORS[key] = _ACTORS.get(key) or actor(config)
            done[name] = json.loads(json.dumps(made.make_part(step, name, json.loads(json.dumps(work)))))
    return [done[name] for name in plan]


@pytest.fixture()
def here(monkeypatch):
    do_without_ray(monkeypatch)


def do_without_ray(monkeypatch):
    for module in (launch, pairs, selection, shards_launch):
        monkeypatch.setattr(module, "run_parts", run_parts_here)


def curate_here(config: RunConfig, where: Path, output: Path, store: str | None = None) -> dict[str, Step]:
    """The finished steps subjects, pairs and shards, as `refalign.run` chains them."""
    plan, planned, identity = launch.plan_subjects(config, where, load_tombstones(output))
    subjects = Step.make(output, "subjects", identity, config.curation, store=store, recipe=[config.curation])
    matched = Step.make(output, "pairs", subjects.fingerprint, store=store)
    recipe = [config.shards, subjects.recipe]
    shards = Step.make(output, "shards", config.shards, matched.fingerprint, store=store, recipe=recipe)
    places = launch.find_locations(plan)
    retries.reopen(subjects, retries.find_retries(subjects, launch.find_locations(plan, "name")))
    for step, work in (
        (subjects, lambda: launch.run_subjects(config, subjects, plan, planned)),
        (matched, lambda: pairs.run_pairs(config, matched, subjects)),
        (shards, lambda: shards_launch.run_shards(config, shards, subjects, matched, places)),
    ):
        if step is shards:
            retries.reopen(shards, retries.find_retries(shards, {}))
        with step.lease():
            assert step.load_manifest() or work()
    return {"subjects": subjects, "pairs": matched, "shards": shards}
