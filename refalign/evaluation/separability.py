"""Can subjects be told apart in the Transformer's own reference tokens, block by block, before and after training?

No projector is involved: a projector alone can lower the alignment loss, and what counts is what changes in the Transformer.

Source: RefAlign (arXiv 2603.25743), figure 2b.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

Features = Float[np.ndarray, "N D"]


@torch.no_grad()
def block_features(
    transformer: Any,
    reference_latents: Float[Tensor, "N Z h w"],
    foreground: Float[Tensor, "N P"],
    *,
    prompt_embeds: Float[Tensor, "N L E"],
    num_latent_frames: int,
    timestep: float = 500.0,
    seed: int = 0,
) -> list[Features]:
    """One vector per reference and block: the mean of its tokens, weighted by how much of the subject each shows.

    Every reference is alone beside a video of pure noise, the same for all.

    Args:
        transformer: `refalign.models.wan.RefAlignTransformer`.
        foreground: in [0, 1]; a reference without any counts all its tokens.
        timestep: in [0, 1000].
    """
    count, channels, height, width = reference_latents.shape
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(1, channels, num_latent_frames, height, width, generator=generator)
    weight = torch.where(foreground.sum(1, keepdim=True) > 0, foreground, torch.ones_like(foreground))
    weight = weight / weight.sum(1, keepdim=True)
    features: list[list[Tensor]] = [[] for _ in transformer.blocks]
    for number in range(count):
        tokens = transformer(
            noise,
            torch.tensor([timestep]),
            prompt_embeds[number : number + 1],
            reference_latents[number][None, None],
            alignment_blocks=tuple(range(len(transformer.blocks))),
        ).reference_tokens
        for block, each in zip(features, tokens, strict=True):
            block.append((each[0, 0].float() * weight[number, :, None]).sum(0))
    return [torch.stack(block).numpy() for block in features]


def measure(features: Features, subjects: Sequence[object]) -> dict[str, float]:
    """How well references of one subject lie together, by cosine of the centred features.

    retrieval: share of references whose nearest other one is of the same subject (those whose subject has no other are left
    out); chance is what a random order gives; gap: mean cosine of equal less that of different subjects; silhouette in [-1, 1].

    Raises:
        ValueError: no subject has two references, or there is only one subject.
    """
    from sklearn.metrics import silhouette_score

    names = np.array([str(subject) for subject in subjects])
    same = names[:, None] == names[None]
    np.fill_diagonal(same, False)
    has_other = same.any(1)
    if not has_other.any() or len(set(names)) < 2:
        raise ValueError("separability needs two subjects, and two references of some subject")
    centred = features - features.mean(0)
    unit = centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-9)
    cosines = unit @ unit.T
    different = ~same & ~np.eye(len(names), dtype=bool)
    nearest = np.where(np.eye(len(names), dtype=bool), -np.inf, cosines).argmax(1)
    rows = np.flatnonzero(has_other)
    return {
        "retrieval": float((names[nearest] == names)[rows].mean()),
        "chance": float((same.sum(1) / (len(names) - 1))[rows].mean()),
        "gap": float(cosines[same].mean() - cosines[different].mean()),
        "silhouette": float(silhouette_score(unit, names, metric="cosine")) if len(set(names)) < len(names) else 0.0,
    }


def project(features: Features, seed: int = 0) -> Float[np.ndarray, "N 2"]:
    """t-SNE of the references in the plane, for a picture; neighbourhoods mean something, distances and axes do not."""
    from sklearn.manifold import TSNE

    perplexity = max(2.0, min(30.0, (len(features) - 1) / 3))
    return TSNE(2, perplexity=perplexity, metric="cosine", init="random", random_state=seed).fit_transform(features)
