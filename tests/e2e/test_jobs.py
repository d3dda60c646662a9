"""The story as a submitted Ray job, on a cluster started by hand with token authentication."""

import json
import shutil
import subprocess
import sys

import pytest
from local_cluster import RAY, local_cluster

from tests.e2e.conftest import ROOT


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """Environment of a client of a head node that listens on loopback only."""
    with local_cluster(tmp_path_factory.mktemp("ray"), head_cpus=2) as cluster:
        yield {name: value for name, value in cluster.environment.items() if name != "RAY_ADDRESS"}


def submit(client: dict[str, str], *entrypoint: str) -> subprocess.CompletedProcess:
    command = [RAY, "job", "submit", "--working-dir", ".", "--", sys.executable, *entrypoint]
    return subprocess.run(command, cwd=ROOT, env=client, capture_output=True, text=True, timeout=900)


def test_a_submitted_job_goes_on_from_what_the_command_line_made(client, story, tmp_path):
    """The same story with one setting changed: only evaluation and registration are done again, by the cluster's workers."""
    made, _, before = story
    output = tmp_path / "copy"
    shutil.copytree(made, output)
    flags = ["--preset", "toy_tiny", "--output", str(output), "--set", "evaluation.num_samples=1"]
    done = submit(client, "pipelines/full.py", *flags)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert done.stdout.count("done before, skipped") == 5
    after = json.loads((output / "summary.json").read_text())
    assert after["evaluation"]["num_samples"] == 1
    assert after["digest"] == before["digest"]
    assert int(after["model"]["version"]) == int(before["model"]["version"]) + 1


def test_a_failed_job_fails(client):
    done = submit(client, "pipelines/full.py", "--input", "/nowhere/at/all")
    assert done.returncode == 1
    assert "nowhere" in done.stdout + done.stderr
