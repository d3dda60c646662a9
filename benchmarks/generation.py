"""Cost of a generation step: alignment-trained weights against the base model's, and three passes batched against serial.

"Alignment-trained" is the same model after a step of training with projectors, exported and loaded as a user would: the
claim is that the loaded pipeline is the same computation, so the ratio is 1.00 up to noise. Everything is interleaved.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time

import numpy as np
import torch
from recording import describe_machine, write_result

from refalign.generation.pipeline import RefAlignPipeline
from refalign.geometry import Grid
from refalign.models.loading import load_model_config
from refalign.models.projector import Projectors
from refalign.models.wan import load_transformer
from refalign.objective.reference_alignment import reference_alignment
from refalign.toy import WEIGHTS_FOLDER
from refalign.toy.drawing import FRAME_HEIGHT_PX, FRAME_WIDTH_PX


def train_one_step(source: str, folder: str) -> None:
    """One optimizer step of the alignment loss on random latents, exported as the trainer exports."""
    torch.manual_seed(0)
    transformer = load_transformer(source)
    projectors = Projectors.make_refalign((0, 1, 2), transformer.width, 64)
    optimizer = torch.optim.AdamW([*transformer.parameters(), *projectors.parameters()], lr=1e-4)
    grid = Grid.of(load_model_config(source, subfolder="vae"), transformer.config)
    channels, side_px = transformer.config.in_channels, 3 * grid.token_px
    frames, *cells = grid.latent_shape(1 + grid.stride_frames, side_px, side_px)
    latents, references = torch.randn(1, channels, frames, *cells), torch.randn(1, 2, channels, *cells)
    prompt_embeds = torch.randn(1, 8, transformer.config.text_dim)
    output = transformer(latents, torch.tensor([700.0]), prompt_embeds, references, alignment_blocks=projectors.block_indices)
    targets, mask = torch.randn(1, 2, 9, 64), torch.ones(1, 2, dtype=torch.bool)
    terms = [reference_alignment(each, targets, mask) for each in projectors(output.reference_tokens)]
    torch.stack([each.pull + each.push for each in terms]).sum().backward()
    optimizer.step()
    transformer.save_pretrained(f"{folder}/transformer")


def measure_step_s(pipeline: RefAlignPipeline, arguments: argparse.Namespace, *, batch_passes: bool) -> float:
    """Median seconds of a denoising step, the first of which (warm-up) is left out."""
    moments: list[float] = []

    def callback(_: object, __: int, ___: object, ____: dict) -> dict:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        moments.append(time.perf_counter())
        return {}

    references = list(np.random.default_rng(0).integers(0, 255, (arguments.references, 64, 64, 3), dtype=np.uint8))
    pipeline(
        "a red fox and a blue ball",
        references,
        height=arguments.height,
        width=arguments.width,
        num_frames=arguments.num_frames,
        num_inference_steps=arguments.steps,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        batch_passes=batch_passes,
        callback_on_step_end=callback,
    )
    return statistics.median(np.diff(moments))


def main() -> None:
    """Runs the rounds and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(WEIGHTS_FOLDER / "wan"), help="a Wan folder; default: the toy model")
    parser.add_argument("--height", type=int, default=FRAME_HEIGHT_PX)
    parser.add_argument("--width", type=int, default=FRAME_WIDTH_PX)
    parser.add_argument("--num-frames", type=int, default=9)
    parser.add_argument("--references", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()

    machine = describe_machine()
    with tempfile.TemporaryDirectory() as folder:
        train_one_step(arguments.model, folder)
        pipelines = {
            "base": RefAlignPipeline.from_pretrained(arguments.model),
            "trained": RefAlignPipeline.from_pretrained(folder, base=arguments.model),
        }
    for pipeline in pipelines.values():
        pipeline.set_progress_bar_config(disable=True)
        pipeline.max_sequence_length = pipelines["base"].max_sequence_length  # a bare Transformer says nothing of it
        pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    cases = {"base": ("base", False), "trained": ("trained", False), "trained_batched_passes": ("trained", True)}
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(arguments.rounds):
        for name in list(cases) if turn % 2 else reversed(cases):  # whoever goes first must not win by it
            which, batched = cases[name]
            seconds[name].append(measure_step_s(pipelines[which], arguments, batch_passes=batched))

    def ratio(first: str, second: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[first], seconds[second], strict=True))

    sizes = {name: sum(each.numel() for each in pipeline.transformer.parameters()) for name, pipeline in pipelines.items()}
    figures = {
        "size": {name: getattr(arguments, name) for name in ("height", "width", "num_frames", "references")},
        "parameters": sizes,
        "step_seconds_median": {name: statistics.median(each) for name, each in seconds.items()},
        "trained_over_base": ratio("trained", "base"),
        "batched_over_serial_passes": ratio("trained_batched_passes", "trained"),
    }
    write_result("generation", figures, machine)


if __name__ == "__main__":
    main()
