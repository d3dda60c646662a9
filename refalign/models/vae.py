"""The frozen video VAE: uint8 frames to normalised latents and back."""

from __future__ import annotations

from types import MethodType
from typing import Any, TypeVar

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan, WanCausalConv3d
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional

from refalign.errors import GeometryError
from refalign.models.loading import load_pretrained

Model = TypeVar("Model", bound=nn.Module)


class VideoVAE:
    """Wan's causal video VAE with its latent normalisation.

    Args:
        model: the autoencoder; it is put into evaluation mode and its gradients are switched off.
        device: where inputs go; None: where the model is. They differ while the model is offloaded to the CPU.
    """

    def __init__(self, model: AutoencoderKLWan, *, device: torch.device | str | None = None) -> None:
        self.model = convolve_planes(model.eval().requires_grad_(False))
        self.device = torch.device(device) if device is not None else model.device

    @classmethod
    def from_pretrained(
        cls, source: str, *, revision: str | None = None, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> VideoVAE:
        """Loads ``vae/`` of a diffusers-layout folder or hub id; errors as `load_pretrained`."""
        model = load_pretrained(AutoencoderKLWan, source, subfolder="vae", revision=revision, torch_dtype=dtype)
        return cls(model.to(device))

    @torch.no_grad()
    def encode(self, frames: UInt8[Tensor, "B F H W 3"]) -> Float[Tensor, "B Z T h w"]:
        """Normalised latents of videos: the posterior's mode, minus mean, over standard deviation, in float32.

        Raises:
            GeometryError: F - 1, H or W is not a multiple of the VAE's stride (the VAE itself would drop the rest).
        """
        _, num_frames, height, width, _ = frames.shape
        stride_frames, stride_px = (self.model.config[f"scale_factor_{axis}"] for axis in ("temporal", "spatial"))
        if (num_frames - 1) % stride_frames or height % stride_px or width % stride_px:
            raise GeometryError(
                f"{num_frames} frames of {height} x {width} px do not fit the VAE: frames must be 1 more than a multiple "
                f"of {stride_frames}, height and width multiples of {stride_px}."
            )
        pixels = frames.permute(0, 4, 1, 2, 3).to(self.device, self.model.dtype) / 127.5 - 1
        mean, std = self._load_statistics()
        return (self.model.encode(pixels).latent_dist.mode().float() - mean) / std

    def encode_images(self, images: UInt8[Tensor, "N H W 3"]) -> Float[Tensor, "N Z h w"]:
        """Normalised latents of images, each as a one-frame video of its own, as references are."""
        return self.encode(images[:, None])[:, :, 0]

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "B Z T h w"]) -> UInt8[Tensor, "B F H W 3"]:
        """Frames of normalised latents."""
        mean, std = self._load_statistics()
        raw = latents.to(self.device).float() * std + mean
        pixels = self.model.decode(raw.to(self.model.dtype)).sample.float()
        return ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 4, 1)

    def _load_statistics(self) -> Float[Tensor, "2 Z 1 1 1"]:
        """Mean and standard deviation of the latents' channels."""
        config = self.model.config
        return torch.tensor([config["latents_mean"], config["latents_std"]], device=self.device)[:, :, None, None, None]


def convolve_planes(model: Model) -> Model:
    """Runs Wan's causal convolutions as two-dimensional ones over stacked frames if their input is on the CPU.

    The numbers are the same up to rounding, in half the time (toy VAE, one core, a clip or images). A lone first frame meets only
    the last temporal slice of a kernel.
    """
    for module in model.modules():
        if isinstance(module, WanCausalConv3d) and module.kernel_size[0] > 1 and module.stride[0] == 1:
            module.forward = MethodType(_convolve_planes, module)
    return model


def _convolve_planes(
    convolution: Any, x: Float[Tensor, "B C F H W"], cache_x: Float[Tensor, "B C P H W"] | None = None
) -> Float[Tensor, "B D F H W"]:
    if x.device.type != "cpu":
        return WanCausalConv3d.forward(convolution, x, cache_x)
    left, _, top, _, past, _ = convolution._padding
    weight, bias = convolution.weight, convolution.bias
    if x.shape[2] == 1 and cache_x is None:
        return functional.conv2d(x[:, :, 0], weight[:, :, -1], bias, padding=(top, left))[:, :, None]
    frames = functional.pad(x if cache_x is None else torch.cat([cache_x, x], 2), (0, 0, 0, 0, past, 0))
    frames = frames[:, :, -(x.shape[2] + past) :].transpose(1, 2)
    batch, length = x.shape[0], x.shape[2]
    stacked = torch.cat([frames[:, tap : tap + length] for tap in range(past + 1)], 2).flatten(0, 1)
    planes = functional.conv2d(stacked, weight.transpose(1, 2).flatten(1, 2), bias, padding=(top, left))
    return planes.unflatten(0, (batch, length)).transpose(1, 2)
