"""What a data set would take under a config: storage, GPU-hours, GPUs, hours and money, before anything is fetched or rented.

Floating point operations and bytes follow from sizes by the formulas that runs use (`compute`, `memory` and `storage` beside
this file). Speeds are assumptions. With D GPUs of peak F FLOP/s, of which a share u is used,

    curation   clips (frames looked at / detector rate + subjects E(crop) / (u F))
    encode     kept clips ((T H W + references H W) / VAE rate + references E(reference) / (u F))
    train      steps x global batch x operations of a sample / (u F)
    hours      GPU-hours / D

where E is a forward pass of the vision encoder. Decoding, text encoding, start-up, evaluation and idle GPUs are left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ConfigDict, Field, ValidationError, model_validator

from refalign.config import Count, Positive, RunConfig, Section, describe_problems
from refalign.config.section import Amount
from refalign.errors import ConfigError
from refalign.estimates.compute import PEAK_FLOPS, EncoderSizes, ModelSizes, PassSizes, computes_targets, count_flops
from refalign.estimates.memory import MemoryEstimate, check_memory, estimate_memory
from refalign.estimates.storage import TEXT_BYTES_PER_TOKEN, ShardSize, count_parts
from refalign.io.storage import describe_bytes
from refalign.models.loading import load_grid, load_model_config

_PUBLISHED: dict[str, dict[str, Any]] = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": {"num_attention_heads": 40, "ffn_dim": 13_824, "num_layers": 40},
    "facebook/dinov3-vitl16-pretrain-lvd1689m": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_register_tokens": 4,
        "use_gated_mlp": False,
        "patch_size": 16,
    },
}
"""Sizes of the presets' models, so that planning needs no hub: DINOv3 is gated."""
_WAN = {
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "patch_size": [1, 2, 2],
}


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


class Assumptions(Section):
    """What there is to learn from, and what it would run on; each field is a flag of ``pipelines/plan.py``.

    None of the speeds was measured with this software: they are where a plan begins.
    """

    model_config = ConfigDict(alias_generator=_flag)

    clips: Positive | None = None
    """number of clips before curation (give this or --hours)"""
    hours: Positive | None = None
    """hours of video, cut into clips of --clip-seconds without loss"""
    clip_seconds: Positive | None = None
    """seconds of a clip; default: what the preset trains on"""
    subjects: Positive = 2
    """subjects in a clip, on average"""
    references: Positive | None = None
    """stored pictures of each subject; default: its own and all from other clips"""
    caption_tokens: Positive = 100
    """tokens in a caption"""
    kept: float = Field(1, gt=0, le=1)
    """share of the clips that is left after curation"""
    gpu: str = "H100"
    """kind of GPU"""
    gpu_memory_gib: Positive = 80
    """memory of one GPU"""
    gpus: Count | None = None
    """how many; default: training.parallel.ranks"""
    price: Amount | None = None
    """of a GPU-hour, in any currency"""
    mfu: float = Field(0.3, gt=0, le=1)
    """share of the peak that training and the vision encoder reach, recomputation not counted; an assumption"""
    detector_fps: Positive = 50
    """frames of a clip that the detector sees per second and GPU; an assumption"""
    vae_megapixels: Positive = 8
    """millions of pixels (frames x height x width) that the VAE encodes per second and GPU; an assumption"""

    @model_validator(mode="after")
    def _is_one_data_set(self):
        if (self.clips is None) == (self.hours is None):
            raise ValueError("give --clips or --hours, one of them")
        return self

    @classmethod
    def of(cls, **values: object) -> Assumptions:
        """Numbers by the names of the fields; they may be text.

        Raises:
            ConfigError: a name is unknown, a number is out of range, or there are no clips, or twice.
        """
        try:
            return cls.model_validate({_flag(name): value for name, value in values.items()})
        except ValidationError as error:
            raise ConfigError(f"{describe_problems(error)}.") from error

    @property
    def flops_per_s(self) -> float:
        """Of one GPU."""
        return self.mfu * PEAK_FLOPS[self.gpu]

    def complete(self, config: RunConfig) -> DataSet:
        """The data set, with what follows from the config where no number was given."""
        clips, references, seconds = self.clips, self.references, self.clip_seconds
        if clips is None:
            seconds = seconds or config.video.num_frames / config.video.fps
            clips = max(1, math.floor((self.hours or 0) * 3600 / seconds))
        references = references or 1 + config.pairs.max_references_per_subject
        pictures = self.subjects * references * max(1, config.shards.augmented_references)
        return DataSet(clips, clips * self.kept, references, pictures)


