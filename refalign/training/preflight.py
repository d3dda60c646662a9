"""Checks before anything heavy starts: shards, shapes, batch size, memory, disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refalign.config import ModelsConfig, RunConfig, TrainingConfig
from refalign.errors import ArtifactError, ConfigError, SchemaError
from refalign.estimates.compute import EncoderSizes, ModelSizes, computes_targets, largest_pass
from refalign.estimates.memory import MemoryEstimate, check_memory, estimate_memory, memory_of_worker
from refalign.io.storage import check_disk_space
from refalign.models.loading import load_model_config
from refalign.shards.mixture import make_order
from refalign.shards.reader import ShardIndex
from refalign.shards.sample import FRAME_TOKENS, TARGETS, has_targets

if TYPE_CHECKING:
    from refalign.training.models import Ranks


@dataclass(frozen=True)
class ShardShapes:
    """Sizes that the model must have too, from the first sample of the shards."""

    where: str  # names the sample
    channels: int
    height: int  # latent
    width: int  # latent
    text_width: int
    tokens_per_reference: int
    vision_width: int
    has_targets: bool
    has_frame_tokens: bool


def check_before_start(config: RunConfig, shards: Path, folder: Path) -> ShardIndex:
    """All checks that need neither model nor cluster; takes a second.

    Returns:
        the index of the training split.

    Raises:
        ArtifactError: shards or model folder are missing or damaged, or the disk is too small.
        SchemaError: shards and model do not fit.
        ConfigError: settings contradict the shards.
    """
    index = ShardIndex.open(shards, "train")
    ShardIndex.open(shards, "validation")
    make_order(index, config.training.mixture, config.seed)
    shapes = load_shapes(index, config.models)
    base = Path(config.models.base).expanduser()
    if base.is_dir():
        path = base / "transformer" / "config.json"
        if not path.is_file():
            raise ArtifactError(f"{path}: not found; models.base must be a folder in the diffusers layout, or a hub id.")
        transformer = load_model_config(config.models.base, subfolder="transformer")
        check_shapes(shapes, config, transformer)
        model = ModelSizes.of(transformer, config, shapes.vision_width)
        check_disk_space(folder, _estimate_disk_bytes(config, base / "transformer", model))
    return index


def load_shapes(index: ShardIndex, models: ModelsConfig) -> ShardShapes:
    """Reads the first sample; where it has no targets, their width is that of the vision encoder of ``models``.

    Raises:
        ArtifactError: the split has no samples, or the vision encoder's config is missing.
        SchemaError: a tensor is missing or does not have the declared axes.
    """
    if not len(index):
        raise ArtifactError(
            f"{index.folder}: no {index.split} samples; see what the shards step quarantined, or give more videos."
        )
    tensors = index.read(0).tensors
    where = f"{index.entries[0].shard}: sample {index.entries[0].key}"
    channels, _, height, width = tensors["latents"].shape
    has = has_targets(tensors)
    return ShardShapes(
        where,
        channels,
        height,
        width,
        text_width=tensors["prompt_embeds"].shape[1],
        tokens_per_reference=tensors["foreground"].shape[1],
        vision_width=tensors[TARGETS].shape[-1] if has else EncoderSizes.load(models).width,
        has_targets=has,
        has_frame_tokens=FRAME_TOKENS in tensors,
    )


def check_shapes(shapes: ShardShapes, config: RunConfig, transformer: Mapping[str, Any]) -> None:
    """Shards against the Transformer's config.

    Raises:
        SchemaError: a width or a token count differs; the shards were made with other models.
        ConfigError: the objective asks for what the model or the shards do not have.
    """
    base, objective = config.models.base, config.objective
    _, patch_height, patch_width = transformer["patch_size"]
    grid = (shapes.height // patch_height) * (shapes.width // patch_width)
    facts = (
        ("latent channels", shapes.channels, transformer["in_channels"]),
        ("text embedding width", shapes.text_width, transformer["text_dim"]),
        ("target tokens per reference", shapes.tokens_per_reference, grid),
    )
    for name, found, expected in facts:
        if found != expected:
            raise SchemaError(
                f"{shapes.where}: {name} {found}, the transformer of {base} has {expected}; "
                "run the shards step again with the same models."
            )
    if shapes.height % patch_height or shapes.width % patch_width:
        raise SchemaError(
            f"{shapes.where}: latents of {shapes.height} x {shapes.width} cannot be cut into patches of "
            f"{patch_height} x {patch_width}."
        )
    context, heads = config.training.parallel.context, transformer["num_attention_heads"]
    if grid % context or heads % context:
        raise ConfigError(
            f"training.parallel.context={context} must divide the {grid} tokens of a frame and the {heads} heads of {base}."
        )
    if objective.alignment == "repa" and not shapes.has_frame_tokens:
        raise ConfigError(
            f"{shapes.where}: no {FRAME_TOKENS}, which repa needs; run the shards step with shards.frame_tokens=true."
        )
    if objective.alignment != "none" and objective.alignment_blocks > (layers := transformer["num_layers"]):
        raise ConfigError(f"objective.alignment_blocks={objective.alignment_blocks}, but {base} has {layers} blocks.")


def check_batch_size(training: TrainingConfig, num_ranks: int) -> None:
    """Refuses a number of ranks over which the global batch does not divide.

    Raises:
        ConfigError: says so.
    """
    context = training.parallel.context
    if num_ranks % context or training.global_batch % (num_ranks // context):
        shared = f", of which {context} share each sample (training.parallel.context)" if context > 1 else ""
        raise ConfigError(
            f"training.global_batch={training.global_batch} does not divide over {num_ranks} ranks{shared}; "
            "start another number of ranks (the global batch of a run cannot change)."
        )


def check_fits(
    config: RunConfig, index: ShardIndex, shapes: ShardShapes, transformer: Mapping[str, Any], ranks: Ranks
) -> MemoryEstimate:
    """Compares the memory that a rank needs with what it has; all ranks call it, before weights are loaded.

    Raises:
        ConfigError: it does not fit.
    """
    estimate = estimate_for(config, index, shapes, transformer, ranks.size, ranks.device.type)
    available = min(ranks.gather(memory_of_worker(ranks.device, ranks.count_on_host())))
    check_memory(estimate, available, config.training, num_ranks=ranks.size, device_type=ranks.device.type)
    return estimate


def estimate_for(
    config: RunConfig,
    index: ShardIndex,
    shapes: ShardShapes,
    transformer: Mapping[str, Any],
    num_ranks: int,
    device_type: str,
) -> MemoryEstimate:
    """Memory of a rank in the largest forward pass that these shards can give."""
    model = ModelSizes.of(transformer, config, shapes.vision_width)
    largest = largest_pass(index, model, micro_batch=config.training.micro_batch, text_tokens=config.models.max_text_tokens)
    estimate = estimate_memory(model, largest, config.training, num_ranks=num_ranks, device_type=device_type)
    if computes_targets(config, shapes.has_targets):
        estimate = estimate.with_encoder(EncoderSizes.load(config.models), largest, config.models)
    return estimate


def _estimate_disk_bytes(config: RunConfig, transformer: Path, model: ModelSizes) -> int:
    """Of checkpoints (trained weights, two moments, perhaps an average) and the export, from the size of the weight files."""
    weights = sum(path.stat().st_size for path in transformer.glob("*.safetensors"))
    copies = (3 + bool(config.training.optimizer.ema_decay)) * (config.training.checkpoint.keep + 1)
    return int(weights * (1 + copies * model.trained_parameters / model.parameters))
