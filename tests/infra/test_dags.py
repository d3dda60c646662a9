"""The schedule without Airflow: what it imports, which commands it runs, and what their ends mean."""

import ast
import doctest
import subprocess
import sys
from contextlib import ExitStack

import pytest
import ray_jobs
import stages

from tests.infra.manifests import ROOT, find_script, load_run

DAGS = {path.stem: path for path in sorted((ROOT / "dags").glob("*.py"))}
PARAMS = {
    "repository": "/opt/refalign",
    "preset": "toy_tiny",
    "input": "/shared/videos",
    "output": "/shared/runs/retrain",
    "settings": ["tracking.uri=http://mlflow:5000"],
}


@pytest.mark.parametrize("name", DAGS)
def test_dags_import_airflow_and_the_standard_library_only(name):
    imported = set()
    for node in ast.walk(ast.parse(DAGS[name].read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add((node.module or "").split(".")[0])
    allowed = set(sys.stdlib_module_names) | set(DAGS) | ({"airflow"} if name == "retrain" else set())
    assert imported and imported <= allowed


def find_calls(name):
    tree = ast.parse(DAGS["retrain"].read_text())
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == name]


def test_one_run_at_a_time_and_none_for_the_past():
    (dag,) = find_calls("DAG")
    told = {word.arg: word.value for word in dag.keywords}
    values = {name: ast.literal_eval(told[name]) for name in ("dag_id", "catchup", "max_active_runs")}
    assert values == {"dag_id": "retrain", "catchup": False, "max_active_runs": 1}
    assert {"on_failure_callback", "schedule"} <= set(told)
    retries = next(value for key, value in zip(told["default_args"].keys, told["default_args"].values) if key.value == "retries")
    assert ast.literal_eval(retries) > 0


def test_the_schedule_passes_every_parameter_that_commands_take():
    (dag,) = find_calls("DAG")
    params = next(word.value for word in dag.keywords if word.arg == "params")
    assert {key.value for key in params.keys} == {*PARAMS, "force"}


@pytest.mark.parametrize("stage", [stages.CHECK, *stages.STEPS, stages.GATE], ids=lambda stage: stage.name)
def test_commands_are_known_to_the_pipelines(stage):
    entrypoint = stages.make_entrypoint(stage, PARAMS)
    script, flags = find_script(entrypoint)
    assert script == f"pipelines/{stage.script}.py"
    assert flags[: len(stage.action.split())] == stage.action.split()
    config = load_run(entrypoint.replace(f" {stage.action} ", " ") if stage.action else entrypoint)
    assert config.tracking.uri == "http://mlflow:5000" and config.input.path == "/shared/videos"


def test_tasks_are_the_stages_of_a_run():
    from refalign.stages import STAGES

    assert [stage.script for stage in stages.STEPS] == [stage.name for stage in STAGES if stage.needs_services]


def test_values_are_never_read_by_the_shell(tmp_path):
    hostile = f"$(touch {tmp_path}/made); touch {tmp_path}/made"
    entrypoint = stages.make_entrypoint(stages.GATE, {**PARAMS, "repository": str(ROOT), "settings": [hostile]})
    done = subprocess.run(entrypoint.replace("python", sys.executable, 1), shell=True, capture_output=True, text=True)
    assert done.returncode == 2 and "expected section.field=value" in done.stderr
    assert not (tmp_path / "made").exists()


def test_the_check_ends_with_1_where_a_step_is_not_done(tmp_path):
    params = {"repository": str(ROOT), "preset": "toy_tiny", "output": str(tmp_path), "settings": ["input.world_videos=1"]}
    entrypoint = stages.make_entrypoint(stages.CHECK, params).replace("python", sys.executable, 1)
    done = subprocess.run(entrypoint, shell=True, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "not finished" in done.stderr
    assert not stages.is_nothing_new(done.returncode, done.stdout)


def test_the_check_knows_what_a_finished_run_prints(tmp_path, capsys):
    from refalign.config.presets import toy_tiny
    from refalign.pipeline.stage import Inputs, Manifest
    from refalign.run import Loop
    from refalign.stages import Register

    class Done(Register):
        manifest = Manifest

        def find_inputs(self, run):
            return Inputs(("x",))

        def is_still_there(self, run, manifest):
            return True

    with ExitStack() as stack:
        loop = Loop(toy_tiny(), tmp_path, stack, stages=[Done])
        loop.make_step(loop.stages[0]).commit({})
        loop.go_through()
    assert stages.is_nothing_new(0, capsys.readouterr().out)
    assert not stages.is_nothing_new(0, "register: refalign version 2, alias challenger in 1.0 s")


def test_the_kept_champion_is_a_result():
    from refalign.errors import ConfigError, NotPromoted

    assert NotPromoted.exit_code in stages.GATE.accepted
    assert ConfigError.exit_code not in {*stages.GATE.accepted, *stages.CHECK.accepted}
    assert all(stage.accepted == (0,) for stage in stages.STEPS)


def test_submission_ids_are_stable_and_apart():
    make = ray_jobs.make_submission_id
    assert make("retrain", "a/b", "train") == make("retrain", "a/b", "train")
    assert make("retrain", "a/b", "train") != make("retrain", "a-b", "train")
    assert make("a", "bc") != make("ab", "c")
    assert len(make("x" * 500)) < 120 and set(make("ä/../?#")) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")


@pytest.mark.parametrize("module", [ray_jobs, stages], ids=lambda module: module.__name__)
def test_examples_in_docstrings_are_true(module):
    found = doctest.testmod(module)
    assert found.attempted and not found.failed
