"""The most memory that a rank needs, from sizes alone, and whether it fits.

With n trained parameters over S shards (``shards_per_replica``, else all ranks), c bytes of the compute type, B samples
of a forward pass, N tokens of a sample of which V are its video's, L text tokens, D and F the widths of model and feed-forward:

    weights       4 n / S        float32 master copies; under LoRA the frozen weights, c each, too
    gradients     4 n / S
    moments       8 n / S        AdamW; 2 n / S with ``adamw8bit``
    average       4 n / S        with ``training.optimizer.ema_decay``
    gathered      under FSDP: two blocks (one computes, the next is being gathered) and the layers around them in the compute
                  type, and one block's gradients in the compute type and in float32 while they are reduced
    activations   per block what autograd keeps: B c D (a N + b V + g L) + B c 2 N F, see `_KEPT`; or with recomputation the
                  block's input (and the results of matrix products and attention), plus one whole block at a time
    head          inputs of the projectors, what the alignment loss keeps, the last norm, the batch
    backward      gradients of activations within one block
    staged        on a CPU: the copy of weights, moments and average that a checkpoint is written from; with a GPU it lies in
                  the host's memory and is not counted
    encoder       the frozen vision encoder, where training computes the targets

The peak is at the start of a backward pass (all activations; also gradients, where earlier passes of the step left some) or
at its end (all gradients, one block's activations). tests/training/test_memory.py compares it with measurements.
"""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from refalign.config import ModelsConfig, TrainingConfig
from refalign.errors import ConfigError
from refalign.estimates.compute import EncoderSizes, ModelSizes, PassSizes
from refalign.io.storage import describe_bytes

if TYPE_CHECKING:
    import torch

_RESERVE = 0.08
"""Share of the memory that the allocator, kernels and libraries take."""

# Device and bytes of the compute type -> what autograd keeps of one block, in bytes per N D, per V D and per L D, without the
# feed-forward's 2 N F in the compute type. Counted from the forward pass of `ReferenceWanBlock`. On a CPU torch's RMSNorm is a
# chain of operations, each of which keeps its input; on CUDA it is one operation.
_KEPT = {
    ("cpu", 4): (17 * 4, 5 * 4, 4 * 4),
    ("cpu", 2): (9 * 4 + 7 * 2, 3 * 4 + 3 * 2, 2 * 4 + 2 * 2),
    ("cuda", 4): (15 * 4, 4 * 4, 3 * 4),
    ("cuda", 2): (5 * 4 + 9 * 2, 1 * 4 + 4 * 2, 3 * 2),
}
# How much less frozen layers keep: no inputs of the feed-forward, of modulation and gates, and on a CPU of RMSNorm's weights.
_SPARED = {
    ("cpu", 4): (7 * 4, 4, 4),
    ("cpu", 2): (4 * 4 + 4 * 2, 4, 4),
    ("cuda", 4): (5 * 4, 0, 0),
    ("cuda", 2): (2 * 4 + 4 * 2, 0, 0),
}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one rank by kind, as the module's docstring names them."""

    weights: float
    gradients: float
    moments: float
    average: float
    gathered: float
    activations: float
    head: float
    backward: float
    staged: float
    peak: float
    encoder: float = 0.0

    def describe(self) -> str:
        """One line, largest first."""
        kinds = {name: size for name, size in asdict(self).items() if name != "peak" and size}
        parts = (f"{name} {describe_bytes(size)}" for name, size in sorted(kinds.items(), key=lambda item: -item[1]))
        return f"{describe_bytes(self.peak)} at its fullest ({', '.join(parts)})"

    def with_encoder(self, encoder: EncoderSizes, each: PassSizes, models: ModelsConfig) -> MemoryEstimate:
        """The estimate of a rank that computes targets: the encoder's weights, and its activations before the forward pass."""
        size = 4 if models.encoder_dtype == "float32" else 2
        weights = size * encoder.parameters
        pictures = each.samples * each.references
        pixels = pictures * each.reference_tokens * 3 * encoder.patch_px**2 * (1 + 2 * 4)  # bytes, then float32 twice
        block = size * (6 * encoder.width + 2 * encoder.hidden)  # residual, norm, q, k, v, attention; feed-forward
        encoding = pictures * (each.reference_tokens + encoder.extra_tokens) * block + pixels
        kinds = (self.weights, self.gradients, self.moments, self.average, self.staged)
        return replace(self, encoder=weights, peak=max(self.peak, math.fsum(kinds) + encoding) + weights)


