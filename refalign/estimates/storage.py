"""How much the shards of a plan will take, from the plan and the models' config files alone.

Tensors, headers and padding are counted; what depends on content (captions in tokens, pictures) by a rate that was measured.
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
    """What is to go into one shard.

    Attributes:
        references: pictures that are stored in all.
        caption_bytes: of all its captions, UTF-8.
    """

    clips: int
    references: int
    caption_bytes: float


def announce_size(step: Step, plan: Mapping[str, ShardSize], config: RunConfig) -> None:
    """Prints what the shards will take, in all and per sample, with a way to less where that is very much.

    Raises:
        ArtifactError: the disk has no room for those that are still to be made.
    """
    sizes = estimate_parts(plan, config)
    samples, total = sum(work.clips for work in plan.values()), sum(sizes.values())
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
    done = step.load_parts(sizes)
    needed = sum(size for name, size in sizes.items() if name not in done)
    elsewhere = ["free some space", "give another --output", "let the parts go to an object store (storage.parts)"]
    check_disk_space(step.folder, needed, "; ".join([*remedies, *elsewhere]))


def _list_remedies(plan: Mapping[str, ShardSize], config: RunConfig, total: float) -> list[str]:
    """Settings under which the same samples take less, with what they would take."""
    smaller: dict[str, dict[str, Any]] = {}
    if config.shards.targets == "stored":
        smaller["shards.targets=computed"] = {"targets": "computed"}
        if config.shards.target_dtype != "int8":
            smaller["shards.target_dtype=int8"] = {"target_dtype": "int8"}
    remedies = []
    for setting, update in smaller.items():
        other = config.model_copy(update={"shards": config.shards.model_copy(update=update)})
        if (then := sum(estimate_parts(plan, other).values())) < total:  # pictures take more than very narrow tokens
            remedies.append(f"{setting} would take about {describe_bytes(then)}")
    return remedies


def estimate_parts(plan: Mapping[str, ShardSize], config: RunConfig) -> dict[str, float]:
    """Bytes of each shard that is still to be made by this plan (`refalign.shards.plan.plan_shards`).

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
    models = config.models
    clip_bytes, reference_bytes = _count_bytes(config, grid, wan["in_channels"], vision["hidden_size"])
    text_bytes = 2 * wan["text_dim"]
    sizes = {}
    for name, work in plan.items():
        clips, references = work.clips, work.references
        if not clips:
            continue  # an earlier version's
        tokens = clips + work.caption_bytes / TEXT_BYTES_PER_TOKEN
        tokens = min(tokens, clips * models.max_text_tokens)
        sizes[name] = clips * clip_bytes + references * reference_bytes + tokens * text_bytes + _TAR_END_BYTES
    return sizes


def _count_bytes(config: RunConfig, grid: Grid, channels: int, vision_width: int) -> tuple[float, float]:
    """Of a sample without its references and text, and of one reference; both with what the contact sheet shows of them."""
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
