"""Commits two parts and two training records under Ray and prints what the node then serves to Prometheus."""

import sys
import time
import urllib.request
from pathlib import Path

from refalign.config import ClusterConfig
from refalign.config.presets import toy_tiny
from refalign.pipeline.ray_data import connect, run_parts
from refalign.pipeline.steps import Step
from refalign.pipeline.telemetry import show_training

WAIT_S = 120


class Writer:
    """Writes a part that says what it was told to."""

    def __init__(self, config):
        """Needs nothing of the configuration."""

    def make_part(self, step, name, work):
        """Commits the outcomes given."""

        def write(path):
            path.write_text("part")
            return {"outcomes": [{"level": "video", "item": str(item), "reason": why} for item, why in enumerate(work)]}

        return step.write_part(name, write)


def read_metrics():
    """The text of the first node's endpoint."""
    import ray

    (node,) = ray.nodes()
    with urllib.request.urlopen(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", timeout=10) as answer:
        return answer.read().decode()


def main():
    """Prints the metrics as soon as the last number is among them."""
    with connect(ClusterConfig()):
        step = Step.make(Path(sys.argv[1]), "subjects", "observed")
        run_parts(step, {"a": ["", "NO_SUBJECT"], "b": ["", ""]}, Writer, toy_tiny(), label="observed")
        show_training({"step": 1, "stage": "stage1", "total": 1.0, "step_s": 0.1})
        show_training({"step": 2, "stage": "stage1", "total": 0.5, "step_s": 0.1, "validation/total": 0.75})
        end = time.monotonic() + WAIT_S
        wanted = ("ray_refalign_training_validation_total{", "ray_refalign_items_total{", "ray_node_mem_used{")
        while not all(name in (text := read_metrics()) for name in wanted):
            assert time.monotonic() < end, text[-2000:]
            time.sleep(1)
        print(text)


if __name__ == "__main__":
    main()
