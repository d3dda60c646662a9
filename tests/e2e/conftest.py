"""One run of the smallest preset, shared by the end-to-end tests."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str, timeout: int = 900) -> subprocess.CompletedProcess:
    """A command of the repository in a process of its own."""
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """Output folder, finished process and summary of `pipelines/full.py --preset toy_tiny`."""
    output = tmp_path_factory.mktemp("run")
    done = run("pipelines/full.py", "--preset", "toy_tiny", "--output", str(output))
    assert done.returncode == 0, done.stderr[-4000:]
    return output, done, json.loads((output / "summary.json").read_text())
