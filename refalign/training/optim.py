"""The optimizer of a stage, its learning rate, gradient clipping and the moving average of the weights.

Works alike on plain parameters and on FSDP2's sharded ones: what is elementwise acts on each rank's own shard.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from refalign.config import StageConfig, TrainingConfig
from refalign.errors import ConfigError

MOMENTUM, MATRIX_STEP = 0.95, 0.8
"""Of Muon; the second in learning rates, of an entry of a matrix (root mean square)."""
ITERATION = (3.4445, -4.7750, 2.0315)
"""Coefficients of Muon's odd quintic polynomial, which drives singular values to about 1."""


@dataclass(frozen=True)
class StepPlace:
    """Where an optimizer step lies in the recipe."""

    stage: StageConfig
    step_in_stage: int  # from 1


def locate_step(training: TrainingConfig, step: int) -> StepPlace:
    """The stage that optimizer step ``step`` (from 1, counted over the whole run) belongs to."""
    before = 0
    for stage in training.stages:
        if step <= before + stage.steps:
            return StepPlace(stage, step - before)
        before += stage.steps
    raise AssertionError(f"step {step} is beyond the {before} steps of the recipe")


class Muon(torch.optim.AdamW):
    """Muon for the matrices of the blocks, AdamW for all other weights, at one learning rate and one weight decay.

        M = 0.95 M + 0.05 G;    W = W - lr (0.8 sqrt(max(n, m)) U V^T + wd W),    U S V^T = 0.05 G + 0.95 M

    With 0.2 in place of 0.8 a matrix takes steps of AdamW's usual size (arXiv 2502.16982). At the toy's size steps four times as
    large were best for the matrices, but too large for the weights that stay with AdamW. A sharded matrix is gathered for its
    update, so that every number of ranks takes the same step.

    Source: Keller Jordan, "Muon", 2024. torch's own takes neither the other weights nor shards.
    """

    def __init__(self, matrices: list[nn.Parameter], others: list[nn.Parameter], **options: Any) -> None:
        super().__init__([{"params": others}, {"params": matrices}], **options)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Loads as every optimizer does; AdamW's way expects its moments, which matrices do not have."""
        torch.optim.Optimizer.__setstate__(self, state)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # ty: ignore[incompatible-method-override]
        """Updates every weight that has a gradient."""
        group = self.param_groups[1]
        by_shape: dict[torch.Size, dict[nn.Parameter, Tensor]] = {}
        for matrix in group["params"]:
            if matrix.grad is not None:
                momentum = self.state[matrix]["momentum_buffer"].lerp_(matrix.grad, 1 - MOMENTUM)
                by_shape.setdefault(matrix.shape, {})[matrix] = _whole(matrix.grad.lerp(momentum, MOMENTUM))
        for shape, looked_ahead in by_shape.items():
            updates = orthogonalise(torch.stack(list(looked_ahead.values()))) * (MATRIX_STEP * max(shape) ** 0.5)
            for matrix, update in zip(looked_ahead, updates):
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.sub_(_placed_like(update, matrix) * group["lr"])
                matrix.grad = None
        super().step()


