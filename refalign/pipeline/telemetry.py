"""What Prometheus sees of a run: every Ray node serves it beside Ray's own metrics, with the prefix ``ray_``.

The driver counts committed parts and reads the training's metrics. A process that has not joined Ray counts nothing.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from functools import cache
from typing import Any

from refalign.pipeline.outcomes import Commit

TRAINING = {
    "step": "Optimizer steps done",
    "total": "Loss of the newest step",
    "flow_matching": "Its flow matching term",
    "pull": "Its pull term",
    "push": "Its push term",
    "validation/total": "Newest loss on held-out samples",
    "step_s": "Seconds of the newest step",
    "data_wait_s": "Seconds that it waited for data",
    "tokens_per_s": "Tokens per second of all ranks",
    "tflops_per_rank": "TFLOP/s of one rank",
    "peak_memory_bytes": "Most memory that a rank has held",
}
"""Numbers of a training record that become gauges, and what Prometheus says they are."""


def count_part(step: str, commit: Commit) -> None:
    """Counts one committed part of a step, and the videos and clips that it accounts for.

    An item that became clips or samples has the reason ``WRITTEN``.
    """
    if not _has_ray():
        return
    _metric("Counter", "refalign_parts", "Parts committed", "step").inc(tags={"step": step})
    outcomes = Counter((outcome.level, outcome.reason or "WRITTEN") for outcome in commit.outcomes)
    items = _metric("Counter", "refalign_items", "Videos and clips accounted for", "step", "level", "reason")
    for (level, reason), count in outcomes.items():
        items.inc(count, tags={"step": step, "level": level, "reason": reason})


def show_training(record: Mapping[str, Any]) -> None:
    """Shows the numbers of the newest optimizer step, by training stage."""
    if not _has_ray():
        return
    for name in TRAINING.keys() & record.keys():
        gauge = _metric("Gauge", name_gauge(name), TRAINING[name], "stage")
        gauge.set(record[name], tags={"stage": record.get("stage", "")})


def name_gauge(name: str) -> str:
    """The metric's name, without Ray's prefix."""
    return f"refalign_training_{name.replace('/', '_')}"


def _has_ray() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


@cache
def _metric(kind: str, name: str, description: str, *tags: str) -> Any:
    from ray.util import metrics

    return getattr(metrics, kind)(name, description=description, tag_keys=tags)
