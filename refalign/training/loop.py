"""The training run: stages in order, one optimizer step after the other, from the last checkpoint to the export.

Plain torch: the same function runs in one process, under torchrun and under Ray Train (`refalign.training.launch`).
"""

from __future__ import annotations

import functools
import math
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from refalign.config import RunConfig
from refalign.errors import NonFiniteLoss
from refalign.estimates.compute import ModelSizes, computes_targets
from refalign.estimates.memory import MemoryEstimate
from refalign.objective.flow_matching import TrainingSchedule, make_training_schedule
from refalign.objective.total import LossTerms
from refalign.shards.reader import Prefetcher, ShardIndex
from refalign.training.batch import NUM_TIMESTEPS, Batch, BatchMaker, count_validation_samples
from refalign.training.checkpoint import (
    Checkpointer,
    TrainState,
    best_checkpoint,
    check_resumable,
    find_intact,
    latest_checkpoint,
    load_checkpoint,
)
from refalign.training.export import export_model
from refalign.training.measures import Meter, measure_gradient_norms
from refalign.training.models import Ranks, TrainedModels, build_empty_models, build_models, load_transformer_config
from refalign.training.optim import (
    Ema,
    clip_apart,
    clip_gradients,
    learning_rate_at,
    locate_step,
    make_optimizer,
    set_learning_rate,
)
from refalign.training.preemption import Preempted, watch_notices
from refalign.training.preflight import check_batch_size, check_fits, check_shapes, load_shapes
from refalign.training.records import FILE_NAME, Record, Trained, append_record, truncate_records
from refalign.training.step import StepOutput, train_step
from refalign.training.targets import add_targets

if TYPE_CHECKING:
    from refalign.models.dinov3 import VisionEncoder


@dataclass
class Run:
    """What a run holds between two steps."""

    config: RunConfig
    ranks: Ranks
    folder: Path
    estimate: MemoryEstimate
    maker: BatchMaker
    validation: list[Batch]
    validation_size: int
    models: TrainedModels
    schedule: TrainingSchedule
    optimizer: torch.optim.Optimizer
    ema: Ema | None
    meter: Meter
    checkpointer: Checkpointer
    vision: VisionEncoder | None  # where targets are computed
    is_told: Callable[[], bool] = lambda: False  # this rank, to stop
    must_stop: bool = False  # some rank was told
    step: int = 0  # optimizer steps taken


def train(config: RunConfig, *, shards: Path, folder: Path, notice: Callable[[], bool] | None = None) -> Trained:
    """Trains all stages, or what is left of them after the newest checkpoint in ``folder``, and exports the model.

    Every rank of the process group calls it; without a process group it is a run of one rank.

    Args:
        config: the recipe; ``training.parallel.ranks`` is not read here, the process group decides.
        shards: folder of the finished shards step.
        folder: the run's folder, seen by all ranks; gets ``checkpoints/``, ``metrics.jsonl`` and ``export/``.
        notice: asked once per step on every rank whether the launcher wants the run to stop; SIGTERM also stops it.

    Raises:
        Preempted: told to stop; a checkpoint of the last step was saved.
        NonFiniteLoss: before the optimizer step, on all ranks.
        ArtifactError: shards or checkpoints are missing, damaged or of another run.
        ConfigError: the run cannot fit into a rank's memory.
    """
    torch.set_num_threads(config.cluster.threads)
    # FSDP2 warns that outputs which are views must not be written to; nothing here does.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one rank alone saves alone
    run = start_run(config, shards, folder)
    resumed_from = run.step
    last_step = config.training.total_steps
    if run.step == 0:
        first = {"step": 0, "stage": config.training.stages[0].name, "samples_consumed": 0}
        _publish(run, cast(Record, first | validate(run)))
    batches = Prefetcher(run.maker.make_step, run.step + 1, last_step)
    try:
        with watch_notices(notice) as run.is_told:
            for step in range(run.step + 1, last_step + 1):
                _advance(run, step, batches, is_last=step == last_step)
        run.checkpointer.wait()
    finally:
        batches.close()
        run.checkpointer.close()
    export = export_model(run.folder, config, run.models, run.ema, run.ranks)
    checkpoints = run.folder / "checkpoints"
    newest, best = run.ranks.gather((latest_checkpoint(checkpoints), best_checkpoint(checkpoints)))[0]
    assert newest is not None, "the first rank has saved the last step"
    return Trained(newest, best, export, resumed_from)