@dataclass(frozen=True)
class DataSet:
    clips: float
    samples: float  # what curation keeps of them
    references: float  # of a subject
    pictures: float  # stored pictures of a sample


@dataclass(frozen=True)
class Plan:
    """What it would take; GPU-hours and hours are by step, with their ``total``."""

    clips: float
    samples: float
    passes_over_the_data: float
    storage_bytes: float
    gpu_hours: dict[str, float]
    gpus: int
    gpus_at_least: int
    memory_bytes: float
    memory: str
    hours: dict[str, float]
    cost: float | None
    assumptions: list[str]

    def describe(self) -> str:
        """For people: one line per question, then what was assumed."""
        by_gpu, by_clock = (
            ", ".join(f"{name} {value:,.1f}" for name, value in hours.items() if name != "total")
            for hours in (self.gpu_hours, self.hours)
        )
        lines = [
            f"samples     {self.samples:,.0f} of {self.clips:,.0f} clips; training goes over them "
            f"{self.passes_over_the_data:,.2f} times",
            f"storage     about {describe_bytes(self.storage_bytes)} of shards",
            f"GPU-hours   {self.gpu_hours['total']:,.1f} ({by_gpu})",
            f"memory      fits from {self.gpus_at_least} GPUs on; on {self.gpus}, a rank needs {self.memory}",
            f"hours       {self.hours['total']:,.1f} on {self.gpus} GPUs ({by_clock})",
        ]
        if self.cost is not None:
            lines.append(f"cost        {self.cost:,.0f}")
        return "\n".join([*lines, "assumed, not measured:", *(f"  {line}" for line in self.assumptions)])


def make_plan(config: RunConfig, given: Assumptions) -> Plan:
    """Applies the formulas of this module.

    Raises:
        ConfigError: a number contradicts the config, or the model does not fit the GPUs.
        ArtifactError: a model that is not a preset's has no config.json here, and the hub cannot be reached.
        GeometryError: the base model's VAE and Transformer make no grid.
    """
    _check(config, given)
    transformer, vision = _load_sizes(config)
    model, encoder = ModelSizes.of(transformer, config, vision["hidden_size"]), EncoderSizes.model_validate(vision)
    data, gpus = given.complete(config), given.gpus or config.training.parallel.ranks
    fewest, estimate = _find_ranks(config, model, encoder, given.gpu_memory_gib * 2**30, gpus)
    gpu_hours = _count_hours(config, given, data, model, encoder)
    total = gpu_hours["total"]
    text_bytes = round(data.samples * given.caption_tokens * TEXT_BYTES_PER_TOKEN)
    samples = max(1, round(data.samples))
    shard = ShardSize(samples, round(samples * data.pictures), text_bytes)
    return Plan(
        clips=data.clips,
        samples=data.samples,
        passes_over_the_data=config.training.total_steps * config.training.global_batch / data.samples,
        storage_bytes=count_parts({"all": shard}, config, load_grid(config.models), transformer, vision)["all"],
        gpu_hours=gpu_hours,
        gpus=gpus,
        gpus_at_least=fewest,
        memory_bytes=estimate.peak,
        memory=estimate.describe(),
        hours={step: each / gpus for step, each in gpu_hours.items()},
        cost=None if given.price is None else total * given.price,
        assumptions=_list_assumptions(given, data),
    )


def _check(config: RunConfig, given: Assumptions) -> None:
    most, possible = config.curation.max_references, _possible_ranks(config)
    if given.subjects > most:
        raise ConfigError(f"--subjects {given.subjects:g}: no clip keeps more than curation.max_references={most}.")
    if given.gpu not in PEAK_FLOPS:
        raise ConfigError(f"--gpu {given.gpu}: unknown; known are {', '.join(PEAK_FLOPS)}.")
    if given.gpus is not None and given.gpus not in possible:
        raise ConfigError(
            f"--gpus {given.gpus}: training.global_batch={config.training.global_batch} does not divide over them; "
            f"possible are {', '.join(map(str, possible))}."
        )


