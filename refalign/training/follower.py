"""From a run's ``metrics.jsonl`` to a progress bar, to Prometheus and to MLflow, in a thread of the driver.

Lines that are not read yet are the queue for MLflow. The file `UNSENT` lies beside it until MLflow has all of them: if the server
was away or the driver was killed, a later run sends the rest.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from refalign.errors import BackendUnavailable
from refalign.pipeline.telemetry import show_training
from refalign.tracking.client import check_server, open_client
from refalign.tracking.run import RunMetrics
from refalign.training.records import UNSENT, RecordReader

_log = logging.getLogger(__name__)
_POLL_S = 0.5
_SEND_S, _RETRY_S = 2.0, 10.0
_CLOSE_S = 60.0


@contextmanager
def follow(
    path: Path, total_steps: int, *, tracking_uri: str | None = None, run_id: str | None = None, progress: bool = True
) -> Iterator[None]:
    """Shows and sends each new line of ``path`` until the block ends, and waits up to a minute for what is left then.

    Args:
        tracking_uri: MLflow server of ``run_id``; without both nothing is sent.
        progress: show a progress bar.
    """
    from tqdm import tqdm

    sender = _Sender(path, tracking_uri, run_id) if tracking_uri is not None and run_id is not None else None
    done, reader = threading.Event(), RecordReader(path)
    bar = tqdm(total=total_steps, desc="train", unit="step", disable=not progress)

    def show() -> None:
        for record in reader.read_new():
            show_training(record)
            if bar.n == 0:
                bar.unpause()  # the rate counts from here: loading is over
            if "total" in record:
                bar.set_postfix_str(f"{record['stage']}, loss {record['total']:.3f}", refresh=False)
            bar.update(record["step"] - bar.n)

    def work() -> None:
        due_s = 0.0
        while not done.wait(_POLL_S):
            show()
            if sender and time.monotonic() >= due_s:
                pause_s = _SEND_S if sender.send() else _RETRY_S
                due_s = time.monotonic() + pause_s  # counted from here: it takes seconds to find a server away
        if sender and sender.send():
            sender.unsent.unlink(missing_ok=True)

    thread = threading.Thread(target=work, name="follow-metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(_CLOSE_S)
        show()
        bar.close()
        if sender and sender.unsent.exists():
            _log.warning(
                "MLflow did not take all metrics. The training's metrics.jsonl has them; the next command with this --output "
                "sends them, for example pipelines/train.py with the same flags."
            )


class _Sender:
    """Sends the lines of a file to one MLflow run. After a failure it reads the file and the run's metrics again."""

    def __init__(self, path: Path, uri: str, run_id: str) -> None:
        self._path, self._uri, self._run_id = path, uri, run_id
        self._open: tuple[RecordReader, RunMetrics] | None = None
        self._is_away = False
        self.unsent = path.with_name(UNSENT)
        self.unsent.touch()

    def send(self) -> bool:
        """Sends the new lines and returns whether it could; warns at the first failure."""
        try:
            if self._open is None:
                self._open = RecordReader(self._path), RunMetrics(open_client(self._uri), self._run_id)
            reader, metrics = self._open
            if records := reader.read_new():
                check_server(self._uri)  # within seconds; MLflow's own client tries for half a minute
                metrics.send(records)
            self._is_away = False
        except BackendUnavailable as error:
            if not self._is_away:
                _log.warning("%s Metrics wait.", error)
            self._open, self._is_away = None, True
        return not self._is_away
