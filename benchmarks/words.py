"""How much of a clip a prompt's words can explain to a Transformer, by the size of the creatures.

    uv run benchmarks/words.py

One subject in one place: the share of the variance of the VAE's latents of the first frame that goes away when the subject's
colour, its shape or its pose is known. What a word explains is all that a loss can reward for reading it, before anything shows.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from recording import describe_machine, write_result
from torch import Tensor

from refalign.models.vae import VideoVAE
from refalign.toy import WEIGHTS_FOLDER
from refalign.toy.identities import attributes_of
from refalign.toy.rendering import render_scene
from refalign.toy.scenes import GROUNDS_PX, HEIGHTS_PX, ScenePlan, make_scene

PLACE = "meadow"
TODAY = HEIGHTS_PX[1], GROUNDS_PX[1]
"""Ranges of a lone creature's standing height and of the row that its feet stand on."""
SIZES = (TODAY, ((38.0, 47.0), (70.0, 91.0)))
"""Today's, and those of creatures of two fifths of the frame."""


def resize(plan: ScenePlan, heights_px: tuple[float, float], grounds_px: tuple[float, float]) -> ScenePlan:
    """The scene's first frame with its subject's height and ground moved from today's ranges to others."""
    (subject,) = plan.subjects
    height = np.interp(subject.height_px[0], TODAY[0], heights_px)
    ground = np.interp(subject.ground_px, TODAY[1], grounds_px)
    subject = replace(subject, height_px=(float(height),) * 2, ground_px=float(ground))
    return replace(plan, subjects=(subject,), num_frames=1)


def find_explained(latents: Tensor, words: list[str]) -> float:
    """1 - the variance within the clips of one word / the variance of all; both unbiased, so that random words explain 0."""
    within = latents.clone()
    for word in set(words):
        chosen = torch.tensor([each == word for each in words])
        count = int(chosen.sum())
        within[chosen] = (latents[chosen] - latents[chosen].mean(0)) * (count / max(1, count - 1)) ** 0.5
    return 1 - float(within.square().mean() / latents.var(0).mean())


def measure(vae: VideoVAE, size: tuple[tuple[float, float], tuple[float, float]], clips: int) -> dict[str, Any]:
    """Variance of the latents, and the share of it that each kind of word explains."""
    plans = [resize(make_scene([5, number], num_subjects=1, background=PLACE), *size) for number in range(clips)]
    latents = torch.cat([vae.encode(torch.from_numpy(render_scene(plan).frames)[None]).flatten(1) for plan in plans])
    subjects = [plan.subjects[0] for plan in plans]
    looks = [attributes_of(subject.identity) for subject in subjects]
    words = {
        "colour": [look.main_colour for look in looks],
        "shape": [look.shape for look in looks],
        "pose": [str(subject.pose) for subject in subjects],
    }
    explained = {name: round(find_explained(latents, each), 4) for name, each in words.items()}
    return {"heights_px": size[0], "variance": round(float(latents.var(0).mean()), 4), "explained": explained}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=700, help="clips a size")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    machine = describe_machine()
    vae = VideoVAE.from_pretrained(str(WEIGHTS_FOLDER / "wan"))
    sizes = [measure(vae, size, arguments.clips) for size in SIZES]
    write_result("words", {"place": PLACE, "clips": arguments.clips, "sizes": sizes}, machine)


if __name__ == "__main__":
    main()
