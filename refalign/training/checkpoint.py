"""Checkpoints of a run: a torch.distributed.checkpoint folder, committed by ``state.json``.

    <run folder>/checkpoints/step-000045/
        __0_0.distcp ... .metadata     weights, optimizer, moving average; each rank writes its shards
        state.json                     written last: its presence means the checkpoint is whole; size and digest of every file

Saved on any number of ranks, loaded on any other. ``.metadata`` is a pickle: read checkpoints of your own runs only.
Tensors are copied to host memory and written from there by a thread, at most one checkpoint at a time. If the run ends before
the commit, the checkpoint before it stays the newest.
"""

from __future__ import annotations

import shutil
import sys
import time
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from torch import nn

from refalign.config import CheckpointConfig, describe_problems
from refalign.errors import ArtifactError
from refalign.io.storage import sha256_of
from refalign.io.untrusted import parse_json_object
from refalign.io.writing import write_json
from refalign.training.models import Ranks
from refalign.training.optim import Ema

CHECKPOINT_SCHEMA = 1
"""Raised when the layout of the saved tensors changes."""
_CLOSE_S = 120.0
_DIGESTS = "digests-{}.json"  # of one rank's files, until the first rank has collected them


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class TrainState:
    """Where a run stands; everything that is not a tensor.

    Attributes:
        step: optimizer steps taken.
        stage: stage of the last step taken.
        samples_consumed: position in the sample order.
        seed, shard_digest, global_batch, mixture: what decides the data order; a resumed run must have the same.
        validation_total: of this step; None where it was not validated.
        files: name -> sha256 of every other file; None in checkpoints of versions that did not record it.
    """

    step: int
    stage: str
    samples_consumed: int
    seed: int
    shard_digest: str
    global_batch: int
    schema: int = CHECKPOINT_SCHEMA
    mixture: dict[str, float] | None = None
    validation_total: float | None = None
    files: dict[str, str] | None = None


_STATE = TypeAdapter(TrainState)


class Checkpointer:
    """Writes the checkpoints of one run; every rank has one and calls it at the same steps."""

    def __init__(self, folder: Path, ranks: Ranks, config: CheckpointConfig) -> None:
        """Makes a process group of its own, so that writing and training do not wait for each other's collectives.

        Args:
            folder: the run's ``checkpoints`` folder, visible to all ranks.
            config: which checkpoints stay.
        """
        self._folder, self._ranks, self._config = folder, ranks, config
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="commit")
        self._pending: Future[None] | None = None

    def save(self, state: TrainState, module: nn.Module, optimizer: torch.optim.Optimizer, ema: Ema | None) -> None:
        """Begins a checkpoint once the one before it is written; returns when the tensors are copied to host memory.

        Raises:
            ArtifactError: the one before could not be written.
        """
        self.wait()
        target = self._folder / f"step-{state.step:06d}"
        if self._ranks.is_first and target.exists():
            shutil.rmtree(target)  # of a run that ended before its commit, or of one that was resumed from an earlier checkpoint
        self._ranks.barrier()
        written = dcp.async_save(_tensors_of(module, optimizer, ema), checkpoint_id=target, process_group=self._group)
        self._pending = self._thread.submit(self._commit, written, target, state)

    def wait(self) -> None:
        """Waits until the checkpoint in flight is committed, on all ranks.

        Raises:
            ArtifactError: it could not be written.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        try:
            pending.result()
        except (dcp.api.CheckpointException, RuntimeError, OSError) as error:
            raise ArtifactError(
                f"{self._folder}: a checkpoint could not be written ({_find_cause(error)}); make room or mend the storage. "
                "The same command resumes from the one before."
            ) from error
        self._ranks.barrier()

    def close(self) -> None:
        """Lets a checkpoint in flight end after another failure; its own failure is ignored, since it is not committed then."""
        if self._pending is not None:
            wait_for([self._pending], timeout=_CLOSE_S)
        self._thread.shutdown(wait=False)

    def _commit(self, written: Any, target: Path, state: TrainState) -> None:
        written.result()  # on the first rank: all ranks have written
        mine = {path.name: sha256_of(path) for path in _written_by(self._ranks.rank, target)}
        write_json(target / _DIGESTS.format(self._ranks.rank), mine)
        if not self._ranks.is_first:
            return
        write_json(target / "state.json", asdict(replace(state, files=self._collect_digests(target))))
        committed = _list_committed(self._folder)
        best = best_checkpoint(self._folder) if self._config.keep_best else None
        for old in committed[: -self._config.keep]:
            if old != best:
                (old / "state.json").unlink()  # first: a half-deleted checkpoint must not look whole
                shutil.rmtree(old)

    def _collect_digests(self, target: Path) -> dict[str, str]:
        """Those of all ranks, by file; no collective, because this runs beside training."""
        paths = [target / _DIGESTS.format(rank) for rank in range(self._ranks.size)]
        end = time.monotonic() + _CLOSE_S
        while missing := [path.name for path in paths if not path.is_file()]:
            if time.monotonic() > end:
                raise OSError(f"{missing[0]} is missing after {_CLOSE_S:g} s")
            time.sleep(0.05)
        digests = [parse_json_object(path.read_text()) for path in paths]
        for path in paths:
            path.unlink()
        return {name: digest for each in digests for name, digest in each.items()}


def _written_by(rank: int, checkpoint: Path) -> list[Path]:
    """Files of one rank; the metadata are the first one's."""
    return [*checkpoint.glob(f"__{rank}_*"), *(checkpoint.glob(".metadata") if rank == 0 else ())]


