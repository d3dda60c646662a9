"""Flow matching: the path from data to noise, its velocity, and which noise levels training visits and how much they count.

    x_sigma = (1 - sigma) x0 + sigma noise        sigma in [0 data, 1 noise], timestep = 1000 sigma
    v       = d x_sigma / d sigma = noise - x0
    L_FM    = w(t) * mean (v_pred - v)^2          each sample alone

Draws (noise, noise level) are the caller's: these functions are deterministic.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class TrainingSchedule:
    """The noise levels that training draws from, all [N] and descending from pure noise.

    Attributes:
        sigmas: noise level in (0, 1].
        timesteps: 1000 * sigma, what the Transformer is told.
        weights: w(t), a bell around t = 500 with mean 1 over the schedule and 0 at t = 1000.
    """

    sigmas: Float[Tensor, "N"]
    timesteps: Float[Tensor, "N"]
    weights: Float[Tensor, "N"]


def shift_sigmas(sigmas: Float[Tensor, "N"], shift: float) -> Float[Tensor, "N"]:
    """Moves noise levels towards noise, which large videos need: sigma' = shift sigma / (1 + (shift - 1) sigma)."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def make_inference_sigmas(num_steps: int, shift: float = 5.0) -> Float[Tensor, "N"]:
    """Shifted noise levels at which a sampler of ``num_steps`` steps evaluates the model, without the final 0.

    Source: the published inference, which spaces ``num_steps + 1`` levels evenly and drops the last before shifting;
    diffusers' Euler scheduler has other levels of its own, so they must be passed to it.
    """
    return shift_sigmas(torch.linspace(1.0, 0.0, num_steps + 1)[:-1], shift)


def make_training_schedule(shift: float = 5.0, num_timesteps: int = 1000, *, bell: bool = True) -> TrainingSchedule:
    """Noise levels and weights of training: w(t) = exp(-2 ((t - 500) / 1000)^2), minus its minimum, scaled to mean 1.

    Args:
        shift: as in inference; 1 leaves the levels evenly spaced.
        num_timesteps: how many levels; one is drawn uniformly for each sample.
        bell: False: all weights are 1, so that what only a prompt can tell, in pure noise, counts like the rest.

    Source: the published training scheduler (DiffSynth). A step there draws one level; ours draws one per sample.
    """
    sigmas = make_inference_sigmas(num_timesteps, shift)
    timesteps = sigmas * num_timesteps
    if not bell:
        return TrainingSchedule(sigmas, timesteps, torch.ones_like(sigmas))
    heights = torch.exp(-2 * ((timesteps - num_timesteps / 2) / num_timesteps) ** 2)
    raised = heights - heights.min()
    return TrainingSchedule(sigmas, timesteps, raised * (num_timesteps / raised.sum()))


def add_noise(
    latents: Float[Tensor, "B *rest"], noise: Float[Tensor, "B *rest"], sigma: Float[Tensor, "B"]
) -> Float[Tensor, "B *rest"]:
    """The point at noise level sigma on the straight line from data to noise: (1 - sigma) x0 + sigma noise."""
    sigma = sigma.reshape(-1, *[1] * (latents.ndim - 1)).to(latents.dtype)
    return (1 - sigma) * latents + sigma * noise


def velocity_target(latents: Float[Tensor, "B *rest"], noise: Float[Tensor, "B *rest"]) -> Float[Tensor, "B *rest"]:
    """What the Transformer is asked to predict: noise - x0, the same at every noise level."""
    return noise - latents


def flow_matching_loss(
    velocity: Float[Tensor, "B *rest"], target: Float[Tensor, "B *rest"], weight: Float[Tensor, "B"]
) -> Float[Tensor, "B"]:
    """w(t) * mean (v_pred - v)^2 in float32, each sample reduced alone so that no batch split changes the sum."""
    error = velocity.float() - target.float()
    return weight * error.square().flatten(1).mean(1)


def alignment_gate(timestep: Float[Tensor, "B"], power: float = 3.0) -> Float[Tensor, "B"]:
    """How much alignment counts at a noise level: (t / 1000)^power; it shapes structure, which is decided in the noise."""
    return (timestep / 1000) ** power
