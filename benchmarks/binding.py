"""Does a text-to-video Transformer hear which words of a prompt belong together, hence which creature is to have which colour?

    uv run benchmarks/binding.py [--model refalign/toy/weights/wan]

Prompts of two creatures, each said three ways: as it is, with the two in each other's place, and with two other colours. From
pure noise, before anything shows, the predicted clip should change with the places nearly as much as with the colours, and in
opposite directions in the two halves of the frame.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from recording import describe_machine, write_result
from torch import Tensor

from refalign.geometry import latent_shape
from refalign.models.text import TextEncoder, pad_prompt_embeds
from refalign.models.wan import RefAlignTransformer, load_transformer
from refalign.presets import load_preset
from refalign.toy import WEIGHTS_FOLDER
from refalign.toy.identities import MAIN_COLOURS, SHAPES
from refalign.toy.scenes import FRAME_SIZE_PX, NUM_FRAMES

BATCH = 16


def make_prompts(count: int, seed: int = 0) -> tuple[list[str], list[str], list[str]]:
    """As said, with the two in each other's place, with other colours."""
    rng = np.random.default_rng(seed)
    said, exchanged, recoloured = [], [], []
    for _ in range(count):
        first, second, third, fourth = rng.permutation(list(MAIN_COLOURS))[:4]
        shapes = rng.choice(list(SHAPES), 2)
        clauses = [
            f"a {colour} {shape} creature stands" for colour, shape in zip((first, second, third, fourth), (*shapes, *shapes))
        ]
        for prompts, pair in ((said, clauses[:2]), (exchanged, clauses[1::-1]), (recoloured, clauses[2:])):
            prompts.append(f"On the left {pair[0]} and on the right {pair[1]} in a meadow.")
    return said, exchanged, recoloured


@torch.no_grad()
def predict(transformer: RefAlignTransformer, text: TextEncoder, prompts: list[str], noise: Tensor) -> Tensor:
    """The clean latents [N, Z, T, h, w] that one step from pure noise predicts, without guidance."""
    embeds = pad_prompt_embeds(text.encode(prompts), load_preset("toy").models.max_text_tokens)
    pairs = zip(noise.split(BATCH), embeds.split(BATCH), strict=True)
    return torch.cat([some - transformer(some, torch.full((len(some),), 1000.0), words).velocity for some, words in pairs])


def measure(transformer: RefAlignTransformer, text: TextEncoder, count: int) -> dict[str, float]:
    """How much places change, over how much the colours do; and how alike the changes are in the two halves."""
    shape = transformer.config.in_channels, *latent_shape(NUM_FRAMES, FRAME_SIZE_PX, FRAME_SIZE_PX)
    noise = torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))
    said, exchanged, recoloured = (predict(transformer, text, prompts, noise) for prompts in make_prompts(count))
    by_place, by_colours = said - exchanged, said - recoloured
    halves = torch.stack([half.mean((2, 3, 4)).flatten() for half in by_place.chunk(2, -1)])
    return {
        "places_over_colours": round(float(by_place.square().mean().sqrt() / by_colours.square().mean().sqrt()), 4),
        "correlation_of_halves": round(float(torch.corrcoef(halves)[0, 1]), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=WEIGHTS_FOLDER / "wan")
    parser.add_argument("--prompts", type=int, default=64)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    machine = describe_machine()
    transformer, text = load_transformer(str(arguments.model)).eval(), TextEncoder.from_pretrained(str(arguments.model))
    result = {"prompts": arguments.prompts, "wanted": {"places_over_colours": "near 1", "correlation_of_halves": "near -1"}}
    write_result("binding", result | measure(transformer, text, arguments.prompts), machine)


if __name__ == "__main__":
    main()
