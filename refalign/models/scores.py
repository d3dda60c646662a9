"""Scores of pictures: how well a text fits them (CLIP or SigLIP), and how pleasing they are (a head on the same embedding)."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from refalign.errors import ArtifactError
from refalign.models.loading import load_pretrained, load_tensors


class TextImageScorer:
    """A frozen model with one embedding space, of ``width`` channels, for pictures and texts; perhaps an aesthetic ``head``."""

    def __init__(self, model: Any, tokenizer: Any, image_processor: Any) -> None:
        self.model = model.eval().requires_grad_(False)
        self.head: nn.Module | None = None
        self._tokenizer, self._image_processor = tokenizer, image_processor
        text = model.config.text_config
        self.width: int = getattr(model.config, "projection_dim", None) or text.projection_size
        # SigLIP was trained on texts padded to full length, CLIP was not and has a mask.
        padding = "max_length" if model.config.model_type.startswith("siglip") else True
        self._text_length = {"max_length": text.max_position_embeddings, "truncation": True, "padding": padding}

    @classmethod
    def from_pretrained(cls, source: str, *, revision: str | None = None, device: torch.device | str = "cpu") -> TextImageScorer:
        """Loads a folder or a hub id, always in float32, because scores are compared.

        Raises:
            ArtifactError: it is missing, gated or incomplete, or embeds no texts and pictures.
        """
        model = load_pretrained(AutoModel, source, revision=revision, dtype=torch.float32)
        if not (hasattr(model, "get_image_features") and hasattr(model, "get_text_features")):
            raise ArtifactError(f"{source}: {type(model).__name__} embeds no texts and pictures; give a CLIP or SigLIP model.")
        parts = (load_pretrained(kind, source, revision=revision) for kind in (AutoTokenizer, AutoImageProcessor))
        return cls(model.to(device), *parts)

    @torch.no_grad()
    def embed_images(self, images: UInt8[np.ndarray, "N H W 3"]) -> Float[Tensor, "N E"]:
        """L2-normalised embeddings."""
        inputs = self._image_processor(list(images), return_tensors="pt", input_data_format="channels_last")
        return _normalise(self.model.get_image_features(pixel_values=inputs["pixel_values"].to(self.model.device)))

    @torch.no_grad()
    def embed_text(self, text: str) -> Float[Tensor, "E"]:
        """L2-normalised embedding; longer texts are cut at what the model takes."""
        inputs = self._tokenizer([text], return_tensors="pt", **self._text_length).to(self.model.device)
        known = {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}
        return _normalise(self.model.get_text_features(**known))[0]


def _normalise(features: Any) -> Tensor:
    pooled = features if isinstance(features, Tensor) else features.pooler_output
    return nn.functional.normalize(pooled.float(), dim=-1)


def load_aesthetic_head(path: Path, width: int) -> nn.Module:
    """A head [N, width] -> [N] from a .safetensors file: linear layers, one after the other, with nothing in between.

    Source: LAION's aesthetic predictors (``*-linearMSE``), which are of this kind; in evaluation their dropout does nothing.

    Raises:
        ArtifactError: the file is missing, is no such head, or is one for embeddings of another width.
    """
    if path.suffix in (".pth", ".pt"):
        command = f"uv run pipelines/convert.py {path} {path.with_suffix('.safetensors')} --aesthetic"
        raise ArtifactError(f"models.aesthetic={path}: a pickle; convert it once: {command}")
    if not path.is_file():
        raise ArtifactError(f"models.aesthetic={path}: no such file; give a .safetensors file.")
    layers = _read_layers(load_tensors(path), str(path))
    if layers[0].in_features != width:
        raise ArtifactError(
            f"{path}: made for embeddings of width {layers[0].in_features}, models.text_image gives {width}; give the CLIP "
            "that the head was trained on (LAION's: ViT-L/14, 768)."
        )
    return nn.Sequential(*layers, nn.Flatten(0)).eval().requires_grad_(False)


def convert_aesthetic_head(source: Path, target: Path) -> None:
    """Writes the weights of a .pth head as .safetensors; a pickle that holds anything but tensors is refused."""
    try:
        state = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:
        text = " ".join(str(error).split())[:160]
        raise ArtifactError(f"{source}: not a file of weights ({text}); expected a state dict of linear layers.") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ArtifactError(f"{source}: not a state dict of tensors; expected LAION's kind of aesthetic head.")
    _read_layers(state, str(source))
    save_file({name: tensor.float().contiguous() for name, tensor in state.items()}, target)


def _read_layers(state: dict[str, Tensor], where: str) -> list[nn.Linear]:
    """Linear layers in the order of the numbers in their names (``layers.0.weight``, ``layers.2.weight`` ...)."""
    numbers = {
        name: int(found[1]) if (found := re.search(r"(\d+)\.weight$", name)) else 0 for name in state if name.endswith("weight")
    }
    names = sorted(numbers, key=lambda name: numbers[name])
    layers: list[nn.Linear] = []
    for name in names:
        weight, bias = state[name].float(), state.get(name.removesuffix("weight") + "bias")
        if weight.ndim != 2 or bias is None or (layers and layers[-1].out_features != weight.shape[1]):
            raise ArtifactError(f"{where}: {name} {list(weight.shape)} continues no chain of linear layers.")
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": bias.float()})
        layers.append(layer)
    # Numbers that are more than 2 apart: there was more between two layers than a dropout.
    if not layers or layers[-1].out_features != 1 or any(numbers[b] - numbers[a] > 2 for a, b in pairwise(names)):
        raise ArtifactError(
            f"{where}: layers {names} are no plain linear head with one score; heads with activations between the layers "
            "(LAION's *-reluMSE) are not supported: give a *-linearMSE one."
        )
    return layers
