"""``metrics.jsonl``: one line per optimizer step, written by the first rank, read by the driver, the report and the manifest.

A line holds ``step``, ``stage``, ``ranks``, every field of `LossTerms`, ``learning_rate``, ``grad_norm``, ``samples_consumed``;
what `refalign.training.measures.Meter` adds: ``flow_matching/q1`` (cleanest quarter of the schedule) to ``q4``,
``timesteps/000`` to ``900`` (samples drawn per tenth), ``tokens_per_s``, ``tflops_per_rank``, ``mfu`` on known GPUs,
``peak_memory_bytes`` of rank 0; ``step_s``, ``data_wait_s``, ``data_wait_share``; now and then ``grad_norm/flow_matching`` and
``grad_norm/alignment``. A validation adds ``validation/<field>``. Line 0 is the validation before the first step.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from refalign.io.writing import write_bytes

FILE_NAME = "metrics.jsonl"
UNSENT = "unsent"
"""Empty file beside it while MLflow may lack some of the lines."""


def truncate_records(path: Path, last_step: int) -> None:
    """Drops lines after ``last_step`` and a last line that was cut off: the resumed run writes them again."""
    if not path.exists():
        return
    kept = [record for record in read_records(path) if record["step"] <= last_step]
    write_bytes(path, "".join(_to_line(record) for record in kept).encode())


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Adds one whole line."""
    with path.open("a") as file:
        file.write(_to_line(record))


def read_records(path: Path) -> list[dict[str, Any]]:
    """All whole lines, in order; none if there is no file."""
    return RecordReader(path).read_new()


class RecordReader:
    """Reads a growing file line by line; begins again when a resumed run has replaced it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode = 0
        self._offset = 0

    def read_new(self) -> list[dict[str, Any]]:
        """Whole lines since the last call."""
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            return []
        with file:
            inode = os.fstat(file.fileno()).st_ino
            if inode != self._inode:
                self._inode, self._offset = inode, 0
            file.seek(self._offset)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        return [json.loads(line) for line in whole.splitlines()]


def summarize_records(records: list[dict[str, Any]], names: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """First and last value of each of ``names`` over the lines that have it."""
    summary = {}
    for name in names:
        values = [record[name] for record in records if name in record]
        if values:
            summary[name] = {"first": values[0], "last": values[-1]}
    return summary


def _to_line(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"
