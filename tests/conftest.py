"""Shared fixtures. One Ray cluster per test session, on its own token; real data by environment variable."""

from __future__ import annotations

import os
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
