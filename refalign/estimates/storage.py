"""Bytes of the shards of a plan, from the plan and the models' config files alone.

Tensors, headers and padding are counted exactly; captions and pictures by measured rates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from refalign.config import RunConfig
from refalign.geometry import Grid
from refalign.io.storage import check_disk_space, describe_bytes
from refalign.models.loading import load_grid, load_model_config
from refalign.pipeline.steps import Step
from refalign.shards.writer import SHEET_FRAMES, SHEET_PX

_LARGE_BYTES = 20 * 2**40
TEXT_BYTES_PER_TOKEN = 4  # of English in UMT5's vocabulary
_SHEET_BYTES_PER_PX = 0.35  # JPEG
_PICTURE_BYTES, _PICTURE_BYTES_PER_PX = 1000, 0.75
"""PNG on white: 0.2 to 0.8 a px of photographs at 480 x 832 px; small pictures take more a px, drawings of 96 x 96 px over 1."""
_JSON_BYTES, _JSON_BYTES_PER_REFERENCE = 250, 245
_HEADER_BYTES = 480  # of a safetensors file with these tensors
_TAR_BYTES = 3 * (512 + 256)  # header and mean padding of a sample's three members
_TAR_END_BYTES = 1024 + 10240 // 2  # of a shard: its end, and the mean padding to whole records


@dataclass(frozen=True)
class ShardSize:
    """What one shard holds."""

    clips: int
    references: int  # stored pictures of all its clips
    caption_bytes: float  # of all its captions, UTF-8


def announce_size(step: Step, plan: Mapping[str, ShardSize], config: RunConfig) -> None:
    """Prints the bytes of all shards and of a sample; where that is much, also the settings that would save some.

    Raises:
        ArtifactError: the disk has no room for the shards that are still to be made.
    """
    sizes = estimate_parts(plan, config)
    samples, total = sum(shard.clips for shard in plan.values()), sum(sizes.values())
    if not samples:
        return
    print(
        f"shards: {samples} samples to store, about {describe_bytes(total)} ({describe_bytes(total / samples)} each)", flush=True
    )
    remedies = _list_remedies(plan, config, total)
    if total > _LARGE_BYTES and remedies:
        print(f"shards: very much to store; {', '.join(remedies)}", flush=True)
    if step.store:
        return
    needed = sum(sizes[name] for name in sizes.keys() - step.load_parts(sizes).keys())
    elsewhere = ["free some space", "give another --output", "let the parts go to an object store (storage.parts)"]
    check_disk_space(step.folder, needed, "; ".join([*remedies, *elsewhere]))


def _list_remedies(plan: Mapping[str, ShardSize], config: RunConfig, total: float) -> list[str]:
    """Settings under which the same samples take less, each with the bytes then."""
    if config.shards.targets == "computed":
        return []
    remedies = []
    for name, value in (("targets", "computed"), ("target_dtype", "int8")):
        other = config.model_copy(update={"shards": config.shards.model_copy(update={name: value})})
        if (then := sum(estimate_parts(plan, other).values())) < total:  # pictures may take more than very narrow tokens
            remedies.append(f"shards.{name}={value} would take about {describe_bytes(then)}")
    return remedies


def estimate_parts(plan: Mapping[str, ShardSize], config: RunConfig) -> dict[str, float]:
    """Bytes of each shard of a plan (`refalign.shards.plan.plan_shards`), those without clips of their own left out.

    Raises:
        ArtifactError: a model's config.json is missing, or the hub cannot be reached.
    """
    models = config.models
    wan = load_model_config(models.base, subfolder="transformer", revision=models.base_revision)
    vision = load_model_config(models.vision_encoder, revision=models.vision_encoder_revision)
    return count_parts(plan, config, load_grid(models), wan, vision)


def count_parts(
    plan: Mapping[str, ShardSize], config: RunConfig, grid: Grid, wan: Mapping[str, Any], vision: Mapping[str, Any]
) -> dict[str, float]:
    """The same from the grid and the contents of the Transformer's and the vision encoder's config files."""
    clip_bytes, reference_bytes = _count_bytes(config, grid, wan["in_channels"], vision["hidden_size"])
    sizes = {}
    for name, shard in plan.items():
        if not shard.clips:
            continue  # made by an earlier version
        tokens = shard.clips + shard.caption_bytes / TEXT_BYTES_PER_TOKEN
        text_bytes = 2 * wan["text_dim"] * min(tokens, shard.clips * config.models.max_text_tokens)
        sizes[name] = shard.clips * clip_bytes + shard.references * reference_bytes + text_bytes + _TAR_END_BYTES
    return sizes


def _count_bytes(config: RunConfig, grid: Grid, channels: int, vision_width: int) -> tuple[float, float]:
    """Bytes of a sample without its references and text, and of one reference; both with their part of the contact sheet."""
    video, shards = config.video, config.shards
    frames, height, width = grid.latent_shape(video.num_frames, video.height_px, video.width_px)
    rows, columns = grid.tokens(video.height_px, video.width_px)
    frame = channels * height * width * 2
    token = vision_width + 4 if shards.target_dtype == "int8" else 2 * vision_width
    shown = SHEET_PX**2 * video.width_px / video.height_px * _SHEET_BYTES_PER_PX
    clip = frames * frame + SHEET_FRAMES * shown + _HEADER_BYTES + _JSON_BYTES + _TAR_BYTES
    if shards.frame_tokens:
        clip += frames * rows * columns * token
    shares = 2 * 2 * rows * columns  # foreground and content
    picture = _PICTURE_BYTES + _PICTURE_BYTES_PER_PX * video.height_px * video.width_px
    target = rows * columns * token if shards.targets == "stored" else picture
    return clip, frame + shares + target + shown + _JSON_BYTES_PER_REFERENCE
