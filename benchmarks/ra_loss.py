"""Reference alignment loss, forward and backward: ours against the dense published form, interleaved in one process.

The dense form is written from its definition: the full similarity matrix, a boolean gather of the negatives, relu, mean.
Both are given the same tokens, normalise them, and return pull + push; peak extra memory is what the process (on a GPU the
allocator) holds at most beyond its inputs. On a GPU nine blocks are measured, and their share of a Wan2.1 1.3B step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from recording import describe_machine, write_result
from torch import Tensor
from torch.nn.functional import normalize, relu

from refalign.models.wan import RefAlignTransformer
from refalign.objective.reference_alignment import reference_alignment

# glibc keeps freed blocks below a moving threshold, which would hide what a later run needs. Memory is therefore measured
# in a process of its own with a fixed threshold, which in turn would slow down whoever allocates often.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}


def dense(projected: Tensor, targets: Tensor) -> Tensor:
    """The published form for one sample [K, P, E]."""
    num_references, num_tokens, _ = projected.shape
    s, t = normalize(projected.flatten(0, 1), dim=-1), normalize(targets.flatten(0, 1), dim=-1)
    owner = torch.arange(num_references, device=s.device).repeat_interleave(num_tokens)
    similarity = s @ t.T
    push = relu(1.0 - (1.0 - similarity[owner[:, None] != owner[None, :]])).mean()
    pull = relu(1.0 - (s * t).sum(-1)).mean()
    return pull + push


def ours(projected: Tensor, targets: Tensor) -> Tensor:
    """This project's form for the same sample."""
    mask = torch.ones(1, projected.shape[0], dtype=torch.bool, device=projected.device)
    terms = reference_alignment(projected[None], targets[None], mask)
    return (terms.pull + terms.push).sum()


def make_tokens(shape: tuple[int, ...], device: str) -> tuple[Tensor, Tensor]:
    """Tokens with a common direction, as a vision encoder's have: mean cosine .3."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(shape[-1], generator=generator)
    projected, targets = (torch.randn(shape, generator=generator) + 0.65 * common for _ in range(2))
    return projected.to(device), targets.to(device)


class PeakMemory:
    """Bytes held at most since the start, beyond what was held then."""

    def __init__(self, device: str) -> None:
        self.device = device
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")
            self.start = self._status("VmRSS")

    def extra(self) -> int:
        peak = torch.cuda.max_memory_allocated() if self.device == "cuda" else self._status("VmHWM")
        return peak - self.start

    @staticmethod
    def _status(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


class Cost(NamedTuple):
    """What one evaluation took. CPU seconds count this process only, so that a busy machine disturbs them little."""

    wall_s: float
    cpu_s: float
    extra_bytes: int


def measure(loss: Callable[[Tensor, Tensor], Tensor], projected: Tensor, targets: Tensor, blocks: int) -> Cost:
    """Cost of ``blocks`` losses, forward together, then backward."""
    device = projected.device.type
    leaves = [projected.clone().requires_grad_() for _ in range(blocks)]
    if device == "cuda":
        torch.cuda.synchronize()
    memory, start, cpu_start = PeakMemory(device), time.perf_counter(), time.process_time()
    torch.stack([loss(leaf, targets) for leaf in leaves]).mean().backward()
    if device == "cuda":
        torch.cuda.synchronize()
    return Cost(time.perf_counter() - start, time.process_time() - cpu_start, memory.extra())


def relative_gaps(projected: Tensor, targets: Tensor) -> dict[str, float]:
    """Difference of each form from the dense one in float64, in value and in gradient, relative."""
    results = {}
    for name, loss, dtype in (("exact", dense, torch.float64), ("dense", dense, torch.float32), ("ours", ours, torch.float32)):
        leaf = projected.to(dtype, copy=True).requires_grad_()
        value = loss(leaf, targets.to(dtype))
        results[name] = value.detach().double(), torch.autograd.grad(value, leaf)[0].double()
    exact_value, exact_gradient = results.pop("exact")
    gaps = {}
    for name, (value, gradient) in results.items():
        gaps[f"{name}_value"] = float((value - exact_value).abs() / exact_value)
        gaps[f"{name}_gradient"] = float((gradient - exact_gradient).norm() / exact_gradient.norm())
    return gaps


def measure_step_s(device: str) -> float:
    """Seconds of one forward and backward of Wan2.1 1.3B at 480 x 832, 81 frames, 3 references, bf16, checkpointed."""
    with torch.device(device):
        transformer = RefAlignTransformer(num_attention_heads=12, num_layers=30, ffn_dim=8960, text_dim=4096)
        transformer = transformer.to(torch.bfloat16)
        arguments = (
            torch.randn(1, 16, 21, 60, 104),
            torch.tensor([500.0]),
            torch.randn(1, 512, 4096),
            torch.randn(1, 3, 16, 60, 104),
        )
    transformer.enable_gradient_checkpointing()
    times = []
    for _ in range(4):
        torch.cuda.synchronize()
        start = time.perf_counter()
        transformer(*arguments).velocity.square().mean().backward()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main() -> None:
    """Runs the rounds and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--references", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=1560)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--memory-only", action="store_true", help="print peak extra bytes, measured as one line; used by itself")
    parser.add_argument("--threads", type=int, help="CPU threads; on a busy machine 1 measures best")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    machine = describe_machine()
    projected, targets = make_tokens((arguments.references, arguments.tokens, arguments.width), arguments.device)
    blocks = 9 if arguments.device == "cuda" else 1
    for loss in (dense, ours):
        measure(loss, projected, targets, blocks)  # warm up
    if arguments.memory_only:
        print(json.dumps([measure(loss, projected, targets, blocks).extra_bytes for loss in (dense, ours)]))
        return
    rounds = [[measure(loss, projected, targets, blocks) for loss in (dense, ours)] for _ in range(arguments.rounds)]
    seconds = {name: [pair[n].wall_s for pair in rounds] for n, name in enumerate(("dense", "ours"))}
    dense_bytes, ours_bytes = [each.extra_bytes for each in rounds[0]]
    if arguments.device == "cpu":
        command = [sys.executable, *sys.argv, "--memory-only"]
        dense_bytes, ours_bytes = json.loads(subprocess.check_output(command, env={**os.environ, **ALLOCATOR}, text=True))
    faster = [dense.wall_s / ours.wall_s for dense, ours in rounds]
    figures = {
        "shape": {"references": arguments.references, "tokens": arguments.tokens, "width": arguments.width, "blocks": blocks},
        "seconds_median": {name: statistics.median(each) for name, each in seconds.items()},
        "times_faster": {"median_of_rounds": statistics.median(faster), "worst_round": min(faster)},
        "times_less_cpu_time_median": statistics.median(dense.cpu_s / ours.cpu_s for dense, ours in rounds),
        "peak_extra_mib": {"dense": dense_bytes / 2**20, "ours": ours_bytes / 2**20},
        "times_less_memory": dense_bytes / ours_bytes,
        "relative_gap_to_float64": relative_gaps(projected, targets),
    }
    if arguments.device == "cuda":
        step_s = measure_step_s("cuda")
        figures["wan_1_3b_forward_backward_s"] = step_s
        figures["share_of_step"] = {name: each / (step_s + each) for name, each in figures["seconds_median"].items()}
    suffix = f"{arguments.device}_{machine['threads']}_threads" if arguments.device == "cpu" else "cuda"
    write_result(f"ra_loss_{suffix}", figures, machine)


if __name__ == "__main__":
    main()
