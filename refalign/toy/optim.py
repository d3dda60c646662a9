"""Muon for convolutions: the optimizer that gets the toy's convolutional models through their few thousand steps on a CPU.

Measured on the toy VAE, one core, batches of crops, 200 steps at equal cost a step: 16.3 dB against 14.5 dB for AdamW at its best
learning rate.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

_ITERATION = (3.4445, -4.7750, 2.0315)
"""Coefficients of the odd quintic polynomial that drives singular values to about 1 (Source: Keller Jordan, "Muon", 2024)."""


class Muon(torch.optim.Optimizer):
    """Momentum, then each kernel's update is made nearly orthogonal as a matrix [out, in * taps].

    torch's own ``Muon`` takes matrices only; this one flattens kernels of convolutions.
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
                state["velocity"].mul_(group["momentum"]).add_(parameter.grad)
                update = orthogonalise((parameter.grad + group["momentum"] * state["velocity"]).flatten(1))
                scale = max(1.0, update.shape[0] / update.shape[1]) ** 0.5
                parameter.add_(update.view_as(parameter), alpha=-group["lr"] * scale)


def orthogonalise(matrix: Tensor, iterations: int = 5) -> Tensor:
    """The nearest orthogonal matrix, roughly: singular values end between about 0.7 and 1.2."""
    first, third, fifth = _ITERATION
    wide = matrix.shape[0] <= matrix.shape[1]
    value = matrix if wide else matrix.T
    value = value / (value.norm() + 1e-7)
    for _ in range(iterations):
        gram = value @ value.T
        value = first * value + (third * gram + fifth * gram @ gram) @ value
    return value if wide else value.T


def split_parameters(model: nn.Module, *, smallest_side: int = 8) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(kernels and matrices worth orthogonalising, all other parameters)."""
    matrices, others = [], []
    for parameter in model.parameters():
        is_matrix = parameter.ndim >= 2 and min(parameter.flatten(1).shape) >= smallest_side
        (matrices if is_matrix else others).append(parameter)
    return matrices, others
