"""A run against a real MLflow server, whose files no client can see: everything goes over HTTP."""

import os
import signal
import sys
import time

import numpy as np
import pytest
from local_cluster import find_ports

from refalign.config.presets import toy_tiny
from refalign.tracking.registry import register_model, resolve_model
from refalign.tracking.run import TrackedRun
from refalign.training.follower import follow
from refalign.training.records import UNSENT, append_record, truncate_records
from tests.serving import serving


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Address and process of a server on this machine; ended, with its workers, after the tests."""
    folder = tmp_path_factory.mktemp("server")
    (port,) = find_ports(1)
    address = f"http://127.0.0.1:{port}"
    store = ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", str(folder / "store")]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1", *store]
    quiet = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
    with serving(command, f"{address}/health", env=quiet) as process:
        yield address, process


def test_a_run_over_http_is_one_run_one_version_and_comes_back(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # where downloaded models are kept
    address, _ = server
    config = toy_tiny()
    config = config.model_copy(update={"tracking": config.tracking.model_copy(update={"uri": address})})
    export = tmp_path / "export"
    (export / "transformer").mkdir(parents=True)
    (export / "transformer" / "config.json").write_text("{}")
    for _ in range(2):
        tracked = TrackedRun.open(config, output=tmp_path, fingerprint="a" * 12)
        metrics = tmp_path / "metrics.jsonl"
        with follow(metrics, 5, tracking_uri=tracked.uri, run_id=tracked.child("train"), progress=False):
            truncate_records(metrics, -1)
            for step in range(5):
                append_record(metrics, {"step": step, "stage": "only", "total": 1.0 / (1 + step)})
        assert not (tmp_path / UNSENT).exists()
        tracked.log_image("shards", np.zeros((8, 8, 3), np.uint8), "contact_sheets/a.png")
        model = register_model(tracked, config, key="k", export_folder=export, card="card", tags={})
        tracked.finish()
    assert model.version == "1"
    assert len(tracked.client.search_runs([tracked.experiment_id])) == 4  # the parent, train, shards, register
    assert len(tracked.client.get_metric_history(tracked.child("train"), "total")) == 5
    folder = resolve_model(model.uri, address)
    assert (folder / "transformer" / "config.json").read_text() == "{}"
    assert folder.is_relative_to(tmp_path / "home") and resolve_model(model.uri, address) == folder


def test_a_server_that_answers_again_gets_what_waited(server, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("refalign.tracking.client._FIRST_CONTACT_S", 1.0)
    monkeypatch.setattr("refalign.training.follower._RETRY_S", 0.5)
    address, process = server
    config = toy_tiny()
    config = config.model_copy(update={"tracking": config.tracking.model_copy(update={"uri": address, "experiment": "away"})})
    tracked = TrackedRun.open(config, output=tmp_path, fingerprint="b" * 12)
    metrics, run_id = tmp_path / "metrics.jsonl", tracked.child("train")

    def wait_until(is_true):
        end = time.monotonic() + 60
        while not is_true():
            assert time.monotonic() < end
            time.sleep(0.1)

    def count():
        return len(tracked.client.get_metric_history(run_id, "total"))

    with follow(metrics, 5, tracking_uri=address, run_id=run_id, progress=False):
        append_record(metrics, {"step": 1, "stage": "only", "total": 1.0})
        wait_until(lambda: count() == 1)
        os.killpg(process.pid, signal.SIGSTOP)
        try:
            append_record(metrics, {"step": 2, "stage": "only", "total": 0.5})
            wait_until(lambda: "does not answer" in caplog.text)
        finally:
            os.killpg(process.pid, signal.SIGCONT)
        wait_until(lambda: count() == 2)
    assert [point.step for point in tracked.client.get_metric_history(run_id, "total")] == [1, 2]
    assert not (tmp_path / UNSENT).exists() and caplog.text.count("Metrics wait") == 1
