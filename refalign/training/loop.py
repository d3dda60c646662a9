"""The training run: stages in order, one optimizer step after the other, from the last checkpoint to the export.

Plain torch: the same function runs in one process, under torchrun and under Ray Train (`refalign.training.launch`).
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from refalign.config import RunConfig
from refalign.errors import NonFiniteLoss
from refalign.objective.flow_matching import TrainingSchedule, make_training_schedule
from refalign.objective.total import LossTerms
from refalign.shards.reader import Prefetcher, ShardIndex
from refalign.training.batch import NUM_TIMESTEPS, Batch, BatchMaker, count_validation_samples
from refalign.training.checkpoint import TrainState, check_resumable, latest_checkpoint, load_checkpoint, save_checkpoint
from refalign.training.export import export_model
from refalign.training.models import Ranks, TrainedModels, build_models
from refalign.training.optim import Ema, clip_gradients, count_steps, learning_rate_at, locate_step, make_optimizer
from refalign.training.preflight import check_batch_size, check_shapes, load_shapes
from refalign.training.records import FILE_NAME, append_record, truncate_records
from refalign.training.step import train_step

Log = Callable[[int, dict[str, float]], None]
Build = Callable[[RunConfig, int], TrainedModels]


@dataclass
class Run:
    """What a run holds between two steps."""

    config: RunConfig
    ranks: Ranks
    folder: Path
    maker: BatchMaker
    validation: list[Batch]
    validation_size: int
    models: TrainedModels
    schedule: TrainingSchedule
    optimizer: torch.optim.Optimizer
    ema: Ema | None
    step: int = 0  # optimizer steps taken


def train(
    config: RunConfig, *, shards: Path, folder: Path, log: Log | None = None, build: Build = build_models
) -> dict[str, Any]:
    """Trains all stages, or what is left of them after the newest checkpoint in ``folder``, and exports the model.

    Every rank of the process group calls it; without a process group it is a run of one rank.

    Args:
        config: the recipe; ``training.num_workers`` is not read here, the process group decides.
        shards: folder of the finished shards step.
        folder: the run's folder, seen by all ranks; gets ``checkpoints/``, ``metrics.jsonl`` and ``export/``.
        log: called on the first rank with (step, numbers) after every step.
        build: makes the models, for those who train more than Transformer and projectors.

    Returns:
        "checkpoint", "export", "resumed_from" (step): the same on every rank.

    Raises:
        NonFiniteLoss: before the optimizer step, on all ranks.
        ArtifactError: shards or checkpoints are missing, damaged or of another run.
    """
    torch.set_num_threads(config.cluster.threads)
    # FSDP2 warns that outputs which are views must not be written to; nothing here does.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    run = start_run(config, shards, folder, build)
    resumed_from = run.step
    last_step = count_steps(config.training)
    if run.step == 0:
        _publish(run, {"step": 0, "stage": config.training.stages[0].name, "samples_consumed": 0, **validate(run)}, log)
    batches = Prefetcher(run.maker.make_step, run.step + 1, last_step)
    try:
        for step in range(run.step + 1, last_step + 1):
            record = take_step(run, step, batches.next())
            record["data_wait_s"] = batches.wait_s
            if step % config.training.validate_every == 0 or step == last_step:
                record |= validate(run)
            _publish(run, record, log)
            if step % config.training.checkpoint_every == 0 or step == last_step:
                _save(run)
    finally:
        batches.close()
    export = export_model(run.folder, config, run.models, run.ema, run.ranks)
    checkpoint = latest_checkpoint(run.folder / "checkpoints")
    return {"checkpoint": str(checkpoint), "export": str(export), "resumed_from": resumed_from}


def start_run(config: RunConfig, shards: Path, folder: Path, build: Build = build_models) -> Run:
    """Builds everything and goes to where the newest checkpoint stands.

    Raises:
        ArtifactError: see `train`.
    """
    ranks = Ranks.current()
    check_batch_size(config.training, ranks.size)
    index = ShardIndex.open(shards, "train")
    held_out = ShardIndex.open(shards, "validation")
    shapes = load_shapes(index)
    models = build(config, shapes.vision_width)
    check_shapes(shapes, config, models.transformer.config)
    models.spread(config, ranks)
    schedule = make_training_schedule(config.objective.shift, NUM_TIMESTEPS)
    validation = BatchMaker(held_out, config, ranks.rank, ranks.size)
    size = count_validation_samples(held_out, config.training, ranks.size)
    run = Run(
        config=config,
        ranks=ranks,
        folder=folder,
        maker=BatchMaker(index, config, ranks.rank, ranks.size),
        validation=validation.make_validation() if size else [],
        validation_size=size,
        models=models,
        schedule=TrainingSchedule(*(getattr(schedule, f.name).to(ranks.device) for f in fields(schedule))),
        optimizer=make_optimizer(models, config.training),
        ema=Ema(models, config.training.ema_decay) if config.training.ema_decay else None,
    )
    _resume(run)
    return run


def take_step(run: Run, step: int, batches: list[Batch]) -> dict[str, Any]:
    """One optimizer step over this rank's ``batches``; returns the step's record, equal on every rank.

    Raises:
        NonFiniteLoss: some rank met a loss or gradient that is not finite; no rank has changed its weights.
    """
    start_s = time.perf_counter()
    training = run.config.training
    place = locate_step(training, step)
    if place.step_in_stage == 1 and step > 1:
        run.optimizer = make_optimizer(run.models, training)
    terms = [_backward(run, batch) for batch in batches]
    grad_norm = clip_gradients(run.models, training.clip_grad_norm)
    # A sum with one NaN is NaN on every rank: this one collective is also the agreement on finiteness.
    means = run.ranks.sum(torch.stack(terms).sum(0))
    numbers = dict(zip((*LossTerms._fields, "grad_norm"), torch.cat([means, grad_norm.reshape(1)]).tolist(), strict=True))
    if not all(map(math.isfinite, numbers.values())):
        raise NonFiniteLoss(_describe_non_finite(run, step, numbers, batches, terms))
    learning_rate = learning_rate_at(place, training)
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    if run.ema is not None:
        run.ema.update()
    run.step = step
    return {
        "step": step,
        "stage": place.stage.name,
        **numbers,
        "learning_rate": learning_rate,
        "samples_consumed": step * training.global_batch,
        "step_s": time.perf_counter() - start_s,
    }


def _backward(run: Run, batch: Batch) -> Tensor:
    """Adds the gradients of ``batch``; returns its loss terms, in the order of `LossTerms`."""
    terms = train_step(
        run.models,
        batch.to(run.ranks.device),
        run.schedule,
        objective=run.config.objective,
        global_batch_size=run.config.training.global_batch,
    )
    # FSDP averages gradients over ranks; the terms are already shares of the global batch, to be added up.
    (terms.total * run.ranks.size).backward()
    return torch.stack(terms).detach()


@torch.no_grad()
def validate(run: Run) -> dict[str, float]:
    """Loss terms of the averaged (else the present) weights on the fixed validation batch, as ``validation/<field>``."""
    if not run.validation_size:
        return {}
    total = torch.zeros(len(LossTerms._fields), device=run.ranks.device)
    with run.ema.applied() if run.ema else nullcontext():
        for batch in run.validation:
            terms = train_step(
                run.models,
                batch.to(run.ranks.device),
                run.schedule,
                objective=run.config.objective,
                global_batch_size=run.validation_size,
            )
            total += torch.stack(terms)
    means = run.ranks.sum(total).tolist()
    return {f"validation/{name}": mean for name, mean in zip(LossTerms._fields, means, strict=True)}


def _resume(run: Run) -> None:
    checkpoint = latest_checkpoint(run.folder / "checkpoints")
    if checkpoint is not None:
        training = run.config.training
        state = check_resumable(
            checkpoint, shard_digest=run.maker.index.digest, global_batch=training.global_batch, seed=run.config.seed
        )
        goes_on = state.step < count_steps(training) and locate_step(training, state.step + 1).stage.name == state.stage
        load_checkpoint(checkpoint, run.models, run.optimizer if goes_on else None, run.ema)
        run.step = state.step
    if run.ranks.is_first:
        run.folder.mkdir(parents=True, exist_ok=True)
        truncate_records(run.folder / FILE_NAME, last_step=run.step if checkpoint else -1)


def _save(run: Run) -> None:
    training = run.config.training
    state = TrainState(
        step=run.step,
        stage=locate_step(training, run.step).stage.name,
        samples_consumed=run.step * training.global_batch,
        seed=run.config.seed,
        shard_digest=run.maker.index.digest,
        global_batch=training.global_batch,
    )
    save_checkpoint(
        run.folder / "checkpoints", state, run.models, run.optimizer, run.ema, run.ranks, keep=training.keep_checkpoints
    )


def _publish(run: Run, record: dict[str, Any], log: Log | None) -> None:
    if run.ranks.is_first:
        append_record(run.folder / FILE_NAME, record)
        if log is not None:
            log(record["step"], {name: value for name, value in record.items() if isinstance(value, int | float)})


def _describe_non_finite(run: Run, step: int, numbers: dict[str, float], batches: list[Batch], terms: list[Tensor]) -> str:
    """Names the samples of the forward passes that were not finite, of all of them where only the gradient was not."""
    only_gradient = all(math.isfinite(numbers[name]) for name in LossTerms._fields)
    pairs = zip(batches, terms, strict=True)
    suspects = [key for batch, each in pairs for key in batch.keys if only_gradient or not each.isfinite().all()]
    keys = [key for rank_keys in run.ranks.gather(suspects) for key in rank_keys]
    bad = ", ".join(f"{name}={value}" for name, value in numbers.items() if not math.isfinite(value))
    checkpoint = latest_checkpoint(run.folder / "checkpoints")
    return (
        f"step {step}: {bad}; samples {', '.join(keys)}. No rank has changed its weights in this step. "
        f"Last good checkpoint: {checkpoint or 'none yet'}. Look at these samples, or lower the stage's learning_rate; "
        "the same command resumes."
    )
