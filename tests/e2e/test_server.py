"""A whole run against the MLflow server of infra/: PostgreSQL, an S3 server and passwords, all real, on loopback."""

import base64
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request

import pytest

from tests.e2e.servers import ROOT, mlflow_server, postgres

pytestmark = pytest.mark.heavy
BUCKET = "mlflow"  # as infra/mlflow/start.sh calls it


@pytest.fixture(scope="module")
def server(s3, tmp_path_factory):
    """Address and password."""
    s3.create_bucket(Bucket=BUCKET)
    folder = tmp_path_factory.mktemp("servers")
    with postgres(folder / "postgres") as database, mlflow_server(folder / "mlflow", database) as found:
        yield found


@pytest.fixture(scope="module")
def finished(server, tmp_path_factory):
    """Output folder and process of the smallest preset with its runs and its model on the server."""
    output = tmp_path_factory.mktemp("run")
    return output, run_pipeline("full", output, server, server[1])


def run_pipeline(script, output, server, password, *more):
    """A pipeline as a user starts it: the password in the environment, the address in the settings."""
    secrets = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": password}
    hidden = {"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}  # artifacts go through the server: a client needs no key of the store
    words = [f"pipelines/{script}.py", *more, "--preset", "toy_tiny", "--output", str(output)]
    command = [sys.executable, *words, "--set", f"tracking.uri={server[0]}"]
    return subprocess.run(command, cwd=ROOT, env=os.environ | secrets | hidden, capture_output=True, text=True, timeout=850)


def call(server, path, password):
    """An answer of MLflow's REST API."""
    token = base64.b64encode(f"admin:{password}".encode()).decode()
    request = urllib.request.Request(f"{server[0]}/api/2.0/mlflow/{path}", headers={"Authorization": f"Basic {token}"})
    return json.load(urllib.request.urlopen(request, timeout=60))


def test_the_run_ends_with_a_version_on_the_server(server, finished):
    output, done = finished
    assert done.returncode == 0, done.stderr[-3000:]
    assert not (output / "mlflow.db").exists() and not (output / "mlartifacts").exists()
    version = call(server, "registered-models/alias?name=refalign&alias=challenger", server[1])["model_version"]
    assert version["version"] == "1"
    runs = call(server, f"runs/get?run_id={version['run_id']}", server[1])["run"]
    assert runs["info"]["status"] == "FINISHED" and runs["info"]["artifact_uri"].startswith("mlflow-artifacts:")


def test_artifacts_lie_in_the_store(s3, finished):
    keys = [entry["Key"] for page in s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET) for entry in page["Contents"]]
    assert any(key.endswith("report.html") for key in keys)
    assert any(key.endswith("diffusion_pytorch_model.safetensors") for key in keys)


def test_a_second_run_finds_all_done(server, finished):
    done = run_pipeline("full", finished[0], server, server[1])
    assert done.returncode == 0 and "register: done before, skipped" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]


def test_promotion_works_over_http(server, finished):
    done = run_pipeline("register", finished[0], server, server[1], "promote")
    assert done.returncode == 3 and "undecided" in done.stdout + done.stderr, done.stderr[-2000:]  # too few prompts to decide
    listed = run_pipeline("register", finished[0], server, server[1], "list")
    assert listed.returncode == 0 and "challenger" in listed.stdout


def test_a_wrong_password_is_one_clear_line(server, finished, tmp_path):
    done = run_pipeline("full", tmp_path / "new", server, "wrong-" + server[1])
    assert done.returncode not in (0, 3)
    (line,) = [line for line in done.stderr.splitlines() if "MLFLOW_TRACKING_PASSWORD" in line]
    assert server[0] in line and server[1] not in done.stderr + done.stdout and "Traceback" not in done.stderr
    with pytest.raises(urllib.error.HTTPError, match="401"):
        call(server, "registered-models/get?name=refalign", "wrong")


def test_a_server_that_is_gone_is_one_clear_line(finished, tmp_path):
    done = run_pipeline("full", tmp_path / "new", ("http://127.0.0.1:9", ""), "any")
    assert done.returncode not in (0, 3) and "does not answer" in done.stderr and "Traceback" not in done.stderr


def test_no_secret_is_left_in_the_output(server, finished):
    output, done = finished
    assert server[1] not in done.stdout + done.stderr
    for path in output.rglob("*"):
        if path.is_file() and path.suffix in (".json", ".jsonl", ".html", ".md", ".log", ".yaml"):
            assert server[1] not in path.read_text(errors="replace"), path
