"""Trains the toy's ``AutoencoderKLWan``: first on crops of single frames, then on whole clips, in one run.

    python -m refalign.toy.train_vae --steps 5700 --checkpoint runs/toy_vae.pt [--init runs/toy_vae.pt]
    python -m refalign.toy.train_vae --decoder-only --steps 3600   # goes on without a change to the latents
    python -m refalign.toy.train_vae --steps 0                     # only measures what is shipped

A Wan VAE sees a lone frame through the last temporal slice of each kernel. So that slice is trained first, cheaply;
the other slices start at zero and learn from clips. At the end the latents' mean and standard
deviation per channel are measured and written into the config, so that normalised latents have mean 0 and variance 1.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from refalign.models.vae import VideoVAE, convolve_planes
from refalign.toy import WEIGHTS_FOLDER
from refalign.toy.initial_weights import make_vae, save_half
from refalign.toy.optim import TrainingState, autocast_where_fast, make_optimizers
from refalign.toy.sampling import sample_clip, sample_frame, sample_reference

SEED = 30
HELDOUT_SEED = 31
KL_WEIGHT = 3e-5
EDGE_WEIGHT = 0.5
DECODER_PEAK = 0.3
"""Highest learning rate of a decoder trained alone, over that of a whole VAE: at 1 it forgot more than it learned."""
CLIP_SHARE = 0.55
"""Share of the steps, the last ones, that train on clips, but for every fifth."""


def prepare(vae: Any) -> None:
    """Makes an untrained VAE treat a clip as independent frames, and its latents nearly free of noise."""
    for name, module in vae.named_modules():
        if isinstance(module, nn.Conv3d) and module.kernel_size[0] == 3:
            module.weight.data[:, :, :2] = 0
            if name.endswith("time_conv"):
                # Downsampling keeps the newest frame, upsampling repeats it.
                identity = torch.eye(module.in_channels).repeat(module.out_channels // module.in_channels, 1)
                module.weight.data[:, :, 2] = identity[:, :, None, None]
                nn.init.zeros_(module.bias)
    vae.quant_conv.bias.data[vae.config.z_dim :] = -6.0


def decode_unclamped(vae: Any, latents: Tensor) -> Tensor:
    """Decodes without the final clamp, beyond which no gradient would come back."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

    features, pieces = vae.post_quant_conv(latents), []
    vae.clear_cache()
    for index in range(latents.shape[2]):
        vae._conv_idx = [0]
        piece = features[:, :, index : index + 1]
        pieces.append(vae.decoder(piece, feat_cache=vae._feat_map, feat_idx=vae._conv_idx, first_chunk=index == 0))
    vae.clear_cache()
    return unpatchify(torch.cat(pieces, 2), vae.config.patch_size)


def reconstruction_loss(vae: Any, pixels: Tensor, generator: torch.Generator, *, decoder_only: bool) -> tuple[Tensor, float]:
    """Loss and PSNR (dB) of one batch, [B, 3, F, H, W] in [-1, 1].

    Args:
        decoder_only: the loss is then the logarithm of each item's squared error, which is its PSNR, and edges.
    """
    posterior = vae.encode(pixels).latent_dist
    output = decode_unclamped(vae, posterior.sample(generator))
    error = output.float() - pixels
    edges = sum(torch.diff(error, dim=axis).abs().mean() for axis in (-1, -2))
    squared = error.square().mean((1, 2, 3, 4))
    psnr = float(10 * torch.log10(4 / squared.detach().mean()))
    if decoder_only:
        return squared.log().mean() + EDGE_WEIGHT * edges, psnr
    divergence = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
    return error.abs().mean() + 4 * squared.mean() + EDGE_WEIGHT * edges + KL_WEIGHT * divergence, psnr


def make_batch(step: int, *, clips: bool) -> Tensor:
    """Training pixels of one step, [B, 3, F, H, W] in [-1, 1]: crops of frames and references, or clips."""
    rng = np.random.default_rng([SEED, step])
    if clips:
        # Every second step whole frames, else crops of two.
        crop, count = (96, 1) if step % 2 else (64, 2)
        arrays = [sample_clip(SEED, 4 * step + number).frames for number in range(count)]
    else:
        crop, count = (64, 12) if step % 4 else (96, 6)
        arrays = [_sample_picture(32 * step + number, rng)[None] for number in range(count)]
    top, left = rng.integers(0, 96 - crop + 1, 2)
    pixels = torch.from_numpy(np.stack(arrays)[:, :, top : top + crop, left : left + crop]).float() / 127.5 - 1
    if rng.random() < 0.5:
        pixels = pixels.flip(3)
    return pixels.permute(0, 4, 1, 2, 3).contiguous()


def _sample_picture(number: int, rng: np.random.Generator) -> np.ndarray:
    """A frame, or one time in four a reference on white, which the model will have to encode too."""
    return sample_reference(SEED, number) if rng.random() < 0.25 else sample_frame(SEED, number).frame


def load_vae(folder: Path) -> Any:
    """A saved VAE for measuring: float32, frozen."""
    from diffusers import AutoencoderKLWan

    return VideoVAE(AutoencoderKLWan.from_pretrained(folder).float()).model


