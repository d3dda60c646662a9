"""Metrics into one MLflow run: in batches, from a thread, each (metric, step) once whatever is restarted.

MLflow appends: a resumed run that logs its steps again shows every point twice. What the run already has is therefore read
first, and only the rest is sent.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Iterable, Mapping
from typing import Any

from refalign.errors import BackendUnavailable
from refalign.tracking.client import one_line_errors, open_client

_log = logging.getLogger(__name__)
_BATCH = 1000  # MLflow's limit per request
_PAUSE_S = 2.0
_RETRY_S = 10.0
_CLOSE_S = 60.0
Point = tuple[str, int, float, int]
"""Metric name, step, value, time in ms."""


class MetricLogger:
    """Sends one run's metrics from a background thread. A server that is away delays metrics, never the caller."""

    def __init__(self, uri: str, run_id: str) -> None:
        self._uri, self._run_id = uri, run_id
        self._pending: list[Point] = []
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="mlflow-metrics", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Queues the metrics of one step; returns at once."""
        now_ms = int(time.time() * 1000)
        with self._changed:
            self._pending += [(name, step, float(value), now_ms) for name, value in metrics.items()]

    def close(self, timeout_s: float = _CLOSE_S) -> bool:
        """Sends what is queued. Returns False, with a warning, if the server did not take all of it in time."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        if self._pending:
            _log.warning(
                "MLflow did not take all metrics within %g s. The training's metrics.jsonl has them; the next command with this "
                "--output sends them, for example pipelines/train.py with the same flags.",
                timeout_s,
            )
            return False
        return True

    def _work(self) -> None:
        client, known = None, set()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed, timeout=_PAUSE_S)
                batch = self._pending[:_BATCH]
                if not batch and self._closed:
                    return
            if not batch:
                continue
            try:
                if client is None:
                    client = open_client(self._uri)
                    known = _known_points(client, self._uri, self._run_id)
                _send(client, self._uri, self._run_id, batch, known)
            except BackendUnavailable as error:
                _log.warning("%s Metrics wait.", error)
                client = None
                with self._changed:
                    if self._changed.wait_for(lambda: self._closed, timeout=_RETRY_S):
                        return
                continue
            with self._changed:
                del self._pending[: len(batch)]


def log_missing(client: Any, uri: str, run_id: str, metrics: Mapping[int, Mapping[str, float]]) -> None:
    """Logs now, in this thread, those of ``metrics`` (by step) that the run does not have."""
    now_ms = int(time.time() * 1000)
    points = [(name, step, float(value), now_ms) for step, each in metrics.items() for name, value in each.items()]
    _send(client, uri, run_id, points, _known_points(client, uri, run_id, {name for name, *_ in points}))


def _known_points(client: Any, uri: str, run_id: str, names: Iterable[str] | None = None) -> set[tuple[str, int]]:
    """(metric, step) of what the run has, of all metrics or of ``names``."""
    with one_line_errors(uri):
        if names is None:
            names = client.get_run(run_id).data.metrics
        return {(name, point.step) for name in names for point in client.get_metric_history(run_id, name)}


def _send(client: Any, uri: str, run_id: str, points: Iterable[Point], known: set[tuple[str, int]]) -> None:
    """Sends what is not in ``known`` and adds it there; values that are no numbers (NaN) are left to the run's own report."""
    from mlflow.entities import Metric

    fresh: dict[tuple[str, int], tuple[float, int]] = {}
    for name, step, value, at_ms in points:
        if (name, step) not in known:
            fresh.setdefault((name, step), (value, at_ms))  # what was logged first counts, with its time
    with one_line_errors(uri):
        metrics = [Metric(name, value, at_ms, step) for (name, step), (value, at_ms) in fresh.items() if math.isfinite(value)]
        for start in range(0, len(metrics), _BATCH):
            client.log_batch(run_id, metrics=metrics[start : start + _BATCH])
    known.update(fresh)
