"""The frozen vision encoder: DINOv3 patch tokens (alignment targets) and picture embeddings (identity)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from transformers import DINOv3ViTModel

from refalign.config import ModelsConfig
from refalign.errors import ArtifactError, GeometryError
from refalign.io.untrusted import parse_json_object
from refalign.models.loading import load_pretrained

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


class VisionEncoder:
    """DINOv3 in evaluation mode and without gradients; a token of ``width`` channels sees ``patch_size_px`` squared."""

    def __init__(
        self, model: DINOv3ViTModel, mean: tuple[float, ...] = _IMAGENET_MEAN, std: tuple[float, ...] = _IMAGENET_STD
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.patch_size_px = int(model.config.patch_size)  # ty: ignore[invalid-argument-type]  # square in every DINOv3
        self.width: int = model.config.hidden_size
        self._mean, self._std = mean, std

    @classmethod
    def from_pretrained(
        cls, source: str, *, revision: str | None = None, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> VisionEncoder:
        """Loads a folder or a hub id; a local ``preprocessor_config.json`` may give other statistics than ImageNet's."""
        model = load_pretrained(DINOv3ViTModel, source, revision=revision, dtype=dtype)
        preprocessor = Path(source).expanduser() / "preprocessor_config.json"
        try:
            said = parse_json_object(preprocessor.read_text()) if preprocessor.is_file() else {}
        except ValueError as error:
            raise ArtifactError(f"{preprocessor}: damaged ({error}); restore it.") from error
        return cls(model.to(device), said.get("image_mean", _IMAGENET_MEAN), said.get("image_std", _IMAGENET_STD))

    @classmethod
    def from_config(cls, models: ModelsConfig, device: torch.device | str) -> VisionEncoder:
        """The encoder that the settings name; raises as `from_pretrained`."""
        dtype = getattr(torch, models.encoder_dtype)
        return cls.from_pretrained(models.vision_encoder, revision=models.vision_encoder_revision, device=device, dtype=dtype)

    def encode(self, images: UInt8[Tensor | np.ndarray, "N H W 3"]) -> Float[Tensor, "N P E"]:
        """Patch tokens after the final norm, row-major, without CLS and register tokens; float32.

        ``last_hidden_state`` is used because ``hidden_states[-1]`` is before the norm in some versions and after it in others.

        Raises:
            GeometryError: height or width is not a multiple of the patch.
        """
        return self._run(images)[:, 1 + self.model.config.num_register_tokens :]

    def embed(self, images: UInt8[Tensor | np.ndarray, "N H W 3"]) -> Float[Tensor, "N E"]:
        """The CLS token, L2-normalised: what the picture shows."""
        return torch.nn.functional.normalize(self._run(images)[:, 0], dim=-1)

    @torch.no_grad()
    def _run(self, images: Tensor | np.ndarray) -> Tensor:
        pixels = torch.as_tensor(images)
        height, width = pixels.shape[1:3]
        if height % self.patch_size_px or width % self.patch_size_px:
            raise GeometryError(
                f"pictures of {height} x {width} px do not divide into patches of {self.patch_size_px} px; "
                "letterbox them to a multiple."
            )
        parameter = next(self.model.parameters())
        mean, std = (torch.tensor(values, device=parameter.device) for values in (self._mean, self._std))
        normalised = (pixels.to(parameter.device).float() / 255 - mean) / std
        return self.model(normalised.permute(0, 3, 1, 2).to(parameter.dtype)).last_hidden_state.float()