def _load_sizes(config: RunConfig) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The config of the Transformer and that of the vision encoder."""
    models = config.models
    if (known := _PUBLISHED.get(models.base)) is not None:
        transformer = _WAN | known
    else:
        transformer = load_model_config(models.base, subfolder="transformer", revision=models.base_revision)
    vision = _PUBLISHED.get(models.vision_encoder) or load_model_config(
        models.vision_encoder, revision=models.vision_encoder_revision
    )
    return transformer, vision


def _possible_ranks(config: RunConfig) -> list[int]:
    """Numbers of ranks over which the global batch divides, in micro-batches."""
    training = config.training
    groups = training.global_batch // training.micro_batch
    return [training.parallel.context * ranks for ranks in range(1, groups + 1) if groups % ranks == 0]


def _find_ranks(
    config: RunConfig, model: ModelSizes, encoder: EncoderSizes, available_bytes: float, gpus: int
) -> tuple[int, MemoryEstimate]:
    """The fewest ranks on which the largest sample fits, and the memory of a rank of ``gpus``."""
    training = config.training
    each = _pass_sizes(config, config.curation.max_references, training.micro_batch)

    def check(ranks: int) -> MemoryEstimate:
        estimate = estimate_memory(model, each, training, num_ranks=ranks, device_type="cuda")
        if computes_targets(config, config.shards.targets == "stored"):
            estimate = estimate.with_encoder(encoder, each, config.models)
        check_memory(estimate, available_bytes, training, num_ranks=ranks, device_type="cuda")
        return estimate

    def fits(ranks: int) -> bool:
        try:
            check(ranks)
        except ConfigError:
            return False
        return True

    estimate = check(gpus)
    return next(ranks for ranks in _possible_ranks(config) if fits(ranks)), estimate


def _pass_sizes(config: RunConfig, references: int, samples: int) -> PassSizes:
    video, grid = config.video, load_grid(config.models)
    rows, columns = grid.tokens(video.height_px, video.width_px)
    frames, _, _ = grid.latent_shape(video.num_frames, video.height_px, video.width_px)
    tokens = rows * columns
    return PassSizes(samples, frames * tokens, max(1, references), tokens, config.models.max_text_tokens)


def _count_hours(
    config: RunConfig, given: Assumptions, data: DataSet, model: ModelSizes, encoder: EncoderSizes
) -> dict[str, float]:
    """GPU-hours of each step and in all."""
    video, training, curation = config.video, config.training, config.curation
    each = _pass_sizes(config, math.ceil(given.subjects), 1)  # operations of whole references
    crop_s = encoder.count_flops((curation.embedding_px // encoder.patch_px) ** 2) / given.flops_per_s
    picture_s = encoder.count_flops(each.reference_tokens) / given.flops_per_s
    curation_s = data.clips * (curation.detection_frames / given.detector_fps + given.subjects * crop_s)
    megapixels = video.height_px * video.width_px * (video.num_frames + data.pictures) / 1e6
    is_stored = config.shards.targets == "stored"
    encode_s = data.samples * (megapixels / given.vae_megapixels + data.pictures * picture_s * is_stored)
    sample_s = count_flops(model, each) / given.flops_per_s
    if computes_targets(config, is_stored):
        sample_s += each.references * picture_s
    train_s = training.total_steps * training.global_batch * sample_s
    hours = {"curation": curation_s / 3600, "encode": encode_s / 3600, "train": train_s / 3600}
    return hours | {"total": sum(hours.values())}


def _list_assumptions(given: Assumptions, data: DataSet) -> list[str]:
    return [
        f"{given.subjects:g} subjects in a clip (--subjects), {data.references:g} stored pictures of each (--references), "
        f"{given.caption_tokens:g} tokens in a caption (--caption-tokens), {given.kept:.0%} of the clips kept (--kept)",
        f"{given.mfu:.0%} of the {PEAK_FLOPS[given.gpu] / 1e12:g} TFLOP/s that the data sheet of {given.gpu} gives "
        f"(--mfu, --gpu), {given.gpu_memory_gib:g} GiB of memory (--gpu-memory-gib)",
        f"{given.detector_fps:g} frames per second and GPU through the detector (--detector-fps), {given.vae_megapixels:g} "
        "megapixels through the VAE (--vae-megapixels)",
        "all steps on the same GPUs, twice as fast on twice as many; decoding, text encoding, start-up, evaluation and idle GPUs "
        "left out",
    ]
