"""The frozen encoders over one clip: frames, prompt and reference pictures become the tensors of one shard sample."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from refalign.config import RunConfig
from refalign.geometry import Grid, letterbox
from refalign.io.images import encode_png
from refalign.models.dinov3 import VisionEncoder
from refalign.models.loading import load_model_config
from refalign.models.text import TextEncoder
from refalign.models.vae import VideoVAE
from refalign.shards.augment import Placement, augment
from refalign.shards.sample import FRAME_TOKENS, TARGETS, pack_pictures, pack_tokens


@dataclass(frozen=True)
class ReferencePicture:
    """One letterboxed reference.

    Attributes:
        pixels: uint8 [H, W, 3], on white.
        foreground: float [P], share of the subject in each token's patch.
        content: float [P], share of each patch that is not the white of the letterbox.
    """

    pixels: np.ndarray
    foreground: np.ndarray
    content: np.ndarray
    info: dict[str, Any]


def make_reference(
    crop_png: bytes,
    height_px: int,
    width_px: int,
    token_px: int,
    info: dict[str, Any],
    rng: np.random.Generator | None = None,
) -> ReferencePicture:
    """Letterboxes an RGBA crop on white and measures what each token shows of it.

    Args:
        token_px: side of the square that one token covers.
        rng: draws an augmented view; None shows the crop as it is, centred and as large as it fits.
    """
    with Image.open(io.BytesIO(crop_png)) as crop:
        rgba = crop.convert("RGBA")
    placement = Placement()
    if rng is not None:
        rgba, placement = augment(rgba, rng)
    where: dict[str, Any] = {"scale": placement.scale, "place": (placement.x, placement.y)}
    pixels, is_padding = letterbox(rgba, height_px, width_px, **where)
    background, _ = letterbox(Image.eval(rgba.getchannel("A"), lambda alpha: 255 - alpha), height_px, width_px, **where)
    grid = Grid(stride_px=token_px, patch=1)
    return ReferencePicture(pixels, grid.pool(background[..., 0] < 128), grid.pool(~is_padding), info)


class FrozenEncoders:
    """VAE, text encoder and vision encoder, loaded once per process.

    Raises:
        ArtifactError: a model or a config file is missing, gated or incomplete.
        GeometryError: the base model's tokens are not the vision encoder's.
    """

    def __init__(self, config: RunConfig) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = getattr(torch, config.models.encoder_dtype)
        revision = config.models.base_revision
        base: dict[str, Any] = {"revision": revision, "device": device, "dtype": dtype}
        self.vae = VideoVAE.from_pretrained(config.models.base, **base)
        self.text = TextEncoder.from_pretrained(config.models.base, **base)
        self.max_text_tokens = config.models.max_text_tokens
        self.settings = config.shards
        transformer = load_model_config(config.models.base, subfolder="transformer", revision=revision)
        self.grid = Grid.of(self.vae.model.config, transformer)
        vision = load_model_config(config.models.vision_encoder, revision=config.models.vision_encoder_revision)
        self.grid.check_vision(vision["patch_size"])
        needs_vision = config.shards.targets == "stored" or config.shards.frame_tokens
        self.vision = VisionEncoder.from_config(config.models, device) if needs_vision else None

    def encode(self, frames: np.ndarray, caption: str, references: Sequence[ReferencePicture]) -> dict[str, Tensor]:
        """Tensors of `refalign.shards.sample.SAMPLE_TENSORS`, and targets or, where these are computed later, pictures.

        Each reference is encoded alone, as a video of one frame. Latents and targets are stored as float16.

        Args:
            frames: uint8 [F, H, W, 3].
        """
        pictures = torch.from_numpy(np.stack([reference.pixels for reference in references]))
        shares = {
            name: torch.from_numpy(np.stack([getattr(reference, name) for reference in references])).to(torch.float16)
            for name in ("foreground", "content")
        }
        if self.settings.targets == "stored":
            tokens = self._encode_tokens(TARGETS, pictures)
        else:
            tokens = pack_pictures([encode_png(reference.pixels) for reference in references])
        if self.settings.frame_tokens:
            tokens |= self._encode_tokens(FRAME_TOKENS, frames[self.grid.first_frames(len(frames))])
        return {
            "latents": _stored(self.vae.encode(torch.from_numpy(frames)[None])[0]),
            "prompt_embeds": self.encode_text(caption),
            "reference_latents": _stored(self.vae.encode_images(pictures)),
            **shares,
            **tokens,
        }

    def _encode_tokens(self, name: str, pictures: Any) -> dict[str, Tensor]:
        assert self.vision is not None, "loaded where vision tokens are stored"
        return pack_tokens(name, self.vision.encode(pictures).cpu(), self.settings.target_dtype)

    def encode_text(self, prompt: str) -> Tensor:
        """Embeddings [L, D] of a prompt's real tokens, float16."""
        return _stored(self.text.encode([prompt], self.max_text_tokens)[0])


def _stored(values: Tensor) -> Tensor:
    return values.detach().to("cpu", torch.float16).contiguous()
