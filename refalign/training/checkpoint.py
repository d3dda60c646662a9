"""Checkpoints of a run: a torch.distributed.checkpoint folder, committed by ``state.json``.

    <run folder>/checkpoints/step-000045/
        __0_0.distcp ... .metadata     weights, optimizer, moving average; each rank writes its shards
        state.json                     written last: its presence means the checkpoint is whole

Saved on any number of ranks, loaded on any other. ``.metadata`` is a pickle: read checkpoints of your own runs only.
"""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from refalign.errors import ArtifactError
from refalign.steps import write_json
from refalign.training.models import Ranks
from refalign.training.optim import Ema

CHECKPOINT_SCHEMA = 1
"""Raised when the layout of the saved tensors changes."""


@dataclass(frozen=True)
class TrainState:
    """Where a run stands; everything that is not a tensor.

    Attributes:
        step: optimizer steps taken.
        stage: stage of the last step taken.
        samples_consumed: position in the sample order.
        seed, shard_digest, global_batch, schema: what a resumed run must have in common with this one.
    """

    step: int
    stage: str
    samples_consumed: int
    seed: int
    shard_digest: str
    global_batch: int
    schema: int = CHECKPOINT_SCHEMA


def save_checkpoint(
    folder: Path,
    state: TrainState,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: Ema | None,
    ranks: Ranks,
    *,
    keep: int,
) -> Path:
    """Writes and commits a checkpoint; all ranks call it. Then deletes all but the newest ``keep``.

    Args:
        folder: the run's ``checkpoints`` folder, visible to all ranks.

    Returns:
        the checkpoint's folder.
    """
    target = folder / f"step-{state.step:06d}"
    if ranks.is_first and target.exists():
        shutil.rmtree(target)  # left by a run that ended before its commit, or older than the resumed one
    ranks.barrier()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save(_tensors_of(module, optimizer, ema), checkpoint_id=target)
    ranks.barrier()
    if ranks.is_first:
        write_json(target / "state.json", asdict(state))
        for old in _list_committed(folder)[:-keep]:
            (old / "state.json").unlink()  # first: a half-deleted checkpoint must not look whole
            shutil.rmtree(old)
    ranks.barrier()
    return target


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest committed checkpoint below ``folder``, or None."""
    committed = _list_committed(folder)
    return committed[-1] if committed else None


def load_state(checkpoint: Path) -> TrainState:
    """Reads ``state.json``.

    Raises:
        ArtifactError: it is damaged or of another schema.
    """
    path = checkpoint / "state.json"
    try:
        values = json.loads(path.read_text())
        schema = values["schema"]
    except (OSError, ValueError, KeyError) as error:
        raise ArtifactError(f"{path}: damaged ({error}); delete {checkpoint} to resume from the one before.") from error
    if schema != CHECKPOINT_SCHEMA:
        raise ArtifactError(
            f"{path}: checkpoint schema {schema}, this version reads {CHECKPOINT_SCHEMA}; use the version that wrote it."
        )
    return TrainState(**values)


def check_resumable(checkpoint: Path, *, shard_digest: str, global_batch: int, seed: int) -> TrainState:
    """The state of ``checkpoint`` if continuing from it gives what an uninterrupted run would have given.

    Raises:
        ArtifactError: names each setting that differs, with both values.
    """
    state = load_state(checkpoint)
    now = {"shard_digest": shard_digest, "global_batch": global_batch, "seed": seed}
    then = asdict(state)
    differing = [f"{name} was {then[name]!r}, now {value!r}" for name, value in now.items() if then[name] != value]
    if differing:
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
        reason = " ".join(str(error).split())[:300]
        raise ArtifactError(f"{checkpoint}: cannot be loaded ({reason}); delete it to resume from the one before.") from error


def _tensors_of(module: nn.Module, optimizer: torch.optim.Optimizer | None, ema: Ema | None) -> dict[str, Any]:
    """All tensors of a run under names that do not depend on the number of ranks; the tensors are the live ones."""
    tensors: dict[str, Any] = {"weights": dict(module.named_parameters())}
    if optimizer is not None:
        trained = ((name, parameter) for name, parameter in module.named_parameters() if parameter in optimizer.state)
        tensors["optimizer"] = {name: dict(optimizer.state[parameter]) for name, parameter in trained}
    if ema is not None:
        tensors["ema"] = dict(ema.weights)
    return tensors


def _list_committed(folder: Path) -> list[Path]:
    """Committed checkpoints, oldest first."""
    committed = (path for path in folder.glob("step-*") if (path / "state.json").is_file())
    return sorted(committed, key=lambda path: int(path.name.removeprefix("step-")))
