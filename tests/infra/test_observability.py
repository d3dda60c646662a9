"""The dashboard shows what a real Ray node serves while parts are committed and training goes on."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from refalign.pipeline.telemetry import TRAINING, name_gauge
from tests.infra.manifests import INFRA, load_yaml

DASHBOARD = json.loads((INFRA / "grafana/refalign.json").read_text())
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
NAMES = set(re.findall(r"ray_\w+", " ".join(QUERIES)))
PROGRAM = Path(__file__).with_name("observed_program.py")


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The text of the metrics endpoint after two parts and two training records."""
    command = [sys.executable, str(PROGRAM), str(tmp_path_factory.mktemp("observed"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def find_value(text, name, **tags):
    """The value of one series."""
    for line in text.splitlines():
        if line.startswith(name + "{") and all(f'{tag}="{value}"' in line for tag, value in tags.items()):
            return float(line.rpartition(" ")[2])
    raise AssertionError(f"{name} {tags} is not served")


def test_parts_and_reasons_are_counted(served):
    assert find_value(served, "ray_refalign_parts_total", step="subjects") == 2
    items = {"step": "subjects", "level": "video"}
    assert find_value(served, "ray_refalign_items_total", reason="WRITTEN", **items) == 3
    assert find_value(served, "ray_refalign_items_total", reason="NO_SUBJECT", **items) == 1


def test_the_newest_step_is_shown(served):
    assert find_value(served, "ray_refalign_training_step", stage="stage1") == 2
    assert find_value(served, "ray_refalign_training_total", stage="stage1") == 0.5
    assert find_value(served, "ray_refalign_training_validation_total", stage="stage1") == 0.75


def test_the_dashboard_asks_for_what_is_served(served):
    known = set(re.findall(r"^# TYPE (\w+)", served, re.MULTILINE)) | {f"ray_{name_gauge(name)}" for name in TRAINING}
    missing = {name for name in NAMES if name not in known} - {"ray_node_gpus_utilization"}  # absent without GPUs
    assert not missing


def test_every_training_gauge_has_a_place_on_the_dashboard():
    assert {f"ray_{name_gauge(name)}" for name in TRAINING} <= NAMES


def test_prometheus_scrapes_the_nodes_of_the_compose_file():
    services = load_yaml("compose.yaml")["services"]
    (job,) = load_yaml("grafana/prometheus.yml")["scrape_configs"]
    for target in job["static_configs"][0]["targets"]:
        host, port = target.split(":")
        assert f"--metrics-export-port={port}" in services[host]["command"]
