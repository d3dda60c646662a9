"""The same story against a real MLflow server, whose files no client can see: everything goes over HTTP."""

import os
import sys

import numpy as np
import pytest
from local_cluster import find_ports

from refalign.config.presets import toy_tiny
from refalign.tracking.metrics import MetricLogger
from refalign.tracking.registry import register_model, resolve_model
from refalign.tracking.run import StoryRun
from tests.serving import serving


@pytest.fixture
def server(tmp_path):
    """Address of a server on this machine; ended, with its workers, after the test."""
    (port,) = find_ports(1)
    address = f"http://127.0.0.1:{port}"
    store = ["--backend-store-uri", f"sqlite:///{tmp_path}/server.db", "--artifacts-destination", str(tmp_path / "store")]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1", *store]
    quiet = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
    with serving(command, f"{address}/health", env=quiet):
        yield address


def test_a_story_over_http_is_one_run_one_version_and_comes_back(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # where downloaded models are kept
    config = toy_tiny()
    config = config.model_copy(update={"tracking": config.tracking.model_copy(update={"uri": server})})
    export = tmp_path / "export"
    (export / "transformer").mkdir(parents=True)
    (export / "transformer" / "config.json").write_text("{}")
    for _ in range(2):
        story = StoryRun.open(config, output=tmp_path, fingerprint="a" * 12)
        logger = MetricLogger(story.uri, story.child("train"))
        for step in range(5):
            logger.log(step, {"total": 1.0 / (1 + step)})
        assert logger.close()
        story.log_image("shards", np.zeros((8, 8, 3), np.uint8), "contact_sheets/a.png")
        model = register_model(story, config, key="k", export_folder=export, card="card", tags={})
        story.finish()
    assert model.version == "1"
    assert len(story.client.search_runs([story.experiment_id])) == 4  # the story, train, shards, register
    assert len(story.client.get_metric_history(story.child("train"), "total")) == 5
    folder = resolve_model(model.uri, server)
    assert (folder / "transformer" / "config.json").read_text() == "{}"
    assert folder.is_relative_to(tmp_path / "home") and resolve_model(model.uri, server) == folder
