"""Trains the reader that grades generated sprite videos, on identities of its own (split ``judges``).

    python -m refalign.toy.train_judges --steps 3000 --checkpoint runs/toy_judge.pt [--init runs/toy_judge.pt]
    python -m refalign.toy.train_judges --steps 0            # only measures what is shipped

A third of the subjects is coarsened; towards the end of the run a third passes through the VAE, as every generated video does.
A tenth shows nothing readable or two creatures blended, for which the right answer is to abstain.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from refalign.toy import WEIGHTS_FOLDER
from refalign.toy.identities import Split
from refalign.toy.initial_weights import replace_folder
from refalign.toy.judges import (
    CROP_PX,
    VOCABULARIES,
    Judge,
    Reader,
    count_right,
    cut_crops,
    encode_truth,
    measure_travel,
    save_description,
    to_input,
)
from refalign.toy.optim import TrainingState, autocast_where_fast, make_optimizers
from refalign.toy.sampling import sample_clip, sample_clutter
from refalign.toy.train_vae import load_vae, pass_through, to_pixels

SEED = 50
HELDOUT_SEED = 51
FRAMES = 4
"""Frames of a subject that are read together in training."""
CLIPS_PER_STEP = 6
VAE_SHARE = 0.25
"""Share of the steps, the last ones, in which every third clip passes through the VAE (which takes most of their time)."""
QUESTION_WEIGHTS = {"headwear": 2.0, "pose": 2.0, "eyes": 2.0}
"""Of the hard questions in the loss; the others have 1."""
MIN_VISIBLE = 0.6
"""Of a subject, in the mean over the frames shown, for its answers to count; below ``HIDDEN`` the right one is to abstain."""
HIDDEN = 0.2


@dataclass(frozen=True)
class Subject:
    """One creature in one clip: uint8 crops [F, 64, 64, 3], travel [2], the right answers, how much of it shows on average."""

    crops: np.ndarray
    travel: np.ndarray
    truth: dict[str, int]
    visible: float


def blur(vae: Any, frames: np.ndarray) -> np.ndarray:
    """uint8 [F, H, W, 3], encoded and decoded."""
    output = pass_through(vae, to_pixels(frames))[0]
    return ((output + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 3, 0).numpy()


def iter_subjects(
    seed: int, number: int, split: Split, *, vae: Any = None, jitter: float = 0.0, frames: int | None = None
) -> Iterator[Subject]:
    """The subjects of clip ``number``.

    Args:
        vae: its round trip is applied to the clip; None leaves it as drawn.
        jitter: how far boxes are moved and scaled, as a fraction of their side; one draw per subject.
        frames: how many are chosen, in order; None takes all.
    """
    rng = np.random.default_rng([seed, number, 5])
    shot = sample_clip(seed, number, split)
    pictures = shot.frames if vae is None else blur(vae, shot.frames)
    for index, plan in enumerate(shot.plan.subjects):
        chosen = np.sort(rng.permutation(len(pictures))[:frames])
        boxes = shot.boxes_xyxy_px[index, chosen].astype(np.float32)
        travel = measure_travel(boxes)
        side = (boxes[:, 2:] - boxes[:, :2]).max(1, keepdims=True)
        moved = rng.uniform(-jitter, jitter, 2)
        boxes = boxes + side * np.concatenate([moved, moved])
        grown = side * rng.uniform(-jitter, jitter) * [[-0.5, -0.5, 0.5, 0.5]]
        crops = cut_crops(pictures[chosen], boxes + grown)
        visible = float(shot.visible_fraction[index, chosen].mean())
        yield Subject(crops, travel, encode_truth(plan.identity, plan.pose), visible)


def make_batch(step: int, vae: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Crops [N, F, 3, 64, 64] in [-1, 1], travel [N, 2], and answers [N] per question; -100 is not scored."""
    rng = np.random.default_rng([SEED, step])
    subjects: list[Subject] = []
    for number in range(CLIPS_PER_STEP * step, CLIPS_PER_STEP * (step + 1)):
        through = vae if number % 3 == 0 else None
        subjects += iter_subjects(SEED, number, "judges", vae=through, jitter=0.1, frames=FRAMES)
    crops = np.stack([subject.crops for subject in subjects])
    answers = {name: np.array([subject.truth[name] for subject in subjects]) for name in VOCABULARIES}
    for number, subject in enumerate(subjects):
        if subject.visible < MIN_VISIBLE:
            for name, words in VOCABULARIES.items():
                answers[name][number] = len(words) if subject.visible < HIDDEN else -100
    pixels = _augment(to_input(torch.from_numpy(crops)), rng)
    _blend(pixels, answers, rng)
    _empty(pixels, answers, step, rng)
    travel = np.stack([subject.travel for subject in subjects])
    travel *= rng.normal(1, 0.1, travel.shape).astype(np.float32)  # a detector's boxes tremble
    return pixels, torch.from_numpy(travel), {name: torch.from_numpy(values) for name, values in answers.items()}


