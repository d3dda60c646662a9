"""SIGTERM in the middle: children end, MLflow says so, and the same command goes on."""

import signal
import subprocess
import sys
import textwrap
import time

import psutil

from tests.e2e.conftest import ROOT, run


def test_a_terminated_run_leaves_no_process_and_goes_on(tmp_path):
    flags = ["--preset", "toy_tiny", "--output", str(tmp_path)]
    started = subprocess.Popen(
        [sys.executable, "pipelines/full.py", *flags], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert started.stdout is not None and started.stderr is not None
    for line in started.stdout:
        if line.startswith("subjects: started"):
            break
    time.sleep(1)  # into Ray Data's own waiting
    children = psutil.Process(started.pid).children(recursive=True)
    assert children, "Ray runs below the driver"
    started.send_signal(signal.SIGTERM)
    _, said = started.communicate(timeout=120)
    assert started.returncode == 143
    assert f"Run the same command to continue: uv run pipelines/full.py {' '.join(flags)}" in said
    assert "Traceback" not in said
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive

    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (experiment,) = [each for each in client.search_experiments() if each.name == "refalign"]
    assert {each.info.status for each in client.search_runs([experiment.experiment_id])} == {"KILLED"}

    done = run("pipelines/subjects.py", *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "world: done before, skipped" in done.stdout and "subjects: 18 videos" in done.stdout


def test_an_object_that_was_being_built_does_not_complain_of_the_end():
    program = """
        import os, signal, time
        from refalign.cli import run_command

        class Half:
            def __init__(self):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(10)
                self.built = True

            def __del__(self):
                assert self.built

        raise SystemExit(run_command(Half))
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 143 and "Traceback" not in ended.stderr and "Run the same command to continue" in ended.stderr
