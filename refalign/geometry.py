"""Letterboxing and the grids of latents and tokens; numpy and PIL only.

One token covers 16 x 16 px on both sides of the alignment: 8 (VAE) x 2 (Transformer patch) = 16 (vision patch). This equality is
what makes token i and target i the same place, and ``check_token_grid`` holds it when models are loaded.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image

from refalign.errors import GeometryError

VAE_STRIDE_PX = 8
VAE_STRIDE_FRAMES = 4
TOKEN_PX = 16


def letterbox(
    image: Image.Image | UInt8[np.ndarray, "h w channels"],
    height_px: int,
    width_px: int,
    *,
    scale: float = 1.0,
    place: tuple[float, float] = (0.5, 0.5),
) -> tuple[UInt8[np.ndarray, "H W 3"], Bool[np.ndarray, "H W"]]:
    """Fits an image into a size without cropping or distorting it, on white.

    Args:
        image: any PIL image, or an RGB or RGBA array; transparency becomes white.
        scale: size, relative to the largest that fits; at most 1.
        place: share of the free room that lies left of it and above it; (.5, .5) centres.

    Returns:
        The pixels, and a mask that is True where white was added.

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


def token_grid(height_px: int, width_px: int) -> tuple[int, int]:
    """Rows and columns of tokens of one frame or reference."""
    return height_px // TOKEN_PX, width_px // TOKEN_PX


def latent_shape(num_frames: int, height_px: int, width_px: int) -> tuple[int, int, int]:
    """T, h, w of a video's latents."""
    return 1 + (num_frames - 1) // VAE_STRIDE_FRAMES, height_px // VAE_STRIDE_PX, width_px // VAE_STRIDE_PX


def first_frames(num_frames: int) -> list[int]:
    """The pixel frame that each latent frame begins with: 0, 1, 5, 9, ..."""
    return [max(0, VAE_STRIDE_FRAMES * (t - 1) + 1) for t in range(latent_shape(num_frames, 0, 0)[0])]


def pool_to_tokens(mask_px: Bool[np.ndarray, "H W"]) -> Float[np.ndarray, "P"]:
    """Share of True pixels in each token's 16 x 16 px, row-major, as the tokens are."""
    rows, columns = token_grid(*mask_px.shape)
    return mask_px.reshape(rows, TOKEN_PX, columns, TOKEN_PX).mean((1, 3), dtype=np.float32).ravel()


def check_geometry(height_px: int, width_px: int, num_frames: int) -> None:
    """Checks that a video can be put on the latent and token grids.

    Raises:
        GeometryError: height or width is not a multiple of 16, or frames are not 1 more than a multiple of 4; the
            message names the nearest sizes that are.
    """
    wanted = {
        "height": (height_px, TOKEN_PX, 0),
        "width": (width_px, TOKEN_PX, 0),
        "num_frames": (num_frames, VAE_STRIDE_FRAMES, 1),
    }
    faults = []
    for name, (value, stride, offset) in wanted.items():
        smallest = offset or stride
        if value >= smallest and (value - offset) % stride == 0:
            continue
        below = max(smallest, math.floor((value - offset) / stride) * stride + offset)
        rule = f"a multiple of {stride}" if not offset else f"{offset} more than a multiple of {stride}"
        faults.append(f"{name}={value} is not {rule}; nearest: {below} or {below + stride}")
    if faults:
        raise GeometryError(". ".join(faults) + ".")


def check_token_grid(vae_stride_px: int, dit_patch: int, vision_patch_px: int) -> None:
    """Checks that a reference has the same tokens in the Transformer and in the vision encoder.

    Raises:
        GeometryError: VAE stride x Transformer patch, the vision patch and 16 px are not all equal.
    """
    if not vae_stride_px * dit_patch == vision_patch_px == TOKEN_PX:
        raise GeometryError(
            f"VAE stride {vae_stride_px} x Transformer patch {dit_patch} = {vae_stride_px * dit_patch} px per token, "
            f"the vision encoder's patch is {vision_patch_px} px; both must be {TOKEN_PX}. Choose models that agree."
        )
