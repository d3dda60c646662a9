"""Trains the toy's ``AutoencoderKLWan`` on single frames.

    python -m workshop.weights.train_vae

A Wan VAE sees a single frame through the last temporal slice of each kernel. Only that slice is trained. The others stay zero:
a latent frame of a clip encodes the one picture that its four frames show (`refalign.toy.scenes.HOLD`).
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from refalign.models.vae import convolve_planes
from refalign.toy import WEIGHTS_FOLDER
from workshop.weights.initial_weights import make_vae, save_half
from workshop.weights.sampling import sample_frames, sample_references
from workshop.weights.training import TrainingState, autocast_where_fast, make_optimizers, make_parser, train

SEED = 30
BATCH = 12
KL_WEIGHT = 5e-4
"""Large for an autoencoder: a Transformer learns smooth latents with a variance near 1 better."""
EDGE_WEIGHT = 0.3
WARMUP = 50
"""Steps. The learning rate does not fall after them, because the average of the weights is exported."""
MIN_STD = 0.5
"""Lower bound, so that the noise of a channel that the VAE hardly uses is not scaled up to a variance of 1."""


def prepare(vae: Any) -> None:
    """Makes an untrained VAE encode each frame by itself, with little noise in its latents."""
    for name, module in vae.named_modules():
        if isinstance(module, nn.Conv3d) and module.kernel_size[0] == 3:
            module.weight.data[:, :, :2] = 0
            if name.endswith("time_conv"):
                # downsampling keeps the newest frame, upsampling repeats it
                identity = torch.eye(module.in_channels).repeat(module.out_channels // module.in_channels, 1)
                module.weight.data[:, :, 2] = identity[:, :, None, None]
                nn.init.zeros_(module.bias)
    vae.quant_conv.bias.data[vae.config.z_dim :] = -4.0


def decode_unclamped(vae: Any, latents: Tensor) -> Tensor:
    """Decodes a single frame without the final clamp, which would stop the gradient."""
    vae.clear_cache()
    vae._conv_idx = [0]
    pixels = vae.decoder(vae.post_quant_conv(latents), feat_cache=vae._feat_map, feat_idx=vae._conv_idx, first_chunk=True)
    vae.clear_cache()
    return pixels


def reconstruction_loss(vae: Any, pixels: Tensor, generator: torch.Generator) -> tuple[Tensor, float]:
    """Loss and PSNR (dB) of one batch of pictures, [B, 3, 1, H, W] in [-1, 1]."""
    posterior = vae.encode(pixels).latent_dist
    error = decode_unclamped(vae, posterior.sample(generator)).float() - pixels
    edges = sum(torch.diff(error, dim=axis).abs().mean() for axis in (-1, -2))
    squared = error.square().mean()
    divergence = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
    loss = error.abs().mean() + 4 * squared + EDGE_WEIGHT * edges + KL_WEIGHT * divergence
    return loss, float(10 * torch.log10(4 / squared.detach()))


def make_batch(step: int) -> Tensor:
    """Pixels of one step, [B, 3, 1, H, W] in [-1, 1]: three frames to one reference, every second picture mirrored."""
    first, references = step * BATCH, BATCH // 4
    frames = [truth.frame for truth in sample_frames(SEED, range(first, first + BATCH - references))]
    pixels = to_pixels(np.stack([*frames, *sample_references(SEED, range(first, first + references))])[:, None])
    return torch.cat([pixels[::2], pixels[1::2].flip(-1)])


def to_pixels(frames: np.ndarray) -> Tensor:
    """uint8 [B, F, H, W, 3] -> [B, 3, F, H, W] in [-1, 1]."""
    return (torch.from_numpy(np.ascontiguousarray(frames)).float() / 127.5 - 1).permute(0, 4, 1, 2, 3).contiguous()


@torch.no_grad()
def write_latent_statistics(vae: Any, count: int = 96) -> None:
    """Measures mean and standard deviation per channel over frames and references, and puts them into the config."""
    frames = [truth.frame for truth in sample_frames(SEED + 2, range(count))]
    pictures = np.stack([*frames, *sample_references(SEED + 2, range(count // 2))])
    values = vae.encode(to_pixels(pictures[:, None])).latent_dist.mode().transpose(0, 1).flatten(1)
    vae.register_to_config(
        latents_mean=[round(float(value), 4) for value in values.mean(1)],
        latents_std=[round(max(float(value), MIN_STD), 4) for value in values.std(1)],
    )


def export(averaged: Any, output: Path) -> None:
    """Writes a copy in half precision, with the statistics of its latents."""
    vae = copy.deepcopy(averaged).eval()
    write_latent_statistics(vae)
    save_half(vae, output)


def main() -> None:
    parser = make_parser(__doc__, steps=1300, checkpoint="runs/toy_vae.pt", output=WEIGHTS_FOLDER / "wan" / "vae")
    arguments = parser.parse_args()
    vae = convolve_planes(make_vae())
    prepare(vae)

    def make_loss(step: int) -> tuple[Tensor, dict[str, float]]:
        with autocast_where_fast():
            loss, psnr = reconstruction_loss(vae, make_batch(step), torch.Generator().manual_seed(SEED * 1_000_000 + step))
        return loss, {"psnr_db": psnr}

    train(
        TrainingState(vae, make_optimizers(vae, betas=(0.9, 0.98))),
        make_loss,
        lambda step: min(1.0, (step + 1) / WARMUP),
        lambda averaged: export(averaged, arguments.output),
        steps=arguments.steps,
        checkpoint=arguments.checkpoint,
        clip_norm=1.0,
    )


if __name__ == "__main__":
    main()
