"""Ray on this machine: a process of it that ends during the start is noticed at once, and the command tries once more."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
import os, sys, threading, time
import psutil
from refalign.cli import leave, run_command
from refalign.config import ClusterConfig
from refalign.pipeline.ray_data import connect

def kill_raylet():
    while True:
        for child in psutil.Process().children():
            if child.name() == "raylet":
                child.kill()
                return
        time.sleep(0.01)

def work():
    with connect(ClusterConfig()):
        import ray
        print("answer", ray.get(ray.remote(lambda: 7).remote()))

if len(os.environ.get("REFALIGN_SECOND_TRY", "")) < int(sys.argv[1]):
    threading.Thread(target=kill_raylet, daemon=True).start()
leave(run_command(work))
"""


@pytest.mark.parametrize("times", [1, 2])
def test_a_raylet_that_ends_during_the_start_is_noticed_and_the_start_tried_again(times):
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(times)], cwd=ROOT, capture_output=True, text=True, timeout=600)
    lines = [line for line in done.stderr.splitlines() if line.startswith(("error", "trying"))]
    refusal = "error: Ray did not start on this machine: its process raylet ended after "
    assert lines[0].startswith(refusal) and "Its logs are in" in lines[0] and lines[1] == "trying once more", done.stderr
    if times == 1:
        assert (done.returncode, done.stdout.strip(), len(lines)) == (0, "answer 7", 2), done.stderr
    else:
        assert (done.returncode, len(lines)) == (1, 3) and lines[2].startswith(refusal), done.stderr
