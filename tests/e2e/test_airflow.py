"""The retraining schedule in a real Airflow, over a real Ray cluster, at the smallest size.

Airflow has an environment of its own; the variable names it:

    uv venv runs/airflow && uv pip install --no-config --python runs/airflow/bin/python apache-airflow==3.3.2
    REFALIGN_AIRFLOW=runs/airflow uv run benchmarks/heavy.py tests/e2e/test_airflow.py
"""

import json
import os
import signal
import subprocess
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest
from local_cluster import find_ports, local_cluster
from ray_jobs import RayJobs

from refalign.toy.videos import write_world

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(3600)]
ROOT = Path(__file__).resolve().parents[2]
STAGES = ["check_new_data", "subjects", "pairs", "shards", "train", "evaluate", "register", "promote"]
_ENDED = {"success", "failed", "skipped", "upstream_failed"}


class Airflow:
    """`airflow standalone` on loopback with its database in a folder; it may be killed and started again."""

    def __init__(self, folder, environment):
        """Chooses a port; nothing runs yet."""
        (self.port,) = find_ports(1)
        self.folder = folder
        binaries = Path(os.environ["REFALIGN_AIRFLOW"]).resolve() / "bin"
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTHON"))} | {
            "PATH": f"{binaries}:{os.environ['PATH']}",
            "AIRFLOW_HOME": str(folder),
            "AIRFLOW__CORE__DAGS_FOLDER": str(ROOT / "dags"),
            "AIRFLOW__CORE__LOAD_EXAMPLES": "false",
            "AIRFLOW__CORE__PARALLELISM": "2",
            "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "true",
            "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"http://127.0.0.1:{self.port}/execution/",
            "AIRFLOW__API__HOST": "127.0.0.1",
            "AIRFLOW__API__PORT": str(self.port),
            "AIRFLOW__API__WORKERS": "1",
            "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "60",
            **environment,
        }
        self.process = None

    def start(self):
        """Starts it and waits until it answers."""
        with (self.folder / "standalone.log").open("ab") as log:
            command = ["airflow", "standalone"]
            self.process = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)
        wait_until(lambda: self.ask("GET", "/api/v2/monitor/health")["scheduler"]["status"] == "healthy", 600)

    def kill(self):
        """SIGKILL for the scheduler and all that it has started."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        time.sleep(2)

    def call(self, *arguments):
        """A command of its command line."""
        return subprocess.run(["airflow", *arguments], env=self.environment, capture_output=True, text=True, timeout=900)

    def ask(self, method, path, body=None):
        """An answer of its REST API."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/auth/token", timeout=30) as answer:
            token = json.load(answer)["access_token"]
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data=data, headers=headers, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def announce_videos(self):
        """What whoever delivers videos does."""
        assets = self.ask("GET", "/api/v2/assets?name_pattern=refalign_videos")["assets"]
        self.ask("POST", "/api/v2/assets/events", {"asset_id": assets[0]["id"]})

    def list_runs(self):
        """The runs, oldest first."""
        return self.ask("GET", "/api/v2/dags/retrain/dagRuns?order_by=id")["dag_runs"]

    def end_scheduled_runs(self):
        """The week's own run, which unpausing may start; it is not what is looked at here."""
        time.sleep(30)
        for run in self.list_runs():
            self.ask("PATCH", f"/api/v2/dags/retrain/dagRuns/{run['dag_run_id']}", {"state": "failed"})
        wait_until(lambda: all(run["state"] in _ENDED for run in self.list_runs()), 300)

    def find_states(self, run):
        """Task -> state of a run."""
        tasks = self.ask("GET", f"/api/v2/dags/retrain/dagRuns/{run}/taskInstances")["task_instances"]
        return {task["task_id"]: task["state"] for task in tasks}