def _advance(run: Run, step: int, batches: Prefetcher[list[Batch]], *, is_last: bool) -> None:
    """A step with what may follow it: validation, its line in the record, a checkpoint."""
    training = run.config.training
    record = take_step(run, step, batches.next())
    record["data_wait_s"] = batches.wait_s
    record["data_wait_share"] = batches.wait_s / (batches.wait_s + record["step_s"])
    validation = validate(run) if step % training.validation.every == 0 or is_last else {}
    _publish(run, cast(Record, record | validation))
    if step % training.checkpoint.every == 0 or is_last or run.must_stop:
        state = _describe_state(run, validation.get("validation/total"))
        run.checkpointer.save(state, run.models, run.optimizer, run.ema)
    if run.must_stop and not is_last:
        run.checkpointer.wait()
        raise Preempted(f"{run.folder}: told to stop after step {step}, which is saved; the same command goes on from there.")


def start_run(config: RunConfig, shards: Path, folder: Path) -> Run:
    """Builds everything and loads the newest checkpoint.

    Raises:
        ArtifactError: see `train`.
    """
    ranks = Ranks.current(config.training.parallel.context)
    check_batch_size(config.training, ranks.size)
    index = ShardIndex.open(shards, "train")
    held_out = ShardIndex.open(shards, "validation")
    shapes, transformer = load_shapes(index, config.models), load_transformer_config(config)
    check_shapes(shapes, config, transformer)
    estimate = check_fits(config, index, shapes, transformer, ranks)
    # The first rank reads the weights, and the others receive theirs from it.
    models = (build_models if ranks.is_first else build_empty_models)(config, shapes.vision_width)
    models.spread(config, ranks)
    objective = config.objective
    schedule = make_training_schedule(objective.shift, NUM_TIMESTEPS, bell=objective.timestep_weights == "bell")
    schedule = TrainingSchedule(*(getattr(schedule, f.name).to(ranks.device) for f in fields(schedule)))
    sizes = ModelSizes.of(transformer, config, shapes.vision_width)
    validation = BatchMaker(held_out, config, ranks.data_rank, ranks.data_size)
    size = count_validation_samples(held_out, config.training, ranks.data_size)
    vision = None
    if computes_targets(config, shapes.has_targets):
        from refalign.models.dinov3 import VisionEncoder  # transformers: training needs them here alone

        vision = VisionEncoder.from_config(config.models, ranks.device)
    run = Run(
        config=config,
        ranks=ranks,
        folder=folder,
        estimate=estimate,
        maker=BatchMaker(index, config, ranks.data_rank, ranks.data_size),
        validation=validation.make_validation() if size else [],
        validation_size=size,
        models=models,
        schedule=schedule,
        optimizer=make_optimizer(models, config.training),
        ema=Ema(models, config.training.optimizer.ema_decay) if config.training.optimizer.ema_decay else None,
        meter=Meter(sizes, schedule.timesteps, ranks.device),
        checkpointer=Checkpointer(folder / "checkpoints", ranks, config.training.checkpoint),
        vision=vision,
    )
    _resume(run)
    return run


def take_step(run: Run, step: int, batches: list[Batch]) -> Record:
    """One optimizer step over this rank's ``batches``; returns the step's record, equal on every rank.

    Raises:
        NonFiniteLoss: some rank met a loss or gradient that is not finite; no rank has changed its weights.
    """
    start_s = time.perf_counter()
    training = run.config.training
    place = locate_step(training, step)
    if place.step_in_stage == 1 and step > 1:
        run.optimizer = make_optimizer(run.models, training)
    norms = _split_norms(run, step, batches)
    terms, sums = zip(*(_backward(run, batch) for batch in batches), strict=True)
    clip = clip_apart if run.config.objective.stop_gradient else clip_gradients
    grad_norm = clip(run.models, training.optimizer.clip_grad_norm)
    # A sum with one NaN is NaN on every rank: this one collective is also the agreement on finiteness.
    told = sums[0].new_tensor([run.is_told()])
    summed = run.ranks.sum(torch.cat([torch.stack(terms).sum(0), torch.stack(sums).sum(0), told]))
    *values, told_ranks, norm = torch.cat([summed, grad_norm.reshape(1)]).tolist()
    run.must_stop = told_ranks > 0
    numbers = dict(zip(LossTerms._fields, values)) | {"grad_norm": norm}
    if not all(map(math.isfinite, numbers.values())):
        raise NonFiniteLoss(_describe_non_finite(run, step, numbers, batches, terms))
    learning_rate = learning_rate_at(place, training)
    set_learning_rate(run.optimizer, learning_rate)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    if run.ema is not None:
        run.ema.update()
    run.step = step
    step_s = time.perf_counter() - start_s
    record = {
        "step": step,
        "stage": place.stage.name,
        "ranks": run.ranks.size,
        **numbers,
        **norms,
        "learning_rate": learning_rate,
        "samples_consumed": step * training.global_batch,
        "step_s": step_s,
        **run.meter.describe(values[len(LossTerms._fields) :], step_s, run.ranks.size),
    }
    return cast(Record, record)


