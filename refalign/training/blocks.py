"""How each block of the Transformer runs: what its backward pass computes again, and whether it is compiled.

Order: recomputation inside, then compilation, then sharding around both (`TrainedModels.spread`), so that FSDP's hooks stay
outside of what is compiled and of what is run twice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from refalign.config import TrainingConfig
from refalign.models.wan import RefAlignTransformer

_ATEN = torch.ops.aten
SAVED_OPERATIONS = [
    _ATEN.mm.default,
    _ATEN.addmm.default,
    _ATEN.bmm.default,
    _ATEN._scaled_dot_product_flash_attention.default,
    _ATEN._scaled_dot_product_efficient_attention.default,
    _ATEN._scaled_dot_product_cudnn_attention.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
]
"""What selective recomputation keeps: nearly all of the time, and about a third of the memory."""


def prepare_blocks(transformer: RefAlignTransformer, training: TrainingConfig) -> None:
    """Gives each block the forward pass that ``training`` asks for; parameters keep their names."""
    for block in transformer.blocks:
        forward: Callable[..., Any] = block.forward
        if training.activation_checkpointing != "none":
            forward = _recomputed(forward, training.activation_checkpointing == "selective")
        if training.compile:
            forward = torch.compile(forward)
        if training.compile or training.activation_checkpointing != "none":
            block.forward = forward  # on this block alone


def _recomputed(forward: Callable[..., Any], selective: bool) -> Callable[..., Any]:
    # Nothing in a block is random, hence no generator states to keep.
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if selective:
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, SAVED_OPERATIONS)

    def run(*arguments: Any) -> Any:
        return checkpoint(forward, *arguments, **options)

    return run
