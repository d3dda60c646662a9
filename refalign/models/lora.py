"""LoRA: training small adapters of the Transformer's linear layers instead of the layers, through peft.

A layer W becomes W + (alpha / rank) B A, with A ``[rank, in]`` random, B ``[out, rank]`` zero and W frozen. The adapters are
stored as diffusers stores them, so that ``pipeline.load_lora_weights(folder)`` opens them over the base model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from refalign.errors import ConfigError
from refalign.models.wan import RefAlignTransformer

FILE_NAME = "pytorch_lora_weights.safetensors"
_ADAPTER = "default"
_FROZEN, _DOWN, _UP = ".base_layer", f".lora_A.{_ADAPTER}.weight", f".lora_B.{_ADAPTER}.weight"


def add_lora(
    transformer: RefAlignTransformer,
    *,
    rank: int,
    alpha: int,
    targets: Sequence[str],
    seed: int,
    frozen_dtype: torch.dtype = torch.float32,
) -> None:
    """Freezes ``transformer`` and gives every layer whose name ends in one of ``targets`` an adapter, which is trained.

    Args:
        targets: ends of names, such as ``to_q``.
        seed: of A.
        frozen_dtype: of the frozen weights. Nothing is lost if the forward pass would round them to it anyway.

    Raises:
        ConfigError: peft is not installed.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ConfigError(
            f"training.lora.rank needs peft, which cannot be imported ({error}); install it, or set training.lora.rank=null."
        ) from error
    transformer.requires_grad_(False)
    torch.manual_seed(seed)
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets)), _ADAPTER)
    for parameter in transformer.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(frozen_dtype)


def merge_lora(weights: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Weights of the stock Transformer that computes the same: every W + ``scale`` B A, in float32, under W's stock name.

    Args:
        weights: of a transformer after `add_lora`, by name.
        scale: alpha / rank.
    """
    merged = {}
    for name, weight in weights.items():
        if name.endswith((_DOWN, _UP)):
            continue
        module, frozen, kind = name.partition(_FROZEN)
        if frozen and kind == ".weight":
            weight = weight.float() + scale * (weights[module + _UP].float() @ weights[module + _DOWN].float())
        merged[module + kind] = weight
    return merged


def save_lora(folder: Path, weights: Mapping[str, Tensor], *, rank: int, alpha: int, targets: Sequence[str]) -> None:
    """Writes the adapters alone, under the file name and keys that ``load_lora_weights`` of diffusers expects.

    Args: as of `add_lora` and `merge_lora`.
    """
    from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY

    adapters = {
        f"transformer.{name.replace(f'.{_ADAPTER}.', '.')}": weights[name] for name in weights if name.endswith((_DOWN, _UP))
    }
    said = {"transformer.r": rank, "transformer.lora_alpha": alpha, "transformer.target_modules": sorted(targets)}
    folder.mkdir(parents=True, exist_ok=True)
    # One entry of metadata: safetensors writes several in random order, and equal runs should give equal bytes.
    save_file(adapters, folder / FILE_NAME, metadata={LORA_ADAPTER_METADATA_KEY: json.dumps(said, sort_keys=True)})
