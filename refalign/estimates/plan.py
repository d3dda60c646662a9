"""What a data set would take under a config: storage, GPU-hours, GPUs, hours and money, before anything is fetched or rented.

Floating point operations and bytes follow from sizes, by the formulas that runs use themselves (`compute`, `memory` and
`storage` beside this file). Speeds are assumptions that the caller may replace: with D GPUs of peak F
FLOP/s of which a share u is used,

    curation   clips (frames looked at / detector rate + subjects E(crop) / (u F))
    encode     kept clips ((T H W + references H W) / VAE rate + references E(reference) / (u F))
    train      steps x global batch x operations of a sample / (u F)
    hours      GPU-hours / D

where E is a forward pass of the vision encoder. Decoding, text encoding, start-up, evaluation and idle GPUs are left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from refalign.config import RunConfig
from refalign.errors import ConfigError
from refalign.estimates.compute import PEAK_FLOPS, ModelSizes, PassSizes, count_flops
from refalign.estimates.memory import MemoryEstimate, check_memory, estimate_memory
from refalign.estimates.storage import TEXT_BYTES_PER_TOKEN, ShardSize, count_parts
from refalign.io.storage import describe_bytes
from refalign.models.loading import load_grid, load_model_config
from refalign.training.targets import EncoderSizes, add_encoder, computes_targets

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


@dataclass(frozen=True)
class DataSet:
    """What there is to learn from.

    Attributes:
        clips: before curation.
        subjects: of a clip, on average.
        kept: share of the clips that is left after curation.
        references: stored pictures of each subject, its own and those from other clips.
        caption_tokens: of a caption.
    """

    clips: float
    subjects: float = 2.0
    kept: float = 1.0
    references: float = 2.0
    caption_tokens: float = 100.0


@dataclass(frozen=True)
class Machines:
    """What it would run on. None of the speeds was measured with this software: they are where a plan begins.

    Attributes:
        gpu: part of a device's name, see `refalign.estimates.compute.PEAK_FLOPS`.
        memory_gib: of one GPU.
        mfu: share of the peak that training and the vision encoder reach; recomputed operations do not count.
        detector_fps: frames of a clip that the detector sees per second and GPU.
        vae_megapixels: millions of pixels (frames x height x width) that the VAE encodes per second and GPU.
        gpus: training ranks; None is ``training.parallel.ranks``.
        price: of a GPU-hour, in any currency; None leaves the cost out.
    """

    gpu: str = "H100"
    memory_gib: float = 80.0
    mfu: float = 0.3
    detector_fps: float = 50.0
    vae_megapixels: float = 8.0
    gpus: int | None = None
    price: float | None = None


def count_clips(*, clips: float | None, hours: float | None, clip_seconds: float) -> float:
    """Clips of a data set that is given as one or the other.

    Raises:
        ConfigError: both or neither, or no positive number.
    """
    if (clips is None) == (hours is None):
        raise ConfigError("give --clips or --hours, one of them.")
    _check_positive(**{"--clip-seconds": clip_seconds})
    if clips is not None:
        _check_positive(**{"--clips": clips})
        return clips
    assert hours is not None
    _check_positive(**{"--hours": hours})
    return max(1, math.floor(hours * 3600 / clip_seconds))


def make_plan(config: RunConfig, data: DataSet, machines: Machines) -> dict[str, Any]:
    """Everything the module's docstring names, as plain values.

    Raises:
        ConfigError: a number is out of range, or the model does not fit the GPUs that were asked for, or any number of them.
        ArtifactError: a model that is not a preset's has no config.json here, and the hub cannot be reached.
        GeometryError: the base model's VAE and Transformer make no grid.
    """
    _check(config, data, machines)
    transformer, vision = _load_sizes(config)
    model = ModelSizes.of(transformer, config, vision["hidden_size"])
    encoder = EncoderSizes.of(vision)
    gpus = machines.gpus or config.training.parallel.ranks
    fewest, estimate = _find_ranks(config, model, encoder, machines, gpus)
    hours = _count_hours(config, data, machines, model, encoder)
    total = sum(hours.values())
    samples = data.clips * data.kept
    steps = sum(stage.steps for stage in config.training.stages)
    return {
        "clips": data.clips,
        "samples": samples,
        "passes_over_the_data": steps * config.training.global_batch / samples,
        "storage_bytes": _count_storage(config, data, transformer, vision),
        "gpu_hours": hours | {"total": total},
        "gpus": gpus,
        "gpus_at_least": fewest,
        "memory_bytes": estimate.peak,
        "memory": estimate.describe(),
        "hours": {step: each / gpus for step, each in (hours | {"total": total}).items()},
        "cost": None if machines.price is None else total * machines.price,
        "assumptions": _list_assumptions(config, data, machines),
    }


def describe_plan(plan: Mapping[str, Any]) -> str:
    """For people: one line per question, then what was assumed."""
    hours = plan["gpu_hours"]
    steps = ", ".join(f"{name} {value:,.1f}" for name, value in hours.items() if name != "total")
    wall = ", ".join(f"{name} {value:,.1f}" for name, value in plan["hours"].items() if name != "total")
    lines = [
        f"samples     {plan['samples']:,.0f} of {plan['clips']:,.0f} clips; training goes over them "
        f"{plan['passes_over_the_data']:,.2f} times",
        f"storage     about {describe_bytes(plan['storage_bytes'])} of shards",
        f"GPU-hours   {hours['total']:,.1f} ({steps})",
        f"memory      fits from {plan['gpus_at_least']} GPUs on; on {plan['gpus']}, a rank needs {plan['memory']}",
        f"hours       {plan['hours']['total']:,.1f} on {plan['gpus']} GPUs ({wall})",
    ]
    if plan["cost"] is not None:
        lines.append(f"cost        {plan['cost']:,.0f}")
    return "\n".join([*lines, "assumed, not measured:", *(f"  {line}" for line in plan["assumptions"])])


def _check(config: RunConfig, data: DataSet, machines: Machines) -> None:
    names = {"subjects": "--subjects", "references": "--references", "caption_tokens": "--caption-tokens"}
    _check_positive(**{"--clips": data.clips}, **{flag: getattr(data, name) for name, flag in names.items()})
    names = {"memory_gib": "--gpu-memory-gib", "detector_fps": "--detector-fps", "vae_megapixels": "--vae-megapixels"}
    _check_positive(**{flag: getattr(machines, name) for name, flag in names.items()})
    for flag, share in (("--mfu", machines.mfu), ("--kept", data.kept)):
        if not 0 < share <= 1:
            raise ConfigError(f"{flag} {share:g}: expected a share above 0 and up to 1.")
    if data.subjects > config.curation.max_references:
        raise ConfigError(
            f"--subjects {data.subjects:g}: no clip keeps more than curation.max_references={config.curation.max_references}."
        )
    if machines.gpu not in PEAK_FLOPS:
        raise ConfigError(f"--gpu {machines.gpu}: unknown; known are {', '.join(PEAK_FLOPS)}.")
    if machines.price is not None and not 0 <= machines.price < math.inf:
        raise ConfigError(f"--price {machines.price:g}: expected what a GPU-hour costs.")
    if machines.gpus is not None and machines.gpus not in _possible_ranks(config):
        raise ConfigError(
            f"--gpus {machines.gpus}: training.global_batch={config.training.global_batch} does not divide over them; "
            f"possible are {', '.join(map(str, _possible_ranks(config)))}."
        )


def _check_positive(**values: float) -> None:
    for flag, value in values.items():
        if not 0 < value < math.inf:
            raise ConfigError(f"{flag} {value:g}: expected a number above 0.")


def _load_sizes(config: RunConfig) -> tuple[dict[str, Any], dict[str, Any]]:
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
    config: RunConfig, model: ModelSizes, encoder: EncoderSizes, machines: Machines, gpus: int
) -> tuple[int, MemoryEstimate]:
    """The fewest ranks on which the largest sample fits, and the memory of a rank of ``gpus``."""
    training = config.training
    each = _pass_sizes(config, config.curation.max_references, training.micro_batch)

    def estimate(ranks: int) -> MemoryEstimate:
        found = estimate_memory(model, each, training, num_ranks=ranks, device_type="cuda")
        is_computed = computes_targets(config, config.shards.targets == "stored")
        return add_encoder(found, encoder, each, config.models) if is_computed else found

    def fits(ranks: int) -> bool:
        try:
            check_memory(estimate(ranks), available, training, num_ranks=ranks, device_type="cuda")
        except ConfigError:
            return False
        return True

    available = machines.memory_gib * 2**30
    check_memory(estimate(gpus), available, training, num_ranks=gpus, device_type="cuda")
    return next(ranks for ranks in _possible_ranks(config) if fits(ranks)), estimate(gpus)


def _pass_sizes(config: RunConfig, references: int, samples: int) -> PassSizes:
    video, grid = config.video, load_grid(config.models)
    rows, columns = grid.tokens(video.height_px, video.width_px)
    frames, _, _ = grid.latent_shape(video.num_frames, video.height_px, video.width_px)
    tokens = rows * columns
    return PassSizes(samples, frames * tokens, max(1, references), tokens, config.models.max_text_tokens)


def _count_hours(
    config: RunConfig, data: DataSet, machines: Machines, model: ModelSizes, encoder: EncoderSizes
) -> dict[str, float]:
    """GPU-hours of each step."""
    flops_per_s = machines.mfu * PEAK_FLOPS[machines.gpu]
    video, training = config.video, config.training
    subjects = math.ceil(data.subjects)  # operations of whole references
    crop = _count_encoder_flops(encoder, (config.curation.embedding_px // encoder.patch_px) ** 2)
    each = _pass_sizes(config, subjects, 1)
    picture = _count_encoder_flops(encoder, each.reference_tokens)
    curation_s = data.clips * (config.curation.detection_frames / machines.detector_fps + data.subjects * crop / flops_per_s)
    references = _count_references(config, data)
    megapixels = video.height_px * video.width_px * (video.num_frames + references) / 1e6
    is_stored = config.shards.targets == "stored"
    targets = references * picture * is_stored
    encode_s = data.clips * data.kept * (megapixels / machines.vae_megapixels + targets / flops_per_s)
    computed = 0 if not computes_targets(config, is_stored) else subjects * picture
    samples = sum(stage.steps for stage in training.stages) * training.global_batch
    train_s = samples * (count_flops(model, each) + computed) / flops_per_s
    return {"curation": curation_s / 3600, "encode": encode_s / 3600, "train": train_s / 3600}


def _count_encoder_flops(encoder: EncoderSizes, patches: int) -> float:
    """Of a forward pass over one picture: matrices, scores and values."""
    tokens = patches + encoder.extra_tokens
    return 2.0 * tokens * encoder.parameters + 4.0 * encoder.layers * tokens**2 * encoder.width


def _count_references(config: RunConfig, data: DataSet) -> float:
    """Stored pictures of a sample."""
    return data.subjects * data.references * max(1, config.shards.augmented_references)


def _count_storage(config: RunConfig, data: DataSet, transformer: Mapping[str, Any], vision: Mapping[str, Any]) -> float:
    samples = max(1, round(data.clips * data.kept))
    references = round(samples * _count_references(config, data))
    text = round(samples * data.caption_tokens * TEXT_BYTES_PER_TOKEN)
    return sum(
        count_parts({"all": ShardSize(samples, references, text)}, config, load_grid(config.models), transformer, vision).values()
    )


def _list_assumptions(config: RunConfig, data: DataSet, machines: Machines) -> list[str]:
    peak = PEAK_FLOPS[machines.gpu] / 1e12
    said = asdict(data) | asdict(machines)
    lines = [
        "{subjects:g} subjects in a clip (--subjects), {references:g} stored pictures of each (--references), {caption_tokens:g} "
        "tokens in a caption (--caption-tokens), {kept:.0%} of the clips kept (--kept)",
        "{mfu:.0%} of the {peak:g} TFLOP/s that the data sheet of {gpu} gives (--mfu, --gpu), {memory_gib:g} GiB of memory "
        "(--gpu-memory-gib)",
        "{detector_fps:g} frames per second and GPU through the detector (--detector-fps), {vae_megapixels:g} megapixels through "
        "the VAE (--vae-megapixels)",
        "all steps on the same GPUs, twice as fast on twice as many; decoding, text encoding, start-up, evaluation and idle GPUs "
        "left out",
    ]
    return [line.format(**said, peak=peak) for line in lines]
