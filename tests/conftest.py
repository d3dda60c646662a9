"""Shared fixtures. One Ray cluster per test session, on its own token; real data by environment variable."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from local_cluster import find_ports

from tests.serving import serving

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two processes with two threads each on two cores crawl
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

_STARTS_RAY = ("e2e/", "infra/test_ray_jobs.py", "infra/test_observability.py")
"""Beside the files whose tests take `ray_cluster`."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of two workers one takes all files that start Ray, which come first; the others go file by file to who is free.

    A cluster that starts beside another one on two cores may miss Ray's own limit of 15 s for its agents.
    """
    root = Path(__file__).parent
    files = {item: item.path.relative_to(root).as_posix() for item in items}
    with_ray = {files[item] for item in items if "ray_cluster" in getattr(item, "fixturenames", ())}
    for item, file in files.items():
        starts_ray = file in with_ray or file.startswith(_STARTS_RAY)
        item.add_marker(pytest.mark.xdist_group("ray" if starts_ray else file))
    items.sort(key=lambda item: item.get_closest_marker("xdist_group").args != ("ray",))


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
