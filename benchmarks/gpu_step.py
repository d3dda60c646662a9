"""Speed and memory of an optimizer step on one GPU: random weights of Wan2.1 1.3B, random clips of 81 x 480 x 832, bfloat16.

Needs torch, diffusers and this package's training core alone: no Ray, no weights, no data. For 0 to 3 references, eager and
compiled, and for each kind of activation checkpointing: seconds a step, tokens/s, the share of the device's peak that model
FLOPs reach, peak memory and what `refalign.estimates.memory` foretold. What does not fit is recorded as such.

python benchmarks/gpu_step.py [--references 0 3] [--steps 8]      on a CUDA device
python benchmarks/gpu_step.py --tiny                              a smoke test on any machine; its figures mean nothing
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from recording import describe_machine, write_result

from refalign.config import ModelsConfig, ObjectiveConfig, RunConfig, StageConfig, TrainingConfig, VideoConfig
from refalign.estimates.compute import ModelSizes, count_flops, peak_flops
from refalign.estimates.memory import estimate_memory
from refalign.models.projector import Projectors
from refalign.models.wan import RefAlignTransformer
from refalign.objective.flow_matching import TrainingSchedule, make_training_schedule
from refalign.training.batch import Batch
from refalign.training.measures import pass_of
from refalign.training.models import Ranks, TrainedModels
from refalign.training.optim import clip_gradients, make_optimizer, set_learning_rate
from refalign.training.step import train_step

WAN_1_3B: dict[str, Any] = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30}
TINY: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 64, "num_layers": 2}


def make_config(tiny: bool, recompute: str, is_compiled: bool) -> RunConfig:
    """The published objective with one sample a step."""
    return RunConfig(
        models=ModelsConfig(base="random", vision_encoder="random", detector="none", max_text_tokens=16 if tiny else 512),
        video=VideoConfig(height_px=480, width_px=832, num_frames=81, fps=25.0),
        objective=ObjectiveConfig(alignment_blocks=1 if tiny else 9),
        training=TrainingConfig(
            stages=(StageConfig(name="only", steps=1, learning_rate=1e-5),),
            global_batch=1,
            micro_batch=1,
            precision="bfloat16",
            activation_checkpointing=recompute,  # ty: ignore[invalid-argument-type]
            compile=is_compiled,
        ),
    )


def make_models(config: RunConfig, tiny: bool, ranks: Ranks, vision_width: int) -> TrainedModels:
    """Random weights, spread as in a run of one rank."""
    torch.manual_seed(0)
    text = {"text_dim": 64, "freq_dim": 32} if tiny else {}
    with ranks.device:
        transformer = RefAlignTransformer(**(TINY if tiny else WAN_1_3B) | text)
        blocks = range(config.objective.alignment_blocks)
        projectors = Projectors.make_refalign(blocks, transformer.width, vision_width)
    return TrainedModels(transformer, projectors).spread(config, ranks)


def make_batch(tiny: bool, references: int, device: torch.device, text: int, text_width: int, vision_width: int) -> Batch:
    """One random sample; without references it has the zero frame that a run would give it."""
    frames, height, width = (3, 8, 8) if tiny else (21, 60, 104)
    count, tokens = max(1, references), height * width // 4
    with device:
        return Batch(
            latents=torch.randn(1, 16, frames, height, width),
            noise=torch.randn(1, 16, frames, height, width),
            timestep_index=torch.tensor([500]),
            prompt_embeds=torch.randn(1, text, text_width),
            reference_latents=torch.randn(1, count, 16, height, width) * bool(references),
            target_tokens=torch.randn(1, count, tokens, vision_width),
            alignment_mask=torch.full((1, count), bool(references)),
            subject_index=torch.arange(count)[None],
            keys=("random",),
            positions=(0,),
        )


def make_step(config: RunConfig, models: TrainedModels, batch: Batch, schedule: TrainingSchedule) -> Callable[[], None]:
    """Forward, backward, clipping and AdamW."""
    optimizer = make_optimizer(models, config.training)
    set_learning_rate(optimizer, 1e-5)

    def step() -> None:
        output = train_step(models, batch, schedule, objective=config.objective, global_batch_size=1)
        output.terms.total.backward()
        clip_gradients(models, config.training.optimizer.clip_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def measure(tiny: bool, references: int, recompute: str, is_compiled: bool, steps: int, ranks: Ranks) -> dict[str, Any]:
    """Figures of one way; ``seconds`` is the median after two steps of warm-up, with the fastest and the slowest beside it."""
    config, vision_width, on_gpu = make_config(tiny, recompute, is_compiled), 32 if tiny else 1024, ranks.device.type == "cuda"
    models = make_models(config, tiny, ranks, vision_width)
    schedule = make_training_schedule()
    schedule = TrainingSchedule(*(each.to(ranks.device) for each in (schedule.sigmas, schedule.timesteps, schedule.weights)))
    text_width = models.transformer.config.text_dim
    batch = make_batch(tiny, references, ranks.device, config.models.max_text_tokens, text_width, vision_width)
    sizes = ModelSizes.of(models.transformer.config, config, vision_width)
    step, seconds = make_step(config, models, batch, schedule), []
    for number in range(steps + 2):
        if on_gpu and number == 2:
            torch.cuda.reset_peak_memory_stats()
        start_s = time.perf_counter()
        step()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start_s)
    timed, each = seconds[2:], pass_of(batch, sizes)
    middle = statistics.median(timed)
    peak = peak_flops(torch.cuda.get_device_name() if on_gpu else None)
    flops = count_flops(sizes, each) / middle
    estimate = estimate_memory(sizes, each, config.training, num_ranks=1, device_type=ranks.device.type)
    return {
        "seconds": round(middle, 4),
        "spread": [round(min(timed), 4), round(max(timed), 4)],
        "first_step_s": round(seconds[0], 2),
        "tokens_per_s": round(each.tokens / middle),
        "tflops": round(flops / 1e12, 2),
        "mfu": round(flops / peak, 4) if peak else None,
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if on_gpu else None,
        "estimated_gib": round(estimate.peak / 2**30, 4 if tiny else 2),
    }


def main() -> None:
    """Measures every combination, each from a clean device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--references", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--recompute", nargs="+", default=["none", "selective", "full"])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--tiny", action="store_true", help="a small model, eager only; nothing is written")
    arguments = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    if not (on_gpu or arguments.tiny):
        sys.exit("no CUDA device; --tiny runs anywhere")
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    machine, ranks, rows = describe_machine(), Ranks.current(), []
    ways = itertools.product(arguments.recompute, (False,) if arguments.tiny else (False, True), arguments.references)
    for recompute, is_compiled, references in ways:
        way = {"references": references, "recompute": recompute, "compiled": is_compiled}
        try:
            figures = measure(arguments.tiny, references, recompute, is_compiled, arguments.steps, ranks)
        except torch.OutOfMemoryError:
            figures = {"seconds": None, "reason": "out of memory"}
        rows.append(way | figures)
        print(rows[-1], flush=True)
        torch.compiler.reset()
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
    dist.destroy_process_group()
    if not arguments.tiny:
        write_result("gpu_step", {"model": "Wan2.1 1.3B, random", "clip": "81 x 480 x 832", "steps": rows}, machine)


if __name__ == "__main__":
    main()
