"""Targets that a rank computes: the frozen vision encoder over the pictures that the shards hold in place of its tokens.

The encoder is no part of the trained models: no gradient reaches it, no checkpoint holds it, and every rank has the whole of it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from refalign.training.batch import Batch

if TYPE_CHECKING:
    from refalign.models.dinov3 import VisionEncoder


def add_targets(batch: Batch, encoder: VisionEncoder | None) -> Batch:
    """The batch with target tokens in place of its pictures; a batch that has targets, or needs none, stays as it is.

    Args:
        batch: in host memory, so that choosing the references that are scored needs no synchronisation; only they are encoded.
    """
    if batch.reference_pixels is None or encoder is None:
        return batch
    scored = batch.alignment_mask.nonzero(as_tuple=True)
    samples, references, height, width, _ = batch.reference_pixels.shape
    device = next(encoder.model.parameters()).device
    tokens = height // encoder.patch_size_px * (width // encoder.patch_size_px)
    targets = torch.zeros(samples, references, tokens, encoder.width, device=device)
    if len(scored[0]):
        targets[scored] = encoder.encode(batch.reference_pixels[scored])
    return replace(batch, target_tokens=targets, reference_pixels=None)
