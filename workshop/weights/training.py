"""How the toy's models are trained: one loop, a state that resumes from a file, Muon for kernels, bfloat16 where it is fast."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from refalign.training.optim import orthogonalise

MATRIX_LEARNING_RATE, OTHER_LEARNING_RATE = 0.02, 2e-3
"""Peaks: of kernels (Muon), and of biases, norms and small kernels (AdamW)."""
LossOfStep = Callable[[int], tuple[Tensor, Mapping[str, Tensor | float]]]
"""Number of the step, from 0 -> its loss, and figures to print."""


def autocast_where_fast(**options: bool) -> torch.autocast:
    """Matrix products in bfloat16 if the processor has instructions for them; without these they take sixty times as long."""
    found = torch.cpu.get_capabilities()
    return torch.autocast("cpu", torch.bfloat16, enabled=bool(found.get("avx512_bf16") or found.get("amx_bf16")), **options)


class Muon(torch.optim.Optimizer):
    """Momentum, then each kernel's update is made nearly orthogonal as a matrix [out, in * taps].

    `refalign.training.optim.Muon` takes matrices only. Measured on the toy VAE, 200 steps at equal cost a step: 16.3 dB, and
    14.5 dB for AdamW at its best learning rate.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # ty: ignore[incompatible-method-override]
        """Updates every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["velocity"] = torch.zeros_like(parameter)
                velocity = state["velocity"].mul_(group["momentum"]).add_(parameter.grad)
                update = orthogonalise((parameter.grad + group["momentum"] * velocity).flatten(1)[None])[0]
                scale = max(1.0, update.shape[0] / update.shape[1]) ** 0.5
                parameter.add_(update.view_as(parameter), alpha=-group["lr"] * scale)


def make_optimizers(model: nn.Module, betas: tuple[float, float] = (0.9, 0.999)) -> list[torch.optim.Optimizer]:
    """Muon for kernels and matrices of at least 8 x 8, AdamW for all other parameters, at their peak learning rates."""
    matrices, others = [], []
    for parameter in model.parameters():
        is_matrix = parameter.ndim >= 2 and min(parameter.flatten(1).shape) >= 8
        (matrices if is_matrix else others).append(parameter)
    adam = torch.optim.AdamW(others, lr=OTHER_LEARNING_RATE, betas=betas, weight_decay=0.0)
    return [Muon(matrices, lr=MATRIX_LEARNING_RATE), adam]


class TrainingState:
    """A model, its optimizers, and the moving average of the model (or of its part ``averaged``): all that a run resumes from."""

    def __init__(
        self,
        model: nn.Module,
        optimizers: list[torch.optim.Optimizer],
        *,
        averaged: nn.Module | None = None,
        decay: float = 0.99,
    ) -> None:
        self.model, self.optimizers, self.step = model, optimizers, 0
        self._source = model if averaged is None else averaged
        average = torch.optim.swa_utils.get_ema_multi_avg_fn(decay)
        self._averaged = torch.optim.swa_utils.AveragedModel(self._source, multi_avg_fn=average, use_buffers=True)
        self._peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]

    @property
    def averaged(self) -> Any:
        """The moving average, as a module of the model's class."""
        return self._averaged.module

    def advance(self, learning_rate_factor: float) -> None:
        """One optimizer step with the gradients at hand, at ``learning_rate_factor`` times the initial learning rates."""
        for optimizer, peaks in zip(self.optimizers, self._peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * learning_rate_factor
            optimizer.step()
            optimizer.zero_grad()
        self._averaged.update_parameters(self._source)
        self.step += 1

    def save(self, path: Path) -> None:
        """Writes the state aside, then renames it."""
        state = {
            "model": self.model.state_dict(),
            "averaged": self._averaged.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def load(self, path: Path) -> None:
        """Goes on from what `save` wrote."""
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self._averaged.load_state_dict(state["averaged"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step = int(state["step"])


def train(
    state: TrainingState,
    make_loss: LossOfStep,
    factor_at: Callable[[int], float],
    export: Callable[[Any], None],
    *,
    steps: int,
    checkpoint: Path,
    clip_norm: float,
    save_every: int = 100,
) -> None:
    """Trains to step ``steps``; resumes from ``checkpoint`` if it is there.

    Args:
        factor_at: number of a step, from 0 -> its learning rate over the peak.
        export: gets the averaged model at every checkpoint.
    """
    if checkpoint.is_file():
        state.load(checkpoint)
    trained = [parameter for parameter in state.model.parameters() if parameter.requires_grad]
    started, shown = time.monotonic(), []
    while state.step < steps:
        state.model.train()
        loss, figures = make_loss(state.step)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, clip_norm)
        state.advance(factor_at(state.step))
        shown.append({name: float(value) for name, value in figures.items()})
        if state.step % 25 == 0:
            means = " ".join(f"{name} {np.mean([each[name] for each in shown]):.4f}" for name in figures)
            print(f"step {state.step}/{steps} {means} {(time.monotonic() - started) / len(shown):.2f} s a step", flush=True)
            started, shown = time.monotonic(), []
        if state.step % save_every == 0 or state.step == steps:
            state.save(checkpoint)
            export(state.averaged)


def make_parser(document: str | None, *, checkpoint: str, output: Path, steps: int | None = None) -> argparse.ArgumentParser:
    """The options that the trainers share; ``steps=None`` leaves the number to the recipe. torch then computes on one thread."""
    parser = argparse.ArgumentParser(description=document, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=steps, help=f"total number of steps (default: {steps or 'the recipe'})")
    parser.add_argument("--checkpoint", type=Path, default=Path(checkpoint), help="an interrupted run resumes from this file")
    parser.add_argument("--output", type=Path, default=output, help="folder of the exported weights")
    torch.set_num_threads(1)
    return parser
