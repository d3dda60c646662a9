"""The frozen encoders over one clip: frames, prompt and reference pictures become the tensors of one shard sample."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

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
    """One letterboxed reference."""

    pixels: np.ndarray  # uint8 [H, W, 3], on white
    foreground: np.ndarray  # float [P], share of the subject in each token's patch
    content: np.ndarray  # float [P], share of each patch that is not the white of the letterbox


def make_reference(
    crop_png: bytes, height_px: int, width_px: int, token_px: int, rng: np.random.Generator | None = None
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
    fit = partial(letterbox, height_px=height_px, width_px=width_px, scale=placement.scale, place=placement.place)
    pixels, is_padding = fit(rgba)
    background, _ = fit(Image.eval(rgba.getchannel("A"), lambda alpha: 255 - alpha))
    grid = Grid(stride_px=token_px, patch=1)
    return ReferencePicture(pixels, grid.pool(background[..., 0] < 128), grid.pool(~is_padding))


class FrozenEncoders:
    """VAE, text encoder and vision encoder, loaded once per process.

    Raises:
        ArtifactError: a model or a config file is missing, gated or incomplete.
        GeometryError: the base model's tokens are not the vision encoder's.
    """

    def __init__(self, config: RunConfig) -> None:
        models, self.settings = config.models, config.shards
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype, revision = getattr(torch, models.encoder_dtype), models.base_revision
        self.vae = VideoVAE.from_pretrained(models.base, revision=revision, device=device, dtype=dtype)
        self.text = TextEncoder.from_pretrained(models.base, revision=revision, device=device, dtype=dtype)
        self.max_text_tokens = models.max_text_tokens
        self.grid = Grid.of(self.vae.model.config, load_model_config(models.base, subfolder="transformer", revision=revision))
        self.grid.check_vision(load_model_config(models.vision_encoder, revision=models.vision_encoder_revision)["patch_size"])
        needs_vision = self.settings.targets == "stored" or self.settings.frame_tokens
        self.vision = VisionEncoder.from_config(models, device) if needs_vision else None

    def encode(self, frames: np.ndarray, caption: str, references: Sequence[ReferencePicture]) -> dict[str, Tensor]:
        """Tensors of `refalign.shards.sample.SAMPLE_TENSORS`, and targets or, where training computes them, pictures.

        Each reference is encoded alone, as a video of one frame. Latents and targets are stored as float16.

        Args:
            frames: uint8 [F, H, W, 3].
        """
        pictures = torch.from_numpy(np.stack([reference.pixels for reference in references]))
        tensors = {
            "latents": _stored(self.vae.encode(torch.from_numpy(frames)[None])[0]),
            "prompt_embeds": self.encode_text(caption),
            "reference_latents": _stored(self.vae.encode_images(pictures)),
            "foreground": _stored(torch.from_numpy(np.stack([reference.foreground for reference in references]))),
            "content": _stored(torch.from_numpy(np.stack([reference.content for reference in references]))),
        }
        if self.settings.targets == "stored":
            tensors |= self._encode_tokens(TARGETS, pictures)
        else:
            tensors |= pack_pictures([encode_png(reference.pixels) for reference in references])
        if self.settings.frame_tokens:
            tensors |= self._encode_tokens(FRAME_TOKENS, torch.from_numpy(frames[self.grid.first_frames(len(frames))]))
        return tensors

    def encode_text(self, prompt: str) -> Tensor:
        """Embeddings [L, D] of a prompt's real tokens, float16."""
        return _stored(self.text.encode([prompt], self.max_text_tokens)[0])

    def _encode_tokens(self, name: str, pictures: Tensor) -> dict[str, Tensor]:
        assert self.vision is not None, "loaded where vision tokens are stored"
        return pack_tokens(name, self.vision.encode(pictures).cpu(), self.settings.target_dtype)


def _stored(values: Tensor) -> Tensor:
    return values.detach().to("cpu", torch.float16).contiguous()
