"""What a step records besides its loss: flow matching by noise level, the levels drawn, speed, and each term's gradient.

All are sums over samples: one all-reduce of one vector serves any number of ranks and any split of the batch.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from refalign.estimates.compute import ModelSizes, PassSizes, count_flops, peak_flops
from refalign.training.batch import NUM_TIMESTEPS, Batch
from refalign.training.step import StepOutput

_BINS = 10
SUMS = 8 + _BINS + 2
"""Length of `Meter.sum_up`'s vector; the last two are tokens and floating point operations."""


@dataclass(frozen=True)
class Meter:
    """Measures the steps of one run.

    Attributes:
        sizes: of the trained model.
        timesteps: of the schedule, descending from noise.
        device: this rank's.
    """

    sizes: ModelSizes
    timesteps: Float[Tensor, "N"]
    device: torch.device

    def sum_up(self, batch: Batch, flow_matching: Float[Tensor, "B"]) -> Float[Tensor, "24"]:
        """Sums of one forward pass, to be added over passes and ranks and read by `describe`."""
        index = batch.timestep_index.to(flow_matching.device)
        quarter = torch.nn.functional.one_hot(index * 4 // NUM_TIMESTEPS, 4).to(flow_matching.dtype)
        histogram = torch.bincount(bin_of(self.timesteps[index]), minlength=_BINS).to(flow_matching.dtype)
        each = pass_of(batch, self.sizes)
        work = quarter.new_tensor([each.samples * each.tokens, count_flops(self.sizes, each) / 1e9])
        return torch.cat([flow_matching.detach() @ quarter, quarter.sum(0), histogram, work])

    def describe(self, sums: Sequence[float], step_s: float, num_ranks: int) -> dict[str, float]:
        """Fields of the step's line from the summed vector.

        ``flow_matching/q1`` is of the quarter of the schedule nearest to data, ``q4`` of that nearest to noise; a quarter
        without samples is left out. ``timesteps/300`` counts samples with a timestep in [300, 400).
        """
        losses, counts, histogram, (tokens, gigaflops) = sums[:4], sums[4:8], sums[8:-2], sums[-2:]
        record = {f"flow_matching/q{4 - n}": losses[n] / counts[n] for n in reversed(range(4)) if counts[n]}
        record |= {f"timesteps/{100 * n:03d}": count for n, count in enumerate(histogram)}
        record["tokens_per_s"] = tokens / step_s
        record["tflops_per_rank"] = gigaflops / 1e3 / step_s / num_ranks
        peak = peak_flops(torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else None)
        if peak is not None:
            record["mfu"] = record["tflops_per_rank"] * 1e12 / peak
        on_cpu = self.device.type == "cpu"
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if on_cpu else torch.cuda.max_memory_allocated()
        return record | {"peak_memory_bytes": float(memory)}


def bin_of(timesteps: Float[Tensor, "B"]) -> Int[Tensor, "B"]:
    """Tenth of [0, 1000] that each timestep lies in; 1000 is in the last."""
    return (timesteps * _BINS / NUM_TIMESTEPS).long().clamp(max=_BINS - 1)


def pass_of(batch: Batch, sizes: ModelSizes) -> PassSizes:
    """Sizes of a batch's forward pass."""
    samples, _, frames, height, width = batch.latents.shape
    tokens = height * width // sizes.tokens_per_patch
    return PassSizes(samples, frames * tokens, batch.reference_latents.shape[1], tokens, batch.prompt_embeds.shape[1])


def measure_gradient_norms(
    module: nn.Module, batches: Sequence[Batch], forward: Callable[[Batch], StepOutput], *, global_batch: int, num_ranks: int
) -> dict[str, float]:
    """Norms of the gradients of flow matching and of the alignment over the whole global batch; leaves no gradient behind.

    Each takes a forward and a backward pass of its own, so that the step's gradient is not touched.
    """

    def flow_matching(output: StepOutput) -> Tensor:
        return output.flow_matching.sum() / global_batch

    def alignment(output: StepOutput) -> Tensor:
        return output.terms.total - flow_matching(output)

    norms = {}
    for term in (flow_matching, alignment):
        for batch in batches:
            (term(forward(batch)) * num_ranks).backward()
        gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        norms[f"grad_norm/{term.__name__}"] = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        module.zero_grad(set_to_none=True)
    return norms