def _forward(run: Run, batch: Batch, global_batch_size: int) -> StepOutput:
    batch = add_targets(batch, run.vision).to(run.ranks.device)
    return train_step(run.models, batch, run.schedule, objective=run.config.objective, global_batch_size=global_batch_size)


def _backward(run: Run, batch: Batch) -> tuple[Tensor, Tensor]:
    """Adds the gradients of ``batch``; returns its loss terms, in the order of `LossTerms`, and the meter's sums."""
    terms, flow_matching = _forward(run, batch, run.config.training.global_batch)
    # FSDP averages gradients over ranks, but the terms are shares of the global batch, whose gradients must be summed. Ranks of
    # the same samples all have the gradient of the same terms: they count once.
    (terms.total * run.ranks.data_size).backward()
    return torch.stack(terms).detach(), run.meter.sum_up(batch, flow_matching)


def _split_norms(run: Run, step: int, batches: list[Batch]) -> dict[str, float]:
    every = run.config.training.validation.gradient_norms_every
    if not every or step % every:
        return {}
    size = run.config.training.global_batch
    forward = functools.partial(_forward, run, global_batch_size=size)
    return measure_gradient_norms(run.models, batches, forward, global_batch=size, num_ranks=run.ranks.data_size)


@torch.no_grad()
def validate(run: Run) -> dict[str, float]:
    """Loss terms on the fixed validation batch, as ``validation/<field>``; of the averaged weights where there are any."""
    if not run.validation_size:
        return {}
    total = torch.zeros(len(LossTerms._fields), device=run.ranks.device)
    with run.ema.applied() if run.ema else nullcontext():
        for batch in run.validation:
            total += torch.stack(_forward(run, batch, run.validation_size).terms)
    means = run.ranks.sum(total).tolist()
    return {f"validation/{name}": mean for name, mean in zip(LossTerms._fields, means, strict=True)}


def _resume(run: Run) -> None:
    training = run.config.training
    fall_back = training.checkpoint.on_damaged == "fall_back"
    checkpoint = find_intact(run.folder / "checkpoints", run.ranks, fall_back=fall_back)
    if checkpoint is not None:
        state = check_resumable(checkpoint, _describe_state(run))
        goes_on = state.step < training.total_steps and locate_step(training, state.step + 1).stage.name == state.stage
        load_checkpoint(checkpoint, run.models, run.optimizer if goes_on else None, run.ema)
        run.step = state.step
    if run.ranks.is_first:
        run.folder.mkdir(parents=True, exist_ok=True)
        truncate_records(run.folder / FILE_NAME, last_step=run.step if checkpoint else -1)


def _describe_state(run: Run, validation_total: float | None = None) -> TrainState:
    training = run.config.training
    return TrainState(
        step=run.step,
        stage=locate_step(training, run.step).stage.name,
        samples_consumed=run.step * training.global_batch,
        seed=run.config.seed,
        shard_digest=run.maker.index.digest,
        global_batch=training.global_batch,
        mixture=training.mixture,
        validation_total=validation_total,
    )


def _publish(run: Run, record: Record) -> None:
    if run.ranks.is_first:
        append_record(run.folder / FILE_NAME, record)


def _describe_non_finite(run: Run, step: int, numbers: dict[str, float], batches: list[Batch], terms: Sequence[Tensor]) -> str:
    """Names the samples of the forward passes whose terms were not finite; all samples where only the gradient was not."""
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
