"""Shared fixtures. One Ray cluster per test session, on its own token; real data by environment variable."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from local_cluster import find_ports

from tests.serving import serving

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two processes with two threads each on two cores crawl
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

_STARTS_RAY = (
    "tests/e2e/",
    "tests/evaluation/test_champion.py",
    "tests/evaluation/test_opens2v.py",
    "tests/infra/test_observability.py",
    "tests/infra/test_ray_jobs.py",
    "tests/test_ray_start.py",
    "tests/training/test_launch_ray.py",
)


def _group(nodeid: str) -> str:
    """Tests that one worker takes, one after another: those that start Ray, or a file.

    A cluster that starts beside another one on two cores may miss Ray's own limit of 15 s for its agents.
    """
    return "ray" if nodeid.startswith(_STARTS_RAY) else nodeid.partition("::")[0]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest group comes first, so that the other worker is not left waiting for it.

    Raises:
        UsageError: a file that starts Ray is not named above.
    """
    for item in items:
        starts_ray = "ray_cluster" in item.fixturenames or hasattr(item.module, "local_cluster")
        if starts_ray and _group(item.nodeid) != "ray":
            raise pytest.UsageError(f"{item.path.name} starts Ray; name it in _STARTS_RAY of tests/conftest.py")
    items.sort(key=lambda item: _group(item.nodeid) != "ray")


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Of ``pytest -n 2``: hands out groups instead of single tests."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _group(nodeid)

    return Scheduling(config, log)


@pytest.fixture(scope="session")
def ray_cluster():
    """A local Ray cluster, as `refalign.pipeline.ray_data.connect` starts it for a run."""
    from refalign.config import ClusterConfig
    from refalign.pipeline.ray_data import connect

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

    (port,) = find_ports(1)
    endpoint = f"http://127.0.0.1:{port}"
    said = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with serving(command, f"{endpoint}/moto-api/"), pytest.MonkeyPatch.context() as patch:
        for name, value in said.items():
            patch.setenv(name, value)
        yield boto3.client("s3", endpoint_url=endpoint)
