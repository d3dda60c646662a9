"""Metrics into one MLflow run, each (metric, step) once whatever is restarted.

MLflow appends: a resumed run that logs its steps again shows every point twice. What the run has is therefore read, and only the
rest is sent.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from typing import Any

from refalign.tracking.client import one_line_errors

_BATCH = 1000  # MLflow's limit per request


class RunMetrics:
    """The metrics of one run, sent from the caller's thread. After an error, make another one: it reads again what arrived."""

    def __init__(self, client: Any, uri: str, run_id: str) -> None:
        self._client, self._uri, self._run_id = client, uri, run_id
        self._steps: dict[str, set[int]] = {}

    def send(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Sends those numbers of the records that the run lacks; of two for one step the first counts.

        Args:
            records: each with its "step". What is no number is left out, and so is NaN: the run's own report has it.

        Raises:
            BackendUnavailable: MLflow does not answer, or refuses.
        """
        from mlflow.entities import Metric

        now_ms, fresh = int(time.time() * 1000), []
        with one_line_errors(self._uri):
            for record in records:
                for name, value in record.items():
                    if name == "step" or not isinstance(value, int | float) or not math.isfinite(value):
                        continue
                    if name not in self._steps:
                        self._steps[name] = {point.step for point in self._client.get_metric_history(self._run_id, name)}
                    if record["step"] not in self._steps[name]:
                        self._steps[name].add(record["step"])
                        fresh.append(Metric(name, float(value), now_ms, record["step"]))
            for start in range(0, len(fresh), _BATCH):
                self._client.log_batch(self._run_id, metrics=fresh[start : start + _BATCH])
