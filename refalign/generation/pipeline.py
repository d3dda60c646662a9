"""Generation: a diffusers-style pipeline from a prompt and reference images to a video.

    pipeline = RefAlignPipeline.from_pretrained("runs/model")
    video = pipeline("a red fox and a blue ball", references=[fox, ball], generator=torch.Generator().manual_seed(0)).frames[0]

It loads neither projectors nor a vision encoder. A step costs as much as in the base model.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from refalign.errors import ConfigError
from refalign.generation.settings import check_digests, load_export_settings, published_settings
from refalign.geometry import Grid, letterbox
from refalign.models.loading import looks_local
from refalign.models.text import TEXT_TOKENS, TextEncoder, pad_prompt_embeds
from refalign.models.vae import VideoVAE
from refalign.models.wan import RefAlignTransformer, load_transformer

Reference = Image.Image | np.ndarray
"""A PIL image, or an RGB uint8 array [height, width, 3]; of any size."""
Pass = tuple[Tensor, Tensor | None]
"""Prompt embeddings and reference latents."""
_MAX_TIMES_REFERENCES = 2
"""More than this many times the references of a training sample are refused; each adds a frame of tokens."""
_LOCKS: dict[str, threading.RLock] = {}
"""By device. VAE and text encoder keep state while they work, and pipelines may share them."""
_log = logging.getLogger(__name__)


def make_scheduler(name: str = "euler", shift: float = 5.0) -> Any:
    """A diffusers scheduler for flow matching: ``euler`` (published) or ``unipc`` (fewer steps for the same quality).

    Raises:
        ConfigError: another name.
    """
    if name == "euler":
        return FlowMatchEulerDiscreteScheduler(shift=shift)
    if name == "unipc":
        return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    raise ConfigError(f"scheduler {name!r} is not known; choose euler or unipc, or pass a diffusers scheduler.")


def combine_guidance(
    null: Tensor, with_references: Tensor, with_text: Tensor, reference_guidance_scale: float, guidance_scale: float
) -> Tensor:
    """v = v(null, no ref) + s_ref [v(null, refs) - v(null, no ref)] + s_text [v(text, refs) - v(null, refs)]."""
    return null + reference_guidance_scale * (with_references - null) + guidance_scale * (with_text - with_references)


class RefAlignPipeline(DiffusionPipeline):
    """Reference-to-video generation with Wan.

    ``pipeline.scheduler`` may be any diffusers scheduler for flow matching. ``enable_model_cpu_offload``,
    ``set_progress_bar_config`` and ``vae.enable_tiling`` work as in every diffusers pipeline. Several threads may call one
    pipeline: calls on one device wait for each other, and each steps its own copy of the scheduler.

    Attributes:
        max_sequence_length: text tokens the Transformer attends to, padding included; as it was trained.
        max_references: most references of a training sample; None: unknown.

    Source: the published inference (three passes, Euler, shift 5). Ours also takes batches of prompts.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds"]

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: UMT5EncoderModel,
        vae: AutoencoderKLWan,
        transformer: RefAlignTransformer,
        scheduler: Any,
    ) -> None:
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer, scheduler=scheduler
        )
        self.max_sequence_length = TEXT_TOKENS
        self.max_references: int | None = None

    @classmethod
    def from_pretrained(  # ty: ignore[incompatible-method-override]  # fewer options, all named
        cls,
        source: str,
        *,
        base: str | None = None,
        revision: str | None = None,
        torch_dtype: torch.dtype = torch.float32,
        transformer: RefAlignTransformer | None = None,
        scheduler: str | Any = "euler",
    ) -> RefAlignPipeline:
        """Loads a diffusers-layout Wan folder or hub id.

        Args:
            source: holds ``transformer/``, and the other parts unless ``base`` is given.
            base: holds ``vae/``, ``text_encoder/`` and ``tokenizer/``. Default: what the folder's ``refalign.json`` names,
                else ``source``.
            torch_dtype: of Transformer and text encoder; the VAE stays in float32, because bf16 shows as banding.
            transformer: one that is loaded already.
            scheduler: ``euler``, ``unipc`` or a diffusers scheduler. The folder's own is not used: Wan's shift is not
                RefAlign's, which is 5 unless the folder's ``refalign.json`` has another.

        Raises:
            ArtifactError: a part is missing, gated or incomplete.
        """
        settings, parts, parts_revision = published_settings(), source, revision
        if looks_local(source):
            folder = Path(source).expanduser()
            export = load_export_settings(folder)
            check_digests(folder)
            settings = export.generation
            if export.base:
                parts, parts_revision = export.base, export.base_revision
        if base:
            parts, parts_revision = base, None
        text = TextEncoder.from_pretrained(parts, revision=parts_revision, dtype=torch_dtype)
        pipeline = cls(
            tokenizer=text.tokenizer,
            text_encoder=text.model,
            vae=VideoVAE.from_pretrained(parts, revision=parts_revision).model,
            transformer=transformer or load_transformer(source, revision=revision, dtype=torch_dtype).eval(),
            scheduler=make_scheduler(scheduler, settings.shift) if isinstance(scheduler, str) else scheduler,
        )
        pipeline.max_sequence_length, pipeline.max_references = settings.max_sequence_length, settings.max_references
        return pipeline

    @property
    def grid(self) -> Grid:
        """Sizes of latents and tokens of this VAE and Transformer."""
        return Grid.of(self.vae.config, self.transformer.config)

    def to_json_string(self) -> str:
        """The index names stock diffusers' classes, so that a saved folder opens there too (as text-to-video)."""
        index = super().to_json_string()
        index = index.replace(f'"{type(self).__name__}"', '"WanPipeline"')
        return index.replace('"refalign.models.wan"', '"diffusers"').replace('"RefAlignTransformer"', '"WanTransformer3DModel"')

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        references: Sequence[Reference] | Sequence[Sequence[Reference]] = (),
        *,
        negative_prompt: str = "",
        height: int = 480,
        width: int = 832,
        num_frames: int = 81,
        num_inference_steps: int = 50,
        reference_guidance_scale: float = 5.0,
        guidance_scale: float = 7.5,
        generator: torch.Generator | list[torch.Generator] | None = None,
        batch_passes: bool = False,
        output_type: str = "np",
        callback_on_step_end: Callable[[Any, int, Any, dict[str, Tensor]], dict[str, Tensor]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> WanPipelineOutput:
        """Makes one video per prompt.

        Args:
            references: images of the subjects, each fitted on white into height x width. With several prompts: one sequence
                for each, all of the same length. Cut subjects out onto white beforehand, but not scenes.
            negative_prompt: the null text of the formula (`combine_guidance`).
            reference_guidance_scale, guidance_scale: how strongly references and text count; 1 does not amplify them.
            batch_passes: runs passes of equal length as one batch: faster on a large GPU, more memory.
            output_type: ``np`` (float [B, F, H, W, 3] in [0, 1]), ``pil`` (lists of images), ``uint8`` (tensor) or ``latent``.
            callback_on_step_end: diffusers' callback (pipeline, step, timestep, tensors named below) -> changed tensors.

        Raises:
            GeometryError: height, width or num_frames do not fit the grid; the message names sizes that do.
            ConfigError: references do not match the prompts or are far too many for the model, or an unknown output type.
        """
        self.grid.check(height, width, num_frames)
        if output_type not in ("np", "pil", "uint8", "latent"):
            raise ConfigError(f"output_type {output_type!r} is not known; choose np, pil, uint8 or latent.")
        prompts, given = _pair_up(prompt, references)
        self._check_references(max((len(each) for each in given), default=0))
        device = self._execution_device
        callback = callback_on_step_end, callback_on_step_end_tensor_inputs
        with _LOCKS.setdefault(str(device), threading.RLock()):
            # 1. Conditions
            tensors = self._encode_text(prompts, negative_prompt, device)
            reference_latents = self._encode_references(given, height, width, device)

            # 2. Noise
            shape = (len(prompts), self.transformer.config.in_channels, *self.grid.latent_shape(num_frames, height, width))
            tensors["latents"] = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)

            # 3. Denoising
            scales = reference_guidance_scale, guidance_scale
            latents = self._denoise(tensors, reference_latents, num_inference_steps, scales, batch_passes, callback)

            # 4. Pixels
            frames = self._decode(latents, output_type, device)
            self.maybe_free_model_hooks()
        return WanPipelineOutput(frames=frames)

    def _check_references(self, count: int) -> None:
        """Warns of more references than the model was trained with, and refuses far more."""
        known = self.max_references
        if known is None or count <= known:
            return
        told, most = f"{count} references; the model was trained with up to {known}.", _MAX_TIMES_REFERENCES * known
        if count > most:
            raise ConfigError(f"{told} Give at most {most}.")
        _log.warning("%s Some may be ignored.", told)

    def _denoise(
        self,
        tensors: dict[str, Tensor],
        reference_latents: Tensor | None,
        num_steps: int,
        scales: tuple[float, float],
        batch_passes: bool,
        callback: tuple[Callable[..., dict[str, Tensor]] | None, Sequence[str]],
    ) -> Tensor:
        """Latents after all steps."""
        scheduler = copy.deepcopy(self.scheduler)
        on_step_end, names = callback
        with self.progress_bar(total=num_steps) as progress:
            for step, timestep in enumerate(_set_timesteps(scheduler, num_steps, tensors["latents"].device)):
                predictions = self._predict(tensors, timestep, reference_latents, batch_passes=batch_passes)
                velocity = combine_guidance(*predictions, *scales)
                tensors["latents"] = scheduler.step(velocity, timestep, tensors["latents"], return_dict=False)[0]
                if on_step_end:
                    tensors |= on_step_end(self, step, timestep, {name: tensors[name] for name in names})
                progress.update()
        return tensors["latents"]

    def _encode_text(self, prompts: list[str], negative_prompt: str, device: torch.device) -> dict[str, Tensor]:
        encoder = TextEncoder(self.tokenizer, self.text_encoder)
        for prompt in prompts:
            if said := encoder.find_losses(prompt, self.max_sequence_length).describe():
                _log.warning("prompt %r: %s.", prompt[:40], said)
        encoded = encoder.encode([*prompts, negative_prompt], self.max_sequence_length)
        padded = pad_prompt_embeds(encoded, self.max_sequence_length).to(device)
        return {"prompt_embeds": padded[:-1], "negative_prompt_embeds": padded[-1:].expand(len(prompts), -1, -1)}

    def _encode_references(
        self, references: Sequence[Sequence[Reference]], height: int, width: int, device: torch.device
    ) -> Tensor | None:
        """Latents [B, K, Z, h, w], or None where there are no references."""
        if not any(len(each) for each in references):
            return None
        images = [letterbox(image, height, width)[0] for each in references for image in each]
        latents = VideoVAE(self.vae, device=device).encode_images(torch.from_numpy(np.stack(images)))
        return latents.unflatten(0, (len(references), -1))

    def _predict(
        self, tensors: dict[str, Tensor], timestep: Tensor, references: Tensor | None, *, batch_passes: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Velocities for (null text, no reference), (null text, references), (text, references)."""
        null, text = tensors["negative_prompt_embeds"], tensors["prompt_embeds"]
        passes: list[Pass] = [(null, None), (null, references), (text, references)]
        if references is None:
            passes = passes[1:]  # the first two are the same
        batches = [[each] for each in passes]
        if batch_passes:  # a frame of zeros stands for no reference
            batches = [[*batch] for _, batch in groupby(passes, lambda each: 1 if each[1] is None else each[1].shape[1])]
        velocities = [velocity for batch in batches for velocity in self._run(tensors["latents"], timestep, batch)]
        return velocities[0], velocities[-2], velocities[-1]

    def _run(self, latents: Tensor, timestep: Tensor, passes: list[Pass]) -> Sequence[Tensor]:
        """The Transformer for several passes as one batch."""
        given = [references for _, references in passes if references is not None]
        mask = None
        if len(given) not in (0, len(passes)):
            attends = torch.tensor([references is not None for _, references in passes]).repeat_interleave(len(latents))
            mask, given = attends[:, None].expand(-1, given[0].shape[1]), given[:1] * len(passes)
        velocity = self.transformer(
            torch.cat([latents] * len(passes)),
            timestep.expand(len(passes) * len(latents)),
            torch.cat([text for text, _ in passes]),
            torch.cat(given) if given else None,
            mask,
        ).velocity
        return velocity.float().chunk(len(passes))

    def _decode(self, latents: Tensor, output_type: str, device: torch.device) -> Any:
        if output_type == "latent":
            return latents
        frames = VideoVAE(self.vae, device=device).decode(latents).cpu()
        if output_type == "uint8":
            return frames
        if output_type == "np":
            return frames.numpy().astype(np.float32) / 255
        return [[Image.fromarray(frame) for frame in video.numpy()] for video in frames]


def _set_timesteps(scheduler: Any, num_steps: int, device: torch.device) -> Tensor:
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        # Its own levels end elsewhere than the published ones; it applies its shift to these.
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.0, num_steps + 1)[:-1].tolist(), device=device)
    else:
        scheduler.set_timesteps(num_steps, device=device)
    return scheduler.timesteps


def _pair_up(prompt: str | Sequence[str], references: Sequence[Any]) -> tuple[list[str], Sequence[Sequence[Reference]]]:
    """A list of prompts, and a sequence of references for each, or an empty sequence where there are none.

    Raises:
        ConfigError: references do not match the prompts, or each other, in number.
    """
    prompts, given = ([prompt], [references]) if isinstance(prompt, str) else (list(prompt), references)
    if len(given) not in (0, len(prompts)):
        raise ConfigError(f"{len(prompts)} prompts but {len(given)} sequences of references; give one for each prompt.")
    counts = sorted({len(each) for each in given})
    if len(counts) > 1:
        raise ConfigError(f"prompts of one call have {counts} references; make one call for each number of references.")
    return prompts, given