def estimate_memory(
    model: ModelSizes, each: PassSizes, training: TrainingConfig, *, num_ranks: int, device_type: str
) -> MemoryEstimate:
    """Memory of one rank of ``num_ranks`` whose largest forward pass is ``each``.

    Args:
        device_type: "cpu" or "cuda", which keep different tensors.
    """
    compute = 4 if training.precision == "float32" else 2  # bytes
    shards = training.parallel.shards_per_replica or num_ranks
    owned = 4 * model.trained_parameters / shards
    is_sharded = num_ranks > 1 or compute == 2
    block, around = model.block_parameters + model.block_adapters, model.outer_parameters + model.projector_parameters
    trained = model.block_adapters if model.lora_rank else block
    gathered = (2 * compute * block + compute * around + (compute + 4) * trained) if is_sharded else 0
    context = training.parallel.context
    dealt = replace(each, video_tokens=each.video_tokens // context, reference_tokens=each.reference_tokens // context)
    kept, one_block = _kept_by_blocks(model, dealt, training.activation_checkpointing, compute, device_type)
    head = _kept_by_head(model, each, training, compute)
    backward = each.samples * dealt.tokens * (2 * model.ffn * compute + 2 * model.width * 4)
    accumulates = training.global_batch * context // num_ranks > 1
    moments = owned * (0.5 if training.optimizer.name == "adamw8bit" else 2)
    average = owned if training.optimizer.ema_decay else 0
    start = kept + one_block + head + (owned if accumulates else 0)
    end = owned + max(one_block, kept / model.layers)
    staged = owned + moments + average if device_type == "cpu" else 0
    weights = owned + compute * model.frozen_parameters / shards
    return MemoryEstimate(
        weights=weights,
        gradients=owned,
        moments=moments,
        average=average,
        gathered=gathered,
        activations=kept + one_block,
        head=head,
        backward=backward,
        staged=staged,
        peak=weights + moments + average + gathered + backward + staged + max(start, end),
    )


def _kept_by_blocks(model: ModelSizes, each: PassSizes, recompute: str, compute: int, device_type: str) -> tuple[float, float]:
    """Bytes kept by all blocks for the backward pass, and by the one that is being computed again."""
    n, v, text, d = each.tokens, each.video_tokens, each.text_tokens, model.width
    per_n, per_v, per_text = _KEPT[device_type, compute]
    ffn, adapters = 2 * n * model.ffn, 0.0
    if model.lora_rank:
        spared = _SPARED[device_type, compute]
        per_n, per_v, per_text = per_n - spared[0], per_v - spared[1], per_text - spared[2]
        per_n += compute * ("ffn.net.0.proj" in model.lora_targets)
        ffn -= n * model.ffn * ("ffn.net.2" not in model.lora_targets)
        adapters = compute * model.lora_rank * len(model.lora_targets) * (n + (v + text) / 2)
    whole = each.samples * (d * (per_n * n + per_v * v + per_text * text) + compute * ffn + adapters)
    if recompute == "none":
        return model.layers * whole, 0.0
    kept, again = compute * each.samples * n * d, whole
    if recompute == "selective":  # q, k, v, attention, its projection, feed-forward; likewise for the text
        results = compute * each.samples * (6 * n * d + n * model.ffn + 3 * v * d + 2 * text * d)
        if model.lora_rank:  # results of the adapters
            results += each.samples * (adapters + compute * d * len(model.lora_targets) * (n + (v + text) / 2))
        kept, again = kept + results, whole - results
    return model.layers * kept, again


def _kept_by_head(model: ModelSizes, each: PassSizes, training: TrainingConfig, compute: int) -> float:
    """The last norm, projectors with their loss, embeddings of time and text, and the batch."""
    d, n = model.width, each.tokens
    last = each.video_tokens * d * (8 + compute)
    aligned = each.references * each.reference_tokens
    hidden = sum(2 * width for width in model.projector_widths[1:-1])
    # The inputs are the outputs of blocks, which in float32 or with recomputation are kept already.
    inputs = n * d * compute if compute == 2 and training.activation_checkpointing == "none" else 0
    projectors = model.projectors * (inputs + aligned * (hidden * compute + model.vision_width * (compute + 4)))
    embedded = each.text_tokens * (4 * model.text_width + 3 * compute * d) + n * d * compute
    batch = 3 * 4 * each.video_tokens * model.patch_in + 4 * aligned * (model.patch_in + model.vision_width)
    return each.samples * (last + projectors + embedded + batch)


def memory_of_worker(device: torch.device, ranks_on_host: int) -> float:
    """Bytes that one rank may use: its GPU's, else its share of the host's memory or of the container's limit."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    total = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        total = min(total, float(text))
    return total / ranks_on_host


def check_memory(
    estimate: MemoryEstimate, available_bytes: float, training: TrainingConfig, *, num_ranks: int, device_type: str
) -> None:
    """Refuses a run that cannot fit.

    Raises:
        ConfigError: with what takes the space and the settings that would help, the cheapest first.
    """
    usable = available_bytes * (1 - _RESERVE)
    if estimate.peak <= usable:
        return
    replica = training.parallel.shards_per_replica
    helps = {
        "training.activation_checkpointing=full": training.activation_checkpointing != "full",
        "training.precision=bfloat16": training.precision == "float32" and device_type == "cuda",
        f"training.micro_batch={training.micro_batch // 2}": training.micro_batch > 1,
        "training.parallel.shards_per_replica=null": replica is not None and replica < num_ranks,
        "training.optimizer.ema_decay=0": training.optimizer.ema_decay > 0,
        "training.lora.rank=32": training.lora.rank is None,
        f"more ranks than {num_ranks} (training.parallel.ranks)": True,
    }
    advice = ", or ".join(setting for setting, does in helps.items() if does)
    raise ConfigError(
        f"a rank needs {estimate.describe()}; its {'GPU' if device_type == 'cuda' else 'share of the host'} has "
        f"{describe_bytes(available_bytes)}, of which {describe_bytes(usable)} can be used. Try {advice}."
    )