def find_intact(folder: Path, ranks: Ranks, *, fall_back: bool) -> Path | None:
    """The newest checkpoint whose files are unchanged since they were written; None without any. All ranks call it.

    Args:
        fall_back: skips damaged checkpoints, with a printed line for each.

    Raises:
        ArtifactError: the newest one is damaged and ``fall_back`` is False, or every one is.
    """
    # The first rank's view counts: a shared folder may show another rank an older state for some seconds.
    found = ranks.gather(list(reversed(_list_committed(folder))))[0]
    faults = []
    for checkpoint in found:
        fault = next((each for each in ranks.gather(_find_damage(checkpoint, ranks)) if each), None)
        if fault is None:
            return checkpoint
        if not fall_back:
            raise ArtifactError(
                f"{fault}. Restore it, delete {checkpoint}, or set training.checkpoint.on_damaged=fall_back to resume from the "
                "checkpoint before it."
            )
        faults.append(fault)
        if ranks.is_first:
            print(f"{fault}; trying the checkpoint before it", file=sys.stderr, flush=True)
    if faults:
        raise ArtifactError(f"{faults[0]}. No checkpoint before it is whole: restore one, or delete {folder} and begin anew.")
    return None


def _find_damage(checkpoint: Path, ranks: Ranks) -> str | None:
    """What is wrong with this rank's share of the files."""
    try:
        expected = load_state(checkpoint).files or {}
    except ArtifactError as error:
        return str(error)
    for name in sorted(expected)[ranks.rank :: ranks.size]:
        if not (checkpoint / name).is_file():
            return f"{checkpoint / name}: missing"
        if sha256_of(checkpoint / name) != expected[name]:
            return f"{checkpoint / name}: damaged, its bytes are not those that were written"
    return None


def _find_cause(error: BaseException) -> str:
    """The first cause in one line; the messages of torch's checkpoints begin with a traceback."""
    if isinstance(error, dcp.api.CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest committed checkpoint below ``folder``, or None."""
    committed = _list_committed(folder)
    return committed[-1] if committed else None


def best_checkpoint(folder: Path) -> Path | None:
    """The committed checkpoint with the lowest validation total, the newest of equals; None if none was validated."""
    totals = {path: _load_total(path) for path in reversed(_list_committed(folder))}
    known = {path: total for path, total in totals.items() if total is not None}
    return min(known, key=lambda path: known[path]) if known else None


def _load_total(checkpoint: Path) -> float | None:
    try:
        return load_state(checkpoint).validation_total
    except ArtifactError:  # a damaged one is reported when a run resumes from it
        return None


def load_state(checkpoint: Path) -> TrainState:
    """Reads ``state.json``.

    Raises:
        ArtifactError: it is damaged or of another schema.
    """
    path = checkpoint / "state.json"
    try:
        values = parse_json_object(path.read_text())
        if values["schema"] != CHECKPOINT_SCHEMA:
            raise ArtifactError(
                f"{path}: checkpoint schema {values['schema']}, this version reads {CHECKPOINT_SCHEMA}; "
                "use the version that wrote it."
            )
        return _STATE.validate_python(values)
    except (OSError, ValueError, KeyError) as error:
        reason = describe_problems(error) if isinstance(error, ValidationError) else error
        raise ArtifactError(f"{path}: damaged ({reason}); delete {checkpoint} to resume from the one before.") from error


def check_resumable(checkpoint: Path, now: TrainState) -> TrainState:
    """The state of ``checkpoint``, if a run in the state ``now`` continues it with the same data order.

    Raises:
        ArtifactError: names each setting that differs, with both values.
    """
    state = load_state(checkpoint)
    values = {name: (getattr(state, name), getattr(now, name)) for name in ("shard_digest", "global_batch", "seed", "mixture")}
    if differing := [f"{name} was {old!r}, now {new!r}" for name, (old, new) in values.items() if old != new]:
        raise ArtifactError(
            f"{checkpoint}: cannot resume, the data order would change: {'; '.join(differing)}. "
            "Restore the old value, or start over by deleting the checkpoints folder."
        )
    return state


def load_checkpoint(checkpoint: Path, module: nn.Module, optimizer: torch.optim.Optimizer | None, ema: Ema | None) -> None:
    """Loads tensors in place, resharding to the present number of ranks; all ranks call it.

    Args:
        optimizer: None leaves the saved optimizer aside (the next step begins a new stage).

    Raises:
        ArtifactError: a tensor is missing or of another shape: it is another model's checkpoint, or damaged.
    """
    tensors = _tensors_of(module, optimizer, ema)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(tensors, checkpoint_id=checkpoint)
    except (dcp.api.CheckpointException, RuntimeError, ValueError, OSError) as error:
        raise ArtifactError(
            f"{checkpoint}: cannot be loaded ({_find_cause(error)}); delete it to resume from the one before."
        ) from error


def _tensors_of(module: nn.Module, optimizer: torch.optim.Optimizer | None, ema: Ema | None) -> dict[str, Any]:
    """The live tensors that a run changes, under names that do not depend on the number of ranks."""
    tensors: dict[str, Any] = {"weights": {name: each for name, each in module.named_parameters() if each.requires_grad}}
    if optimizer is not None:
        trained = ((name, parameter) for name, parameter in module.named_parameters() if parameter in optimizer.state)
        tensors["optimizer"] = {name: dict(optimizer.state[parameter]) for name, parameter in trained}
    if ema is not None:
        tensors["ema"] = dict(ema.weights)
    return tensors


def _list_committed(folder: Path) -> list[Path]:
    """Committed checkpoints, oldest first."""
    steps = {path: path.name.removeprefix("step-") for path in folder.glob("step-*") if (path / "state.json").is_file()}
    return sorted((path for path, step in steps.items() if step.isdecimal()), key=lambda path: int(steps[path]))
