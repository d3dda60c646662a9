"""Baselines under the same trainer.

* ``none``: plain flow matching, that is ``total_loss`` without blocks; it needs no function.
* ``repa``: aligns the *noisy video's* tokens with the clean frames' vision tokens (arXiv 2410.06940).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

REPA_WEIGHT = 0.5
"""Published coefficient of the REPA term."""


def repa(
    projected: Float[Tensor, "B T P E"],
    targets: Float[Tensor, "B T P E"],
    frame_mask: Bool[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B"]:
    """-mean over (frame, token) of cos(projected, target), in float32, one number per sample in [-1, 1].

    Args:
        projected: projected tokens of one block for the video's latent frames (a 3-layer SiLU projector).
        targets: vision tokens of the clean pixel frame that each latent frame begins with; no gradient.
        frame_mask: which latent frames have a target; a sample without any gets 0. None: all of them.

    Source: arXiv 2410.06940. There one image; here each latent frame is one. It is not gated by the noise level.
    """
    cosine = torch.cosine_similarity(projected.float(), targets.detach().float(), dim=-1).mean(2)
    if frame_mask is None:
        return -cosine.mean(1)
    return -(cosine * frame_mask).sum(1) / frame_mask.sum(1).clamp(min=1)
