"""Targets that a rank computes: the frozen vision encoder over the pictures that the shards hold in place of its tokens.

The encoder is no part of the trained models: no gradient reaches it, no checkpoint holds it, and every rank has the whole of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from refalign.config import ModelsConfig, RunConfig
from refalign.estimates.compute import PassSizes
from refalign.estimates.memory import MemoryEstimate
from refalign.models.loading import load_model_config
from refalign.training.batch import Batch

if TYPE_CHECKING:
    from refalign.models.dinov3 import VisionEncoder


@dataclass(frozen=True)
class EncoderSizes:
    """Widths, depth and patch of the vision encoder."""

    width: int  # E
    hidden: int  # of the feed-forward
    layers: int
    extra_tokens: int  # CLS and registers
    is_gated: bool
    patch_px: int

    @classmethod
    def load(cls, models: ModelsConfig) -> EncoderSizes:
        """Reads the encoder's config.json.

        Raises:
            ArtifactError: it is missing, or the hub cannot be reached.
        """
        return cls.of(load_model_config(models.vision_encoder, revision=models.vision_encoder_revision))

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> EncoderSizes:
        """Reads the contents of that file."""
        return cls(
            width=found["hidden_size"],
            hidden=found["intermediate_size"],
            layers=found["num_hidden_layers"],
            extra_tokens=1 + found["num_register_tokens"],
            is_gated=found["use_gated_mlp"],
            patch_px=found["patch_size"],
        )

    @property
    def parameters(self) -> int:
        """Of matrices; norms and biases are less than a hundredth of them."""
        feed_forward = (3 if self.is_gated else 2) * self.width * self.hidden
        return self.layers * (4 * self.width**2 + feed_forward) + 3 * self.patch_px**2 * self.width


def computes_targets(config: RunConfig, has_targets: bool) -> bool:
    """Whether training needs the encoder: the objective has targets, and the shards have none."""
    return config.objective.alignment == "reference_alignment" and not has_targets


def add_targets(batch: Batch, encoder: VisionEncoder | None) -> Batch:
    """The batch with target tokens in place of its pictures; a batch that has targets, or needs none, stays as it is.

    Args:
        batch: still in the host's memory, where it is known without waiting which references are scored; only these are encoded.
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


def add_encoder(estimate: MemoryEstimate, encoder: EncoderSizes, each: PassSizes, models: ModelsConfig) -> MemoryEstimate:
    """The estimate of a rank that computes its targets: weights that stay, and a block's activations before the forward pass."""
    size = 4 if models.encoder_dtype == "float32" else 2
    weights = size * encoder.parameters
    pictures = each.samples * each.references
    pixels = pictures * each.reference_tokens * 3 * encoder.patch_px**2 * (1 + 2 * 4)  # bytes, then float32 twice
    block = size * (6 * encoder.width + 2 * encoder.hidden)  # residual, norm, q, k, v, attention; feed-forward
    encoding = pictures * (each.reference_tokens + encoder.extra_tokens) * block + pixels
    kinds = (estimate.weights, estimate.gradients, estimate.moments, estimate.average, estimate.staged)
    return replace(estimate, encoder=weights, peak=max(estimate.peak, math.fsum(kinds) + encoding) + weights)