def _augment(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """Mirrors half of the subjects, coarsens a third, shifts colours a little and adds noise; one draw per subject."""
    for number in range(len(pixels)):
        if rng.random() < 0.5:
            pixels[number] = pixels[number].flip(-1)
        if rng.random() < 0.35:
            side = int(rng.integers(22, 56))
            small = functional.interpolate(pixels[number], size=side, mode="area")
            pixels[number] = functional.interpolate(small, size=CROP_PX, mode="bilinear", align_corners=False)
        gain, offset = rng.uniform(0.92, 1.08, 3), rng.uniform(-0.06, 0.06)
        pixels[number] *= torch.from_numpy(gain).float()[:, None, None]
        pixels[number] += offset
    noise = torch.from_numpy(rng.standard_normal(pixels.shape, dtype=np.float32))
    scale = torch.from_numpy(rng.uniform(0, 0.06, len(pixels))).float()
    return pixels + noise * scale[:, None, None, None, None]


def _blend(pixels: Tensor, answers: dict[str, np.ndarray], rng: np.random.Generator) -> None:
    """Lays the second subject half over the first: what both have in common stays readable, the rest is not."""
    if rng.random() < 0.5 and len(pixels) > 1:
        share = float(rng.uniform(0.4, 0.6))
        pixels[0] = share * pixels[0] + (1 - share) * pixels[1]
        for name, words in VOCABULARIES.items():
            if answers[name][0] != answers[name][1]:
                answers[name][0] = len(words)


def _empty(pixels: Tensor, answers: dict[str, np.ndarray], step: int, rng: np.random.Generator) -> None:
    """Replaces the last subject by a piece of a frame without creatures, or by itself beyond recognition."""
    if rng.random() < 0.5:
        clutter = torch.from_numpy(sample_clutter(SEED, step, CROP_PX).frame.copy())
        pixels[-1] = to_input(clutter[None, None])[0]
    else:
        small = functional.interpolate(pixels[-1], size=int(rng.integers(2, 7)), mode="area")
        pixels[-1] = functional.interpolate(small, size=CROP_PX, mode="bilinear", align_corners=False)
    for name, words in VOCABULARIES.items():
        answers[name][-1] = len(words)


def reading_loss(logits: dict[str, Tensor], answers: dict[str, Tensor]) -> Tensor:
    """Weighted mean of the questions' cross-entropy; every frame answers for the attributes, the clip for the pose."""
    losses = []
    for name, values in logits.items():
        right = answers[name]
        if name != "pose":
            right = right[:, None].expand(values.shape[:2]).flatten()
        losses.append(functional.cross_entropy(values.flatten(0, -2).float(), right))
    weights = torch.tensor([QUESTION_WEIGHTS.get(name, 1.0) for name in logits])
    return (torch.stack(losses) * weights).sum() / weights.sum()


def evaluate(judge: Judge, num_clips: int, *, vae: Any = None) -> dict[str, float]:
    """Question -> share read right over the subjects of held-out clips that show at least ``MIN_VISIBLE`` of themselves.

    Args:
        vae: clips pass through it first.
    """
    subjects = [
        subject
        for number in range(num_clips)
        for subject in iter_subjects(HELDOUT_SEED, number, "heldout", vae=vae)
        if subject.visible >= MIN_VISIBLE
    ]
    travel = np.stack([subject.travel for subject in subjects])
    readings = judge.read(np.stack([subject.crops for subject in subjects]), travel)
    figures = count_right(readings, [subject.truth for subject in subjects])
    return {"subjects": len(subjects), **figures}


def train(steps: int, checkpoint: Path, init: Path | None, output: Path, vae_folder: Path, *, save_every: int) -> None:
    """Trains to step ``steps`` with a learning rate that falls linearly to 1%; exports the moving average of the weights."""
    torch.manual_seed(SEED)
    reader, vae = Reader(), load_vae(vae_folder)
    state = TrainingState(reader, make_optimizers(reader))
    if init:
        state.load(init)
    started, losses = time.monotonic(), []
    while (step := state.step) < steps:
        reader.train()
        crops, travel, answers = make_batch(step, vae if step >= (1 - VAE_SHARE) * steps else None)
        with autocast_where_fast():
            logits = reader(crops, travel)
        loss = reading_loss(logits, answers)
        loss.backward()
        state.advance(min((step + 1) / 50, 0.01 + 0.99 * (1 - step / steps)))
        losses.append(float(loss.detach()))
        if state.step % 50 == 0:
            print(f"step {state.step}/{steps} loss {np.mean(losses):.4f} {time.monotonic() - started:.0f} s", flush=True)
            losses.clear()
        if state.step % save_every == 0 or state.step == steps:
            state.save(checkpoint)
            export(state.averaged, output)
            print(f"step {state.step} held-out {evaluate(Judge.load(output), 30)}", flush=True)


def export(reader: Any, output: Path) -> None:
    """Writes the weights in half precision."""
    from safetensors.torch import save_file

    def write(folder: Path) -> None:
        halves = {name: t.half() if t.is_floating_point() else t for name, t in reader.state_dict().items()}
        save_file({name: tensor.contiguous() for name, tensor in halves.items()}, folder / "model.safetensors")
        save_description(folder)

    replace_folder(output, write)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000, help="total number of steps; 0 only measures --output")
    parser.add_argument("--save-every", type=int, default=500, help="steps between checkpoints and exports")
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/toy_judge.pt"), help="where the training state is kept")
    parser.add_argument("--init", type=Path, help="training state to continue from, or folder of weights to start from")
    parser.add_argument("--vae", type=Path, default=WEIGHTS_FOLDER / "wan" / "vae", help="VAE whose round trip is learned")
    parser.add_argument("--output", type=Path, default=WEIGHTS_FOLDER / "judges" / "reader")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.steps:
        places = arguments.checkpoint, arguments.init, arguments.output, arguments.vae
        train(arguments.steps, *places, save_every=arguments.save_every)
    judge = Judge.load(arguments.output)
    print("as drawn", evaluate(judge, 100))
    print("through the VAE", evaluate(judge, 100, vae=load_vae(arguments.vae)))


if __name__ == "__main__":
    main()
