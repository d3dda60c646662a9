"""What a run leaves. ``metrics.jsonl``: a line per optimizer step, written by the first rank, read by driver and report."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Required

from typing_extensions import TypedDict  # pydantic takes no other before Python 3.12

from refalign.io.writing import write_bytes

FILE_NAME = "metrics.jsonl"
UNSENT = "unsent"
"""Empty file beside it while MLflow may lack some of the lines."""


@dataclass(frozen=True)
class Trained:
    """What a finished run leaves, the same on every rank. Here because Ray's own processes load it: this file imports no torch.

    Attributes:
        best: checkpoint with the lowest validation total; None if none was validated.
        resumed_from: step of the checkpoint that the run resumed from; 0 from the start.
    """

    checkpoint: Path
    best: Path | None
    export: Path
    resumed_from: int


class Record(TypedDict, total=False):
    """One line. Line 0 has the validation before the first step, and only that.

    Besides these it has every field of `LossTerms`; what `refalign.training.measures.Meter` adds: ``flow_matching/q1`` (the
    quarter of the schedule nearest to data) to ``q4``, ``timesteps/000`` to ``900`` (samples drawn per tenth), ``tokens_per_s``,
    ``tflops_per_rank``, ``mfu`` on known GPUs, ``peak_memory_bytes`` of rank 0; in some steps ``grad_norm/flow_matching`` and
    ``grad_norm/alignment``; in validated steps ``validation/<field>``.
    """

    step: Required[int]
    stage: Required[str]
    ranks: int
    samples_consumed: int
    total: float
    learning_rate: float
    grad_norm: float
    step_s: float
    data_wait_s: float
    data_wait_share: float  # of data_wait_s + step_s


class Ends(TypedDict):
    first: float
    last: float


def truncate_records(path: Path, last_step: int) -> None:
    """Drops lines after ``last_step`` and an incomplete last line: the resumed run writes them again."""
    if path.exists():
        kept = [record for record in read_records(path) if record["step"] <= last_step]
        write_bytes(path, "".join(json.dumps(record) + "\n" for record in kept).encode())


def append_record(path: Path, record: Record) -> None:
    """Adds one whole line."""
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def read_records(path: Path) -> list[Record]:
    """All whole lines, in order; none if there is no file."""
    return RecordReader(path).read_new()


class RecordReader:
    """Reads a growing file line by line; begins again when a resumed run has replaced it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode = 0
        self._offset = 0

    def read_new(self) -> list[Record]:
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


def summarize_records(records: Sequence[Mapping[str, Any]], names: Iterable[str]) -> dict[str, Ends]:
    """First and last value of each of ``names`` over the lines that have it."""
    values = {name: [record[name] for record in records if name in record] for name in names}
    return {name: {"first": found[0], "last": found[-1]} for name, found in values.items() if found}
