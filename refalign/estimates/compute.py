"""Sizes of the models and of a forward pass, and from them parameters and floating point operations.

They follow from config files and the shard index alone: no weight is loaded, and neither torch nor diffusers is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from refalign.config import ModelsConfig, RunConfig, describe_problems
from refalign.errors import ArtifactError
from refalign.models.loading import load_model_config

if TYPE_CHECKING:
    from refalign.shards.reader import ShardIndex

PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "RTX 4090": 165e12,
}
"""Part of a CUDA device's name -> its dense bf16 FLOP/s by the data sheet. The first part that matches counts."""


@dataclass(frozen=True)
class ModelSizes:
    """Widths and depths of the Transformer and its projectors."""

    width: int  # D
    ffn: int
    layers: int
    heads: int
    text_width: int
    frequencies: int
    patch_in: int  # numbers in a patch of the latents
    patch_out: int
    tokens_per_patch: int  # latent pixels of a frame that one token covers
    projectors: int  # J, 0 without alignment
    projector_widths: tuple[int, ...]  # D, hidden widths, E
    vision_width: int
    lora_rank: int | None = None
    lora_targets: tuple[str, ...] = ()

    @classmethod
    def of(cls, transformer: Mapping[str, Any], config: RunConfig, vision_width: int) -> ModelSizes:
        """Reads the Transformer's config.json."""
        objective = config.objective
        width = transformer["num_attention_heads"] * transformer["attention_head_dim"]
        frames, height, rows = transformer["patch_size"]
        patch = frames * height * rows
        hidden = {"none": (), "repa": (width, width), "reference_alignment": (width // 2,)}[objective.alignment]
        return cls(
            width=width,
            ffn=transformer["ffn_dim"],
            layers=transformer["num_layers"],
            heads=transformer["num_attention_heads"],
            text_width=transformer["text_dim"],
            frequencies=transformer["freq_dim"],
            patch_in=transformer["in_channels"] * patch,
            patch_out=(transformer.get("out_channels") or transformer["in_channels"]) * patch,
            tokens_per_patch=height * rows,
            projectors={"none": 0, "repa": 1}.get(objective.alignment, objective.alignment_blocks),
            projector_widths=(width, *hidden, vision_width),
            vision_width=vision_width,
            lora_rank=config.training.lora.rank,
            lora_targets=config.training.lora.targets,
        )

    @property
    def block_parameters(self) -> int:
        """Of one block: two attentions with their norms, feed-forward, the affine norm, the modulation table."""
        d = self.width
        attention = 4 * (d * d + d) + 2 * d
        return 2 * attention + 2 * d * self.ffn + self.ffn + 9 * d

    @property
    def outer_parameters(self) -> int:
        """Around the blocks: patch, time and text embedding, output layer and its modulation table."""
        d = self.width
        time = self.frequencies * d + d + d * d + d + 6 * (d * d + d)
        text = self.text_width * d + d + d * d + d
        return self.patch_in * d + d + time + text + 2 * d + d * self.patch_out + self.patch_out

    @property
    def projector_parameters(self) -> int:
        """Of all projectors; those of REPA have biases."""
        widths = self.projector_widths
        linear = sum(a * b for a, b in pairwise(widths))
        has_bias = len(widths) == 4
        return self.projectors * (linear + has_bias * sum(widths[1:]))

    @property
    def block_adapters(self) -> int:
        """Of one block's adapters, A and B of each layer; the name of an attention layer stands for one in both attentions."""
        d = self.width
        rows_and_columns = (d + self.ffn if target.startswith("ffn") else 2 * 2 * d for target in self.lora_targets)
        return (self.lora_rank or 0) * sum(rows_and_columns)

    @property
    def frozen_parameters(self) -> int:
        """Of the Transformer without its adapters; 0 where it has none, since all its weights are trained then."""
        return 0 if self.lora_rank is None else self.layers * self.block_parameters + self.outer_parameters

    @property
    def trained_parameters(self) -> int:
        """Those that have gradients and moments."""
        return self.parameters - self.frozen_parameters

    @property
    def parameters(self) -> int:
        """Transformer, adapters and projectors."""
        return self.layers * (self.block_parameters + self.block_adapters) + self.outer_parameters + self.projector_parameters


class EncoderSizes(BaseModel):
    """Widths, depth and patch of the vision encoder, as its config.json names them."""

    model_config = ConfigDict(frozen=True)

    width: int = Field(alias="hidden_size")  # E
    hidden: int = Field(alias="intermediate_size")  # of the feed-forward
    layers: int = Field(alias="num_hidden_layers")
    registers: int = Field(alias="num_register_tokens")
    is_gated: bool = Field(alias="use_gated_mlp")
    patch_px: int = Field(alias="patch_size")

    @classmethod
    def load(cls, models: ModelsConfig) -> EncoderSizes:
        """Reads the encoder's config.json.

        Raises:
            ArtifactError: it is missing or of another model, or the hub cannot be reached.
        """
        source, revision = models.vision_encoder, models.vision_encoder_revision
        try:
            return cls.model_validate(load_model_config(source, revision=revision))
        except ValidationError as error:
            raise ArtifactError(f"{source}: not a DINOv3 ViT ({describe_problems(error)}); see models.vision_encoder.") from error

    @property
    def extra_tokens(self) -> int:
        """CLS and registers."""
        return 1 + self.registers

    @property
    def parameters(self) -> int:
        """Of matrices; norms and biases are less than a hundredth of them."""
        feed_forward = (3 if self.is_gated else 2) * self.width * self.hidden
        return self.layers * (4 * self.width**2 + feed_forward) + 3 * self.patch_px**2 * self.width

    def count_flops(self, patches: int) -> float:
        """Floating point operations of a forward pass over one picture: matrices, scores and values."""
        tokens = patches + self.extra_tokens
        return 2.0 * tokens * self.parameters + 4.0 * self.layers * tokens**2 * self.width


def computes_targets(config: RunConfig, has_targets: bool) -> bool:
    """Whether training runs the vision encoder: the objective needs targets, and the shards have none."""
    return config.objective.alignment == "reference_alignment" and not has_targets


@dataclass(frozen=True)
class PassSizes:
    """One forward pass: samples, and tokens of one sample."""

    samples: int  # B
    video_tokens: int
    references: int  # K, at least 1: a sample without has one zero frame
    reference_tokens: int  # P, of one reference
    text_tokens: int

    @property
    def tokens(self) -> int:
        """Of one sample, video and references."""
        return self.video_tokens + self.references * self.reference_tokens


def largest_pass(index: ShardIndex, model: ModelSizes, *, micro_batch: int, text_tokens: int) -> PassSizes:
    """The largest pass that the shards can give: of the sample with most tokens."""
    passes = []
    for (_, frames, height, width), subjects in {(entry.shape, entry.subjects) for entry in index.entries}:
        tokens = height * width // model.tokens_per_patch
        passes.append(PassSizes(micro_batch, frames * tokens, max(1, subjects), tokens, text_tokens))
    return max(passes, key=lambda each: each.tokens)


def count_flops(model: ModelSizes, each: PassSizes) -> float:
    """Floating point operations of forward and backward of one pass, 2 per multiply and add; recomputation is not counted.

    Matrix products, of which the backward pass does two for each one of the forward pass:

        blocks     2 N D (4 D + 2 F) + 2 V 2 D^2 + 2 L 2 D^2      projections of both attentions, feed-forward
                   + 4 N^2 D + 4 V L D                            scores and values of both attentions
        outside    2 N patch_in D + 2 V D patch_out + text and time embedding + projectors

    with N all tokens of a sample, V those of its video, L those of its text. Patch and text embedding count twice instead of
    three times: their inputs need no gradient. Under LoRA frozen layers count twice, since their weights have no gradient, and
    layers before the first adapter once. The alignment loss is K (K - 1) P^2 E multiply-adds per block, once for its value and
    once for its gradient.
    """
    d, n, v, text = model.width, each.tokens, each.video_tokens, each.text_tokens
    linear = 2 * n * d * (4 * d + 2 * model.ffn) + 2 * v * 2 * d * d + 2 * text * 2 * d * d
    attention = 4 * n * n * d + 4 * v * text * d
    time = 2 * d * d + 2 * d * 6 * d
    outer = 2 * v * d * model.patch_out + 2 * text * d * d + time
    first = 2 * n * model.patch_in * d + 2 * text * model.text_width * d + 2 * model.frequencies * d
    widths = model.projector_widths
    aligned = each.video_tokens if len(widths) == 4 else each.references * each.reference_tokens
    projectors = model.projectors * sum(2 * aligned * a * b for a, b in pairwise(widths))
    pairs = each.references * (each.references - 1) if len(widths) == 3 else 0
    loss = model.projectors * 2 * 2 * pairs * each.reference_tokens**2 * model.vision_width
    adapters = 2 * n * model.block_adapters
    of_weights = 0 if model.lora_rank else 1
    blocks = model.layers * ((2 + of_weights) * linear + 3 * (attention + adapters))
    around = (2 + of_weights) * outer + (1 + of_weights) * first
    return each.samples * (blocks + around + 3 * projectors + loss)


def peak_flops(device_name: str | None) -> float | None:
    """Dense bf16 FLOP/s of a CUDA device by its name; None for a CPU and for devices that are not in the table."""
    return next((value for part, value in PEAK_FLOPS.items() if part in (device_name or "")), None)