def wait_until(what, seconds):
    """Until ``what`` is true; a server that does not answer yet is waited for."""
    end = time.monotonic() + seconds
    while True:
        with suppress(OSError, KeyError, IndexError):
            if what():
                return
        assert time.monotonic() < end, "it did not come about in time"
        time.sleep(2)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Airflow, the client of its Ray cluster, and the folder of the runs; the DAG is active, and no video was announced yet."""
    if not os.environ.get("REFALIGN_AIRFLOW"):
        pytest.skip("REFALIGN_AIRFLOW is not set")
    folder = tmp_path_factory.mktemp("airflow")
    write_world(folder / "videos", num_videos=18, seed=3, split="train")
    with local_cluster(folder / "ray", head_cpus=2) as cluster:
        address, token = (cluster.environment[name] for name in ("RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN"))
        connection = {"conn_type": "http", "host": address, "password": token}
        airflow = Airflow(
            folder,
            {
                "AIRFLOW_CONN_REFALIGN_RAY": json.dumps(connection),
                "REFALIGN_PRESET": "toy_tiny",
                "REFALIGN_INPUT": str(folder / "videos"),
                "REFALIGN_OUTPUT": str(folder / "out"),
                "REFALIGN_REPOSITORY": str(ROOT),
            },
        )
        airflow.start()
        try:
            wait_until(lambda: airflow.ask("PATCH", "/api/v2/dags/retrain", {"is_paused": False}), 300)
            airflow.end_scheduled_runs()
            yield airflow, RayJobs(address, token), folder / "out"
        finally:
            airflow.kill()


@pytest.fixture(scope="module")
def first_run(parts):
    """A run that an event started, whose scheduler was killed while it trained, and a second event meanwhile."""
    airflow, jobs, _ = parts
    before = {run["dag_run_id"] for run in airflow.list_runs()}
    airflow.announce_videos()
    wait_until(lambda: [run for run in airflow.list_runs() if run["run_type"].startswith("asset")], 300)
    (run,) = [run["dag_run_id"] for run in airflow.list_runs() if run["dag_run_id"] not in before]
    wait_until(lambda: airflow.find_states(run)["train"] == "running" and list_jobs(jobs, "train"), 1500)
    airflow.announce_videos()
    time.sleep(20)
    assert len([each for each in airflow.list_runs() if each["state"] == "running"]) == 1, "a second run beside the first"
    airflow.kill()
    airflow.start()
    wait_until(lambda: set(airflow.find_states(run).values()) <= _ENDED, 1500)
    return run


def list_jobs(jobs, stage):
    """Ids of the Ray jobs of a stage."""
    return [job["submission_id"] for job in jobs._call("GET", "/api/jobs/") if f"-{stage}-" in (job["submission_id"] or "")]


def test_the_schedule_is_read_without_errors(parts):
    airflow, _, _ = parts
    assert airflow.ask("GET", "/api/v2/importErrors")["total_entries"] == 0


def test_a_run_survives_its_scheduler_and_starts_each_job_once(parts, first_run):
    airflow, jobs, output = parts
    states = airflow.find_states(first_run)
    assert states == dict.fromkeys(STAGES, "success") | {"promote": "skipped"}, "the gate has too few prompts to decide"
    found = {stage: len(list_jobs(jobs, stage)) for stage in STAGES}
    assert all(count >= 1 for count in found.values()) and found["train"] == 1, found
    assert len(list(output.glob("register-*/manifest.json"))) == 1


def test_the_second_event_is_served_afterwards_and_finds_nothing_new(parts, first_run):
    airflow, _, _ = parts
    wait_until(lambda: len(airflow.list_runs()) > 1 and airflow.list_runs()[-1]["dag_run_id"] != first_run, 300)
    second = airflow.list_runs()[-1]["dag_run_id"]
    wait_until(lambda: set(airflow.find_states(second).values()) <= _ENDED, 600)
    assert set(airflow.find_states(second).values()) == {"skipped"}


def test_the_same_dag_in_one_process(parts, first_run):
    airflow, _, _ = parts
    done = airflow.call("dags", "test", "retrain")
    assert done.returncode == 0 and "nothing new" in done.stdout + done.stderr, done.stderr[-3000:]
