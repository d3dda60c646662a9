"""Letterboxing and the grids of latents and tokens; numpy and PIL only.

One token covers the same square on both sides of the alignment: VAE stride x Transformer patch = vision patch (8 x 2 = 16 px for
Wan2.1). So token i and target i are the same place. ``Grid.check_vision`` checks this when models are loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image

from refalign.errors import GeometryError


def letterbox(
    image: Image.Image | UInt8[np.ndarray, "h w channels"],
    height_px: int,
    width_px: int,
    *,
    scale: float = 1.0,
    place: tuple[float, float] = (0.5, 0.5),
) -> tuple[UInt8[np.ndarray, "H W 3"], Bool[np.ndarray, "H W"]]:
    """Fits an image into a size without cropping or distorting it, on white; returns pixels, and where white was added.

    Args:
        image: any PIL image, or an RGB or RGBA array; transparency becomes white.
        scale: size, relative to the largest that fits; at most 1.
        place: share of the free room that lies left of it and above it; (.5, .5) centres.

    Raises:
        GeometryError: the image has no pixels.
    """
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    if min(picture.size) < 1:
        raise GeometryError(f"an image of {picture.width} x {picture.height} px has no pixels; give one that has.")
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture.convert("RGBA"))
    scale *= min(height_px / picture.height, width_px / picture.width)
    fitted_h = min(height_px, max(1, round(picture.height * scale)))
    fitted_w = min(width_px, max(1, round(picture.width * scale)))
    fitted = picture.convert("RGB").resize((fitted_w, fitted_h), Image.Resampling.LANCZOS)
    left, top = int((width_px - fitted_w) * place[0]), int((height_px - fitted_h) * place[1])
    pixels = np.full((height_px, width_px, 3), 255, dtype=np.uint8)
    is_padding = np.ones((height_px, width_px), dtype=bool)
    inside = np.s_[top : top + fitted_h, left : left + fitted_w]
    pixels[inside], is_padding[inside] = np.asarray(fitted), False
    return pixels, is_padding


@dataclass(frozen=True)
class Grid:
    """How a video lies on latents and tokens; the defaults are Wan2.1's."""

    stride_px: int = 8  # pixels per latent cell, in height and width
    stride_frames: int = 4  # pixel frames per latent frame, after the first
    patch: int = 2  # latent cells per token, in height and width

    @classmethod
    def of(cls, vae_config: Mapping[str, Any], transformer_config: Mapping[str, Any]) -> Grid:
        """Reads the contents of the two models' config files.

        Raises:
            GeometryError: a stride is no whole number above 0, or the Transformer's patch is not (1, n, n).
        """
        stride_px, stride_frames = vae_config.get("scale_factor_spatial", 8), vae_config.get("scale_factor_temporal", 4)
        patch_size = transformer_config.get("patch_size")
        match stride_px, stride_frames, patch_size:
            case int(), int(), [1, int(patch), int(columns)] if patch == columns and min(stride_px, stride_frames, patch) > 0:
                return cls(stride_px, stride_frames, patch)
        raise GeometryError(
            f"VAE strides of {stride_px} px and {stride_frames} frames and Transformer patch {patch_size} make no grid; "
            "choose a base model with strides above 0 and a patch of (1, n, n)."
        )

    @property
    def token_px(self) -> int:
        """Side of the square of pixels that one token covers."""
        return self.stride_px * self.patch

    def tokens(self, height_px: int, width_px: int) -> tuple[int, int]:
        """Rows and columns of tokens of one frame or reference."""
        return height_px // self.token_px, width_px // self.token_px

    def latent_shape(self, num_frames: int, height_px: int, width_px: int) -> tuple[int, int, int]:
        """T, h, w of a video's latents."""
        return 1 + (num_frames - 1) // self.stride_frames, height_px // self.stride_px, width_px // self.stride_px

    def first_frames(self, num_frames: int) -> list[int]:
        """The pixel frame that each latent frame begins with: 0, 1, 5, 9, ... for Wan2.1."""
        return [max(0, self.stride_frames * (t - 1) + 1) for t in range(self.latent_shape(num_frames, 0, 0)[0])]

    def pool(self, mask_px: Bool[np.ndarray, "H W"]) -> Float[np.ndarray, "P"]:
        """Share of True pixels in each token's square, row-major, as the tokens are."""
        rows, columns = self.tokens(*mask_px.shape)
        return mask_px.reshape(rows, self.token_px, columns, self.token_px).mean((1, 3), dtype=np.float32).ravel()

    def check(self, height_px: int, width_px: int, num_frames: int) -> None:
        """Checks that a video can be put on the grid; a `GeometryError` names the nearest sizes that can."""
        faults = []
        for name, value, stride, offset in (
            ("height", height_px, self.token_px, 0),
            ("width", width_px, self.token_px, 0),
            ("num_frames", num_frames, self.stride_frames, 1),
        ):
            below = max(offset or stride, (value - offset) // stride * stride + offset)
            if value != below:
                rule = f"{offset} more than a multiple" if offset else "a multiple"
                faults.append(f"{name}={value} is not {rule} of {stride}; nearest: {below} or {below + stride}")
        if faults:
            raise GeometryError(". ".join(faults) + ".")

    def check_vision(self, vision_patch_px: int) -> None:
        """Raises a `GeometryError` if the vision encoder's patch is not a token's side: tokens and targets must be one place."""
        if vision_patch_px != self.token_px:
            raise GeometryError(
                f"VAE stride {self.stride_px} x Transformer patch {self.patch} = {self.token_px} px per token, "
                f"the vision encoder's patch is {vision_patch_px} px; choose models that agree."
            )
