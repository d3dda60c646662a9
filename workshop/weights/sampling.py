"""Endless random training pictures of the toy world, each drawn from its number, so that a resumed run draws the same ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from refalign.toy.drawing import ACTIONS, FRAME_HEIGHT_PX, FRAME_WIDTH_PX, Pose
from refalign.toy.identities import Split, sample_identity
from refalign.toy.rendering import render_references, render_scenes
from refalign.toy.scenes import BLINK_SHARE, JUMP, make_scene


@dataclass(frozen=True)
class FrameTruth:
    """One frame with the subjects that show in it."""

    frame: np.ndarray  # uint8 [H, W, 3]
    boxes_xyxy_px: np.ndarray  # int [S, 4], half-open
    masks: np.ndarray  # bool [S, H, W]


def sample_frames(
    seed: int, numbers: range, split: Split = "train", *, min_visible: float = 0.15, later: bool = False
) -> list[FrameTruth]:
    """First frames of random shots of a seed, by number.

    Args:
        later: odd numbers show the shot's second drawing, in which some creatures blink.
        min_visible: subjects of which a smaller fraction shows are left out of the truth.
    """
    truths = []
    shots = render_scenes([make_scene([seed, number], split=split) for number in numbers], num_drawings=2 if later else 1)
    for number, shot in zip(numbers, shots, strict=True):
        frame = number % 2 if later else 0
        shown = shot.visible_fraction[:, frame] >= min_visible
        truths.append(FrameTruth(shot.frames[frame], shot.boxes_xyxy_px[shown, frame], shot.masks[shown, frame]))
    return truths


def sample_pose(rng: np.random.Generator) -> Pose:
    """A random moment of a random action."""
    action, step = ACTIONS[int(rng.integers(len(ACTIONS)))], int(rng.integers(2))
    return Pose(action, step, JUMP * step if action == "jumping" else 0.0, bool(rng.random() < BLINK_SHARE / 3))


def sample_references(seed: int, numbers: range, split: Split = "train") -> np.ndarray:
    """Random reference pictures of a seed, by number: creatures in some pose on white, uint8 [N, H, W, 3]."""
    rngs = [np.random.default_rng([seed, number, 2]) for number in numbers]
    identities = [sample_identity(rng, split) for rng in rngs]
    return render_references(identities, [sample_pose(rng) for rng in rngs], rngs[0])


def sample_clutter(seed: int, number: int) -> FrameTruth:
    """A frame without any creature, by number: coarse textures, soft and hard shapes, lines, darkness.

    A detector that has only seen creatures detects one in whatever stands out in real footage.
    """
    rng = np.random.default_rng([seed, number, 4])
    size = FRAME_WIDTH_PX, FRAME_HEIGHT_PX
    texture = rng.uniform(0, 255 * rng.uniform(0.15, 1.0), (*rng.integers(2, 13, 2), 3)).astype(np.uint8)
    picture = Image.fromarray(texture).resize(size, Image.Resampling.BICUBIC)
    for _ in range(rng.integers(0, 9)):
        brush = ImageDraw.Draw(picture)
        corners = np.sort(rng.uniform(-0.2, 1.2, (2, 2)) * size, axis=0)
        fill = tuple(int(value) for value in rng.uniform(0, 255, 3) * rng.uniform(0.2, 1.0))
        if rng.random() < 0.3:
            brush.line([*map(tuple, corners)], fill=fill, width=int(rng.integers(1, 14)))
        else:
            (brush.ellipse if rng.random() < 0.5 else brush.rectangle)([*map(tuple, corners)], fill=fill)
        if rng.random() < 0.3:
            picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 3)))
    noisy = np.asarray(picture) + rng.normal(0, rng.uniform(0, 10), (FRAME_HEIGHT_PX, FRAME_WIDTH_PX, 3))
    nothing = np.zeros((0, FRAME_HEIGHT_PX, FRAME_WIDTH_PX), bool)
    return FrameTruth(noisy.clip(0, 255).astype(np.uint8), np.zeros((0, 4), int), nothing)
