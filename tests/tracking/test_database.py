"""The database of an output folder is there as a whole or not at all, whenever the process that makes it is killed."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

from refalign.tracking.client import open_client

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = "import sys; from refalign.tracking.client import open_client; open_client(sys.argv[1])"


def test_a_database_whose_making_was_killed_is_made_again(tmp_path):
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, uri], cwd=ROOT, stderr=subprocess.DEVNULL)
    while process.poll() is None and not [path for path in tmp_path.iterdir() if path.stat().st_size]:
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)  # its first tables are written
    process.wait()
    assert not (tmp_path / "mlflow.db").exists()
    client = open_client(uri)
    assert [experiment.name for experiment in client.search_experiments()] == ["Default"]
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type='table'")}
    assert {"runs", "metrics", "registered_models", "secrets"} <= tables
