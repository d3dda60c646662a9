"""What each embellishment of the toy's creatures costs in fidelity, at equal training: shading, smile, blinking.

uv run benchmarks/toy_embellishments.py [--steps 400] [--cases 24] [--work runs/embellishments]

Each arm draws the world with one embellishment left out (or all, or none), and trains stage 1's recipe for single frames from
random weights, with references and the RA loss, on samples of the same scenes and draws. Text is embedded by the shipped
encoder. The judge draws as the arm does. An interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recording import describe_machine, write_result
from torch.nn.attention import SDPBackend, sdpa_kernel

from refalign.generation.pipeline import RefAlignPipeline
from refalign.models.wan import load_transformer
from refalign.toy import WEIGHTS_FOLDER, drawing, scenes
from workshop.judging.benchmark import OPTIONS, iter_generated, score_clip, summarise
from workshop.judging.cases import make_cases
from workshop.weights import sampling, train_transformer
from workshop.weights.initial_weights import make_transformer, save_half
from workshop.weights.train_transformer import Phase, Recipe, export, prepare
from workshop.weights.training import train

LEFT_OUT: dict[str, dict[tuple[Any, str], float]] = {
    "shading": {(drawing, "_SHADE"): 0.0},
    "smile": {(drawing, "_MOUTH_V"): -1000.0},
    "blinking": {(scenes, "BLINK_SHARE"): 0.0, (sampling, "BLINK_SHARE"): 0.0},
}
"""Embellishment -> constants of the drawing code and the values that leave it out."""
ARMS = {"all": (), **{f"without {name}": (name,) for name in LEFT_OUT}, "none": tuple(LEFT_OUT)}
COUNTS = (2500, 2750, 1750)
SHOWN = ("fidelity", "fidelity of 1", "fidelity of 2", "fidelity eyes", "fidelity headwear", "spoken")


@contextmanager
def left_out(names: tuple[str, ...]) -> Iterator[None]:
    """The world without some embellishments."""
    changes = {place: value for name in names for place, value in LEFT_OUT[name].items()}
    before = {(module, constant): getattr(module, constant) for module, constant in changes}
    try:
        for (module, constant), value in changes.items():
            setattr(module, constant, value)
        yield
    finally:
        for (module, constant), value in before.items():
            setattr(module, constant, value)


def measure(arm: str, names: tuple[str, ...], steps: int, cases: int, work: Path) -> dict[str, float]:
    """Trains one arm and reads what it makes of held-out cases with one and two creatures."""
    folder = work / arm.replace(" ", "_")
    start = _make_start(folder / "start")
    recipe = Recipe((Phase(1, steps, 64, COUNTS),), with_references=True, aligned=True)
    train_transformer.RECIPES[arm] = recipe
    with left_out(names):
        state, course = prepare(arm, folder, start)
        with sdpa_kernel(SDPBackend.MATH):
            for block in course.models.transformer.blocks:
                block.forward = torch.compile(block.forward, dynamic=False)
            train(
                state,
                course.make_loss,
                course.factor_at,
                lambda averaged: export(arm, averaged, folder / "out"),
                steps=steps,
                checkpoint=folder / "state.pt",
                clip_norm=train_transformer.CLIP_NORM,
            )
        transformer = load_transformer(str(folder / "out" / arm / "export")).eval()
        pipeline = RefAlignPipeline.from_pretrained(str(start / "wan"), transformer=transformer)
        pipeline.set_progress_bar_config(disable=True)
        chosen = [case for size in (1, 2) for case in make_cases(cases, num_subjects=size)]
        frames = iter_generated(pipeline, chosen, OPTIONS | {"num_frames": 1})
        return summarise([score_clip(case, np.asarray(clip)) for case, clip in zip(chosen, frames, strict=True)])


def _make_start(folder: Path) -> Path:
    """The shipped weights with an untrained Transformer."""
    if not folder.is_dir():
        folder.mkdir(parents=True)
        for part in ("dinov3", "wan"):
            (folder / part).mkdir()
            for path in (WEIGHTS_FOLDER / part).iterdir():
                if path.name != "transformer":
                    (folder / part / path.name).symlink_to(path)
        save_half(make_transformer(), folder / "wan" / "transformer")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="training steps of each arm (default: 400)")
    parser.add_argument("--cases", type=int, default=24, help="held-out frames with one, and with two creatures (default: 24)")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="arms to run (default: all)")
    parser.add_argument("--work", type=Path, default=Path("runs/embellishments"), help="samples, checkpoints and weights")
    arguments = parser.parse_args()
    machine = describe_machine()
    torch.set_num_threads(1)
    figures = {}
    for arm in arguments.arms:
        file = arguments.work / f"{arm.replace(' ', '_')}.json"
        if not file.is_file():
            found = measure(arm, ARMS[arm], arguments.steps, arguments.cases, arguments.work)
            file.write_text(json.dumps({name: found[name] for name in SHOWN}))
        figures[arm] = json.loads(file.read_text())
        print(arm, figures[arm], flush=True)
    write_result("toy_embellishments", {"steps": arguments.steps, "cases": 2 * arguments.cases, "arms": figures}, machine)


if __name__ == "__main__":
    main()
