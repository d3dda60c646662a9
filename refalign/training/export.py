"""From trained weights to a folder that `diffusers` and `refalign.generation.pipeline` open.

<run folder>/export/                 transformer/, and the other parts of the base model (`BASE_PARTS`)
<run folder>/projectors.safetensors  needed to resume training from the export, never to generate
<run folder>/lora/                   of a run with adapters: the adapters alone; export/transformer has them merged
"""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from refalign.config import RunConfig
from refalign.errors import ArtifactError
from refalign.generation.settings import write_digests, write_export_settings
from refalign.models.lora import merge_lora, save_lora
from refalign.models.wan import RefAlignTransformer
from refalign.training.models import PROJECTORS, Ranks, TrainedModels
from refalign.training.optim import Ema

LORA = "lora"
BASE_PARTS = ("vae", "text_encoder", "tokenizer", "scheduler", "model_index.json")


def export_model(folder: Path, config: RunConfig, models: TrainedModels, ema: Ema | None, ranks: Ranks) -> Path:
    """Writes ``export/``, the projectors and the adapters, from averaged weights where there are any; all ranks call it.

    The Transformer is stored in the run's compute type. ``refalign.json`` names a base model from the hub; a local one is copied.

    Returns:
        the ``export`` folder, whole or absent.

    Raises:
        ArtifactError: the local base folder lacks a part.
    """
    with ema.applied() if ema else nullcontext():
        weights = _gather(models, ranks)
    target = folder / "export"
    if ranks.is_first:
        aside = folder / ".export.tmp"
        for leftover in (aside, target):
            shutil.rmtree(leftover, ignore_errors=True)
        transformer = _below(weights, "transformer.")
        if (lora := config.training.lora.arguments) is not None:
            save_lora(folder / LORA, transformer, **lora)
            transformer = merge_lora(transformer, lora["alpha"] / lora["rank"])
        _save_transformer(aside / "transformer", models.transformer, transformer, models.compute_dtype)
        _add_base(aside, config)
        write_digests(aside)
        if models.projectors is not None:
            save_file(_below(weights, "projectors."), folder / PROJECTORS)
        aside.rename(target)
    ranks.barrier()
    return target


def _gather(models: TrainedModels, ranks: Ranks) -> dict[str, Tensor]:
    """Whole weights on the first rank's CPU, one tensor at a time so that a device never holds all of them; {} elsewhere."""
    weights = {}
    for name, parameter in models.named_parameters():
        whole = parameter.detach()
        if isinstance(whole, DTensor):
            whole = whole.full_tensor()
        if ranks.is_first:
            weights[name] = whole.to("cpu", copy=True).contiguous()
    return weights


def _below(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}


def _save_transformer(folder: Path, trained: RefAlignTransformer, weights: dict[str, Tensor], dtype: torch.dtype) -> None:
    with torch.device("meta"):
        transformer = cast(RefAlignTransformer, RefAlignTransformer.from_config(trained.config))
    transformer.load_state_dict({name: weight.to(dtype) for name, weight in weights.items()}, assign=True)
    transformer.save_pretrained(folder)


def _add_base(folder: Path, config: RunConfig) -> None:
    source = Path(config.models.base).expanduser()
    write_export_settings(folder, config, base_is_copied=source.is_dir())
    if not source.is_dir():
        return
    for name in BASE_PARTS:
        part = source / name
        if not part.exists():
            raise ArtifactError(f"{part}: missing in models.base; a complete diffusers folder has {', '.join(BASE_PARTS)}.")
        copy = shutil.copytree if part.is_dir() else shutil.copyfile
        copy(part, folder / name)
