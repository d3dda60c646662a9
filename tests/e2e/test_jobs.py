"""The story as a submitted Ray job, on a cluster started by hand with token authentication."""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RAY = str(Path(sys.executable).with_name("ray"))
PORTS = (
    "port",
    "dashboard-port",
    "dashboard-agent-grpc-port",
    "dashboard-agent-listen-port",
    "metrics-export-port",
    "runtime-env-agent-port",
    "node-manager-port",
    "object-manager-port",
    "ray-client-server-port",
)


def find_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Environment of a client of a head node that listens on loopback only; ended by its own process group."""
    ports = dict(zip(PORTS, find_ports(len(PORTS)), strict=True))
    address = f"127.0.0.1:{ports['port']}"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_raylet_start_wait_time_s": "240"}
    flags = [f"--{name}={port}" for name, port in ports.items()]
    command = [RAY, "start", "--head", "--block", "--num-cpus=2", "--node-ip-address=127.0.0.1", "--disable-usage-stats"]
    command += ["--dashboard-host=127.0.0.1", f"--object-store-memory={512 * 2**20}", *flags]
    log = (tmp_path_factory.mktemp("ray") / "head.log").open("w+")
    head = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    client = environment | {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{ports['dashboard-port']}"}
    try:
        for _ in range(90):
            probe = subprocess.run([RAY, "job", "list"], env=client, capture_output=True, text=True)
            if probe.returncode == 0:
                break
            assert head.poll() is None, log.seek(0) or log.read()
            time.sleep(2)
        else:
            pytest.fail(f"the cluster at {address} did not come up: {probe.stderr[-2000:]}")
        yield client
    finally:
        os.killpg(head.pid, signal.SIGTERM)
        try:
            head.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)
            head.wait()


def submit(client: dict[str, str], *entrypoint: str) -> subprocess.CompletedProcess:
    command = [RAY, "job", "submit", "--working-dir", ".", "--", sys.executable, *entrypoint]
    return subprocess.run(command, cwd=ROOT, env=client, capture_output=True, text=True, timeout=900)


def test_a_submitted_job_goes_on_from_what_the_command_line_made(cluster, story, tmp_path):
    """The same story with one setting changed: only evaluation and registration are done again, by the cluster's workers."""
    made, _, before = story
    output = tmp_path / "copy"
    shutil.copytree(made, output)
    flags = ["--preset", "toy_tiny", "--output", str(output), "--set", "evaluation.num_samples=1"]
    done = submit(cluster, "pipelines/full.py", *flags)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert done.stdout.count("done before, skipped") == 5
    after = json.loads((output / "summary.json").read_text())
    assert after["evaluation"]["num_samples"] == 1
    assert after["digest"] == before["digest"]
    assert int(after["model"]["version"]) == int(before["model"]["version"]) + 1


def test_a_failed_job_fails(cluster):
    done = submit(cluster, "pipelines/full.py", "--input", "/nowhere/at/all")
    assert done.returncode == 1
    assert "no such folder" in done.stdout + done.stderr
