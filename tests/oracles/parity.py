"""Numbers that the published code produced, and the tiny model they belong to."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

PARITY = Path(__file__).parents[1] / "parity"
PARITY_HEADS = 4


def load_numbers(prefix: str) -> dict[str, torch.Tensor]:
    """Tensors of ``dit_small`` under a prefix (``weights.``, ``in.`` or ``out.``), without it."""
    numbers = load_file(PARITY / "dit_small.safetensors")
    return {name.removeprefix(prefix): each for name, each in numbers.items() if name.startswith(prefix)}


def write_official(path: Path) -> Path:
    """The tiny model's weights as an official file."""
    save_file(load_numbers("weights."), path)
    return path


def make_inputs() -> dict[str, torch.Tensor]:
    """Arguments of the forward pass as ours takes them."""
    given = load_numbers("in.")
    return {
        "latents": given["latents"],
        "timestep": given["timestep"],
        "prompt_embeds": given["context"],
        "reference_latents": given["reference_latents"].transpose(1, 2),
    }


def make_targets() -> torch.Tensor:
    """The published teacher's tokens as [B, K, P, E]."""
    return load_numbers("in.")["teacher_tokens"].permute(0, 2, 3, 4, 1).flatten(2, 3)
