"""Slow twins of the objective, written from the paper's formulas with loops over single tokens, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    return float(a @ b / math.sqrt(float(a @ a) * float(b @ b)))


def pull_push(
    projected: Tensor,
    targets: Tensor,
    mask: Tensor,
    weight: Tensor | None = None,
    subjects: Tensor | None = None,
    pull_margin: float = 0.0,
    push_margin: float = 1.0,
) -> tuple[list[float], list[float]]:
    """Pull and push of every sample; projected and targets are [B, K, P, E]."""
    pulls, pushes = [], []
    num_samples, num_references, num_tokens, _ = projected.shape
    for b in range(num_samples):
        pull = push = pull_mass = push_mass = 0.0
        for k in range(num_references):
            for i in range(num_tokens):
                if not mask[b, k]:
                    continue
                w_i = float(weight[b, k, i]) if weight is not None else 1.0
                distance = 1 - cosine(projected[b, k, i], targets[b, k, i])
                pull += w_i * max(0.0, distance - pull_margin)
                pull_mass += w_i
                for other in range(num_references):
                    if other == k or not mask[b, other]:
                        continue
                    if subjects is not None and subjects[b, k] == subjects[b, other]:
                        continue
                    for j in range(num_tokens):
                        w_ij = w_i * (float(weight[b, other, j]) if weight is not None else 1.0)
                        distance = 1 - cosine(projected[b, k, i], targets[b, other, j])
                        push += w_ij * max(0.0, push_margin - distance)
                        push_mass += w_ij
        pulls.append(pull / pull_mass if pull_mass else 0.0)
        pushes.append(push / push_mass if push_mass else 0.0)
    return pulls, pushes


def dense_pull_push(
    projected: Tensor, targets: Tensor, pull_margin: float = 0.0, push_margin: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The published form for one sample [K, P, E]: the full similarity matrix, a boolean gather, relu, mean; differentiable."""
    num_references, num_tokens, _ = projected.shape
    s = torch.nn.functional.normalize(projected.flatten(0, 1), dim=-1)
    t = torch.nn.functional.normalize(targets.flatten(0, 1), dim=-1)
    owner = torch.arange(num_references).repeat_interleave(num_tokens)
    similarity = s @ t.T
    pull = torch.relu(1 - similarity.diagonal() - pull_margin).mean()
    push = torch.relu(push_margin - (1 - similarity[owner[:, None] != owner[None, :]])).mean()
    return pull, push


def dense_weighted_pull_push(
    projected: Tensor, targets: Tensor, mask: Tensor, weight: Tensor, subjects: Tensor, pull_margin: float, push_margin: float
) -> tuple[Tensor, Tensor]:
    """Every switch at once with the full similarity matrix of [B, K, P, E]; differentiable."""
    s = torch.nn.functional.normalize(projected, dim=-1)
    t = torch.nn.functional.normalize(targets, dim=-1)
    w = weight * mask[:, :, None]
    pull = (w * torch.relu(1 - (s * t).sum(-1) - pull_margin)).sum((1, 2)) / w.sum((1, 2))
    similarity = torch.einsum("bkie,blje->bkilj", s, t)
    is_negative = (subjects[:, :, None] != subjects[:, None, :]).to(w)
    pair = torch.einsum("bki,blj,bkl->bkilj", w, w, is_negative)
    push = (pair * torch.relu(push_margin - (1 - similarity))).flatten(1).sum(1) / pair.flatten(1).sum(1)
    return pull, push


def repa(projected: Tensor, targets: Tensor) -> list[float]:
    """REPA of every sample; both [B, T, P, E]."""
    return [
        -sum(cosine(x, y) for xs, ys in zip(p, t, strict=True) for x, y in zip(xs, ys, strict=True)) / (p.shape[0] * p.shape[1])
        for p, t in zip(projected, targets, strict=True)
    ]


def flow_matching(velocity: Tensor, target: Tensor, weight: Tensor) -> list[float]:
    """Weighted mean squared error of every sample."""
    result = []
    for v, u, w in zip(velocity, target, weight, strict=True):
        errors = [(float(a) - float(b)) ** 2 for a, b in zip(v.flatten(), u.flatten(), strict=True)]
        result.append(float(w) * sum(errors) / len(errors))
    return result


def training_schedule(shift: float = 5.0, num_timesteps: int = 1000) -> list[tuple[float, float, float]]:
    """(sigma, timestep, weight) of every training step."""
    sigmas = [1 - n / num_timesteps for n in range(num_timesteps)]
    sigmas = [shift * sigma / (1 + (shift - 1) * sigma) for sigma in sigmas]
    bells = [math.exp(-2 * (sigma - 0.5) ** 2) for sigma in sigmas]
    raised = [bell - min(bells) for bell in bells]
    mean = sum(raised) / num_timesteps
    return [(sigma, 1000 * sigma, each / mean) for sigma, each in zip(sigmas, raised, strict=True)]