def evaluate(vae: Any, num_clips: int, num_references: int) -> dict[str, float]:
    """Held-out PSNR (dB, of values clamped to [-1, 1], averaged over items): clips and single references."""
    vae.eval()
    clips = [_psnr(vae, sample_clip(HELDOUT_SEED, number, "heldout").frames) for number in range(num_clips)]
    pictures = [_psnr(vae, sample_reference(HELDOUT_SEED, number, "heldout")[None]) for number in range(num_references)]
    return {
        "clip_psnr_db": float(np.mean(clips)),
        "clip_psnr_db_min": float(np.min(clips)),
        "reference_psnr_db": float(np.mean(pictures)),
    }


def to_pixels(frames: np.ndarray) -> Tensor:
    """uint8 [F, H, W, 3] -> [1, 3, F, H, W] in [-1, 1]."""
    return (torch.from_numpy(np.ascontiguousarray(frames)).float() / 127.5 - 1).permute(3, 0, 1, 2)[None]


@torch.no_grad()
def pass_through(vae: Any, pixels: Tensor) -> Tensor:
    """Encodes and decodes [B, 3, F, H, W] in [-1, 1]."""
    return vae.decode(vae.encode(pixels).latent_dist.mode()).sample


def _psnr(vae: Any, frames: np.ndarray) -> float:
    pixels = to_pixels(frames)
    return float(10 * torch.log10(4 / (pass_through(vae, pixels) - pixels).square().mean()))


@torch.no_grad()
def write_latent_statistics(vae: Any, num_clips: int = 24) -> None:
    """Measures mean and standard deviation per channel over clips and references, and puts them into the config."""
    latents = []
    for number in range(num_clips):
        for frames in (sample_clip(SEED + 2, number).frames, sample_reference(SEED + 2, number)[None]):
            latents.append(vae.encode(to_pixels(frames)).latent_dist.mode()[0].flatten(1))
    values = torch.cat(latents, 1)
    vae.register_to_config(
        latents_mean=[round(float(value), 4) for value in values.mean(1)],
        latents_std=[round(float(value), 4) for value in values.std(1)],
    )


def learning_rate_factor(step: int, steps: int) -> float:
    """Warm-up over 50 steps, constant to half of the run, then linear to 1%."""
    return min(1.0, (step + 1) / 50, 0.01 + 0.99 * 2 * (1 - step / steps))


def train(
    steps: int, checkpoint: Path, init: Path | None, output: Path, *, save_every: int, decoder_only: bool, peak: float
) -> None:
    """Trains to step ``steps``; exports the moving average of the weights with the latents' statistics.

    Args:
        decoder_only: leaves the latents what they are, so that Transformers of earlier weights still fit; from the first step on,
            it trains on clips.
        peak: the highest learning rate, over that of a whole VAE.
    """
    vae = convolve_planes(make_vae())
    prepare(vae)
    state = TrainingState(vae, make_optimizers(vae, betas=(0.9, 0.98)))
    if init:
        state.load(init)
    if decoder_only:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    clip_share = 1.0 if decoder_only else CLIP_SHARE
    started, psnrs = time.monotonic(), []
    while (step := state.step) < steps:
        vae.train()
        pixels = make_batch(step, clips=step >= (1 - clip_share) * steps and step % 5 > 0)
        with autocast_where_fast():
            generator = torch.Generator().manual_seed(SEED * 1_000_000 + step)
            loss, psnr = reconstruction_loss(vae, pixels, generator, decoder_only=decoder_only)
            loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        state.advance(peak * learning_rate_factor(step, steps))
        psnrs.append(psnr)
        if state.step % 100 == 0:
            figures = f"loss {float(loss.detach()):.4f} PSNR {np.mean(psnrs):.2f} dB"
            print(f"step {state.step}/{steps} {figures} {time.monotonic() - started:.0f} s", flush=True)
            psnrs.clear()
        if state.step % save_every == 0 or state.step == steps:
            state.save(checkpoint)
            print(f"step {state.step} held-out {evaluate(state.averaged, 8, 8)}", flush=True)
            export(state.averaged, output, keep_statistics=decoder_only)


def export(averaged: Any, output: Path, *, keep_statistics: bool) -> None:
    """Writes a copy in half precision, with fresh latent statistics or those that ``output`` has."""
    fresh = convolve_planes(make_vae())
    fresh.load_state_dict(averaged.state_dict())
    if keep_statistics:
        config = fresh.load_config(output)
        fresh.register_to_config(latents_mean=config["latents_mean"], latents_std=config["latents_std"])
    else:
        write_latent_statistics(fresh.eval())
    save_half(fresh, output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2500, help="total number of steps; 0 only measures --output")
    parser.add_argument("--save-every", type=int, default=600, help="steps between checkpoints and exports")
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/toy_vae.pt"), help="where the training state is kept")
    parser.add_argument("--init", type=Path, help="training state to continue from, or folder of weights to start from")
    parser.add_argument("--output", type=Path, default=WEIGHTS_FOLDER / "wan" / "vae")
    parser.add_argument("--decoder-only", action="store_true", help="go on from --output without a change to its latents")
    parser.add_argument("--peak", type=float, help="highest learning rate over that of a whole VAE; a decoder alone takes 0.3")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.steps:
        init = arguments.init or (arguments.output if arguments.decoder_only else None)
        peak = arguments.peak or (DECODER_PEAK if arguments.decoder_only else 1.0)
        options = {"save_every": arguments.save_every, "decoder_only": arguments.decoder_only, "peak": peak}
        train(arguments.steps, arguments.checkpoint, init, arguments.output, **options)
    print(evaluate(load_vae(arguments.output), 100, 100))


if __name__ == "__main__":
    main()