def orthogonalise(matrices: Float[Tensor, "N n m"], iterations: int = 5) -> Float[Tensor, "N n m"]:
    """The nearest orthogonal matrix of each, roughly: singular values end between about 0.7 and 1.2."""
    first, third, fifth = ITERATION
    is_wide = matrices.shape[1] <= matrices.shape[2]
    value = matrices if is_wide else matrices.mT
    value = value / (value.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = value @ value.mT
        value = torch.baddbmm(value, torch.baddbmm(gram, gram, gram, beta=third, alpha=fifth), value, beta=first)
    return value if is_wide else value.mT


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _placed_like(whole: Tensor, example: Tensor) -> Tensor:
    if not isinstance(example, DTensor):
        return whole
    return distribute_tensor(whole, example.device_mesh, example.placements, src_data_rank=None)


def make_optimizer(module: nn.Module, training: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW as published: betas 0.9 and 0.999, one weight decay for all weights.

    Its state is made at once, as zeros, so that it can be saved and loaded before the first step.

    Raises:
        ConfigError: ``adamw8bit`` without torchao.
    """
    named = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    parameters = list(named.values())
    options: dict[str, Any] = {"lr": 0.0, "betas": (0.9, 0.999), "weight_decay": training.optimizer.weight_decay}
    on_gpu = all(parameter.is_cuda for parameter in parameters)
    if training.optimizer.name == "adamw8bit":
        return _make_adamw8bit(parameters, **options)
    if training.optimizer.name == "muon":
        is_matrix = {name: ".blocks." in name and each.ndim == 2 for name, each in named.items()}
        matrices, others = ([each for name, each in named.items() if is_matrix[name] is kind] for kind in (True, False))
        optimizer = Muon(matrices, others, **options)
        for matrix in matrices:
            optimizer.state[matrix] = {"momentum_buffer": torch.zeros_like(matrix)}
        parameters = others
    else:
        optimizer = torch.optim.AdamW(parameters, fused=on_gpu, **options)
    for parameter in parameters:
        optimizer.state[parameter] = {
            "step": torch.zeros((), device=parameter.device if on_gpu and training.optimizer.name == "adamw" else "cpu"),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def _make_adamw8bit(parameters: list[nn.Parameter], **options: Any) -> torch.optim.Optimizer:
    try:
        AdamW8bit = importlib.import_module("torchao.optim").AdamW8bit  # noqa: N806 - a class
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"training.optimizer.name=adamw8bit needs torchao, which cannot be imported ({error}); install it, or set "
            "training.optimizer.name=adamw."
        ) from error
    # It keeps the learning rate as a tensor, so that a new rate compiles nothing again.
    optimizer = AdamW8bit(parameters, **options)
    for parameter in parameters:
        optimizer.state[parameter] = {
            "step": torch.tensor(0.0),
            "exp_avg": optimizer._new_buffer(parameter, True),
            "exp_avg_sq": optimizer._new_buffer(parameter, False),
        }
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Sets the learning rate, in place where the optimizer keeps it as a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(learning_rate)
        else:
            group["lr"] = learning_rate


def learning_rate_at(place: StepPlace, training: TrainingConfig) -> float:
    """Linear warm-up over the first ``warmup_steps`` of a stage to its peak; then the stage's schedule."""
    stage, warmup = place.stage, training.optimizer.warmup_steps
    if place.step_in_stage <= warmup:
        return stage.learning_rate * place.step_in_stage / warmup
    if stage.schedule == "constant":
        return stage.learning_rate
    progress = (place.step_in_stage - warmup) / max(1, stage.steps - warmup)
    return stage.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def clip_gradients(module: nn.Module, max_norm: float) -> Tensor:
    """Scales all gradients down to ``max_norm`` together; returns the norm before, over all ranks, as a plain scalar."""
    norm = nn.utils.clip_grad_norm_(module.parameters(), max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def clip_apart(module: nn.Module, max_norm: float) -> Tensor:
    """Clips each child's gradients by themselves; returns the largest norm.

    For the stop-gradient control: clipped together, large gradients of the projectors would shrink those of the Transformer.
    """
    trained = [child for child in module.children() if any(each.requires_grad for each in child.parameters())]
    return torch.stack([clip_gradients(child, max_norm) for child in trained]).max()


class Ema:
    """Exponential moving average of a module's trained weights, in their own type and sharding."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        """Starts the average at the current weights."""
        self.decay = decay
        self._parameters = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        self.weights = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """average = decay * average + (1 - decay) * weights."""
        for name, average in self.weights.items():
            _local(average).lerp_(_local(self._parameters[name]), 1.0 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The module computes with the averages inside this block."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, average in self.weights.items():
            mine, theirs = _local(average), _local(self._parameters[name])
            kept = theirs.clone()
            theirs.copy_(mine)
            mine.copy_(kept)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
