"""Shared fixtures. One Ray cluster per test session, on its own token; real data by environment variable."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two processes with two threads each on two cores crawl
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def ray_cluster():
    """A local Ray cluster, as `refalign.parts.connect` starts it for a run."""
    from refalign.config import ClusterConfig
    from refalign.parts import connect

    with connect(ClusterConfig()):
        yield


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real videos and records that `REFALIGN_REAL_DATA` names."""
    folder = os.environ.get("REFALIGN_REAL_DATA")
    if not folder:
        pytest.skip("REFALIGN_REAL_DATA is not set")
    path = Path(folder).resolve()
    assert path.is_dir(), f"REFALIGN_REAL_DATA={folder} is no folder"
    return path


@pytest.fixture(scope="module")
def s3():
    """A client of moto's S3 server; its address and keys stand in the environment, as a user's would."""
    import boto3

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    endpoint = f"http://127.0.0.1:{port}"
    said = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    try:
        wait_for(endpoint)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in said.items():
                patch.setenv(name, value)
            yield boto3.client("s3", endpoint_url=endpoint)
    finally:
        os.kill(server.pid, signal.SIGTERM)
        server.wait(20)


def wait_for(endpoint, seconds=60):
    """Until the server answers."""
    end = time.monotonic() + seconds
    while True:
        try:
            return urllib.request.urlopen(f"{endpoint}/moto-api/", timeout=2).read()
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            if time.monotonic() > end:
                raise
            time.sleep(0.2)
