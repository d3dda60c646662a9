"""A run as a submitted Ray job, on a cluster started by hand with token authentication."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from chaos_curation import check_accounts, digest_output
from chaos_training import describe_run, find_run, load_records, watch
from local_cluster import RAY, local_cluster

from tests.e2e.conftest import ROOT

PLACED = {
    **{f"cluster.{pool}.resources": '{"curation": 0.1}' for pool in ("subjects", "pairs", "shards", "evaluate")},
    "cluster.train.resources": '{"training": 0.1}',
    "training.checkpoint.every": 2,
}
"""Settings that send actors to one node and ranks to another; none of them changes a byte of the output."""


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """Environment of a client of a head node that listens on loopback only."""
    with local_cluster(tmp_path_factory.mktemp("ray"), head_cpus=2) as cluster:
        yield {name: value for name, value in cluster.environment.items() if name != "RAY_ADDRESS"}


def submit(client: dict[str, str], *entrypoint: str) -> subprocess.CompletedProcess:
    command = [RAY, "job", "submit", "--working-dir", ".", "--", sys.executable, *entrypoint]
    return subprocess.run(command, cwd=ROOT, env=client, capture_output=True, text=True, timeout=900)


def digest_tars(output: Path) -> dict[str, str]:
    """The shards alone: rows of the steps before them hold the paths of the videos, which each output has for itself."""
    return {name: digest for name, digest in digest_output(output).items() if name.endswith(".tar")}


def test_a_submitted_job_goes_on_from_what_the_command_line_made(client, finished_run, tmp_path):
    """The same run with one setting changed: only evaluation and registration are done again, by the cluster's workers."""
    made, _, before = finished_run
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


@pytest.mark.heavy
def test_a_job_survives_the_loss_of_a_node_in_curation_and_of_one_in_training(finished_run, tmp_path):
    """Each kind of work has a node of its own, which dies in the middle of it and is replaced."""
    undisturbed, *_ = finished_run
    output, log = tmp_path / "run", tmp_path / "job.log"
    flags = [part for name, value in PLACED.items() for part in ("--set", f"{name}={value}")]
    command = [RAY, "job", "submit", "--working-dir", ".", "--", sys.executable, "pipelines/full.py"]
    with local_cluster(tmp_path / "cluster", head_cpus=1) as cluster, log.open("wb") as file:
        for kind in ("curation", "training"):
            cluster.add_node(1, {kind: 1})
        cluster.wait(3)
        environment = {name: value for name, value in cluster.environment.items() if name != "RAY_ADDRESS"}
        command += ["--preset", "toy_tiny", "--output", str(output), *flags]
        job = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)
        at_work = {
            "curation": ("MapWorker", lambda: any(output.glob("shards-*/attempts/*"))),
            "training": ("RayTrainWorker", lambda: len(load_records(output)) > 8),
        }
        for kind, (process, has_begun) in at_work.items():
            assert watch(job, cluster, has_begun), log.read_text()[-4000:]
            node = cluster.find_node(kind)
            assert cluster.find_processes(process, node) == cluster.find_processes(process) != []
            cluster.kill_node(node)
            cluster.add_node(1, {kind: 1})
        watch(job, cluster, lambda: False)
        assert job.returncode == 0, log.read_text()[-4000:]
    assert digest_tars(output) == digest_tars(undisturbed) != {}
    assert check_accounts(output) == check_accounts(undisturbed)
    runs = [describe_run(find_run(each), tmp_path / "aside.pt") for each in (output, undisturbed)]
    assert runs[0] == runs[1] and runs[0]["steps"] == list(range(25))
