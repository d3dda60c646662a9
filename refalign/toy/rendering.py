"""Turns scenes into frames and ground truth, many at once. The same drawing gives both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from refalign.toy.drawing import FRAME_HEIGHT_PX, FRAME_WIDTH_PX, HEIGHT, Figures, Pose, draw
from refalign.toy.scenes import HOLD, NUM_DRAWINGS, NUM_FRAMES, ScenePlan, paint_place

REFERENCE_HEIGHT_PX = 46.0
"""Height of the standing creature in a reference: its box fills the frame."""


@dataclass(frozen=True)
class RenderedScene:
    """Frames and truth. S subjects from left to right, F frames of H x W pixels."""

    plan: ScenePlan
    frames: np.ndarray  # uint8 [F, H, W, 3], RGB
    masks: np.ndarray  # bool [S, F, H, W], the subject without what stands in front of it
    boxes_xyxy_px: np.ndarray  # int [S, F, 4], half-open, around the mask; zeros for an empty one
    visible_fraction: np.ndarray  # float [S, F], shown area / the subject's whole area within the frame


def render_scenes(
    plans: Sequence[ScenePlan], num_drawings: int = NUM_DRAWINGS, *, poses: Sequence[Pose] | None = None
) -> list[RenderedScene]:
    """Draws scenes with their ground truth. A subject that stands lower is in front.

    Args:
        num_drawings: the first one is the first frame, each other one is shown for ``HOLD`` frames.
        poses: as for `draw_subjects`.
    """
    figures = draw_subjects(plans, num_drawings, poses=poses)
    shown = [0, *(drawing for drawing in range(1, num_drawings) for _ in range(HOLD))]
    scenes, start = [], 0
    for plan in plans:
        count = len(plan.subjects)
        stop = start + count * num_drawings
        colour = figures.colour[start:stop].reshape(count, num_drawings, *figures.colour.shape[1:])
        alpha = figures.alpha[start:stop].reshape(count, num_drawings, *figures.alpha.shape[1:])
        start = stop
        canvas, masks = paint_place(plan)[None], alpha >= 0.5
        areas = np.maximum(masks.sum((2, 3)), 1)
        order = sorted(range(count), key=lambda number: plan.subjects[number].ground_px)
        for place, number in enumerate(order):
            canvas = Figures(colour[number], alpha[number]).over(canvas)
            for behind in order[:place]:
                masks[behind] &= alpha[number] < 0.5
        frames = canvas.round().astype(np.uint8)
        visible = masks.sum((2, 3)) / areas
        scenes.append(RenderedScene(plan, frames[shown], masks[:, shown], boxes_of(masks)[:, shown], visible[:, shown]))
    return scenes


def draw_subjects(
    plans: Sequence[ScenePlan], num_drawings: int = NUM_DRAWINGS, *, poses: Sequence[Pose] | None = None
) -> Figures:
    """Every subject of every scene in each of its drawings, alone, in that order; ``poses`` replace their own."""
    moments = [(subject, each) for plan in plans for subject in plan.subjects for each in range(num_drawings)]
    return draw(
        [subject.identity for subject, _ in moments],
        poses or [subject.pose(each) for subject, each in moments],
        [subject.column_px(each) for subject, each in moments],
        [subject.ground_px for subject, _ in moments],
        [subject.height_px for subject, _ in moments],
    )


def render_references(identities: Sequence[int], poses: Sequence[Pose], rng: np.random.Generator | None = None) -> np.ndarray:
    """Creatures alone on white, about as large as curation's crops: uint8 [N, H, W, 3].

    Args:
        rng: moves and scales each a little, because detected boxes are not exact.
    """
    count = len(identities)
    play = np.zeros((3, count)) if rng is None else rng.uniform(-1, 1, (3, count))
    heights = REFERENCE_HEIGHT_PX + 1.5 * play[0]
    grounds = (FRAME_HEIGHT_PX + heights) / 2 + 0.6 * play[1] + heights / HEIGHT * np.array([pose.lift for pose in poses])
    figures = draw(identities, poses, FRAME_WIDTH_PX / 2 + 1.5 * play[2], grounds, heights)
    return figures.over(np.full((1, 1, 1, 3), 255.0, np.float32)).round().astype(np.uint8)


def boxes_of(masks: np.ndarray) -> np.ndarray:
    """Smallest boxes around masks: bool [..., H, W] -> int [..., 4], xyxy, half-open, px; zeros for an empty mask."""
    lines = np.any(masks, -2), np.any(masks, -1)
    first = [line.argmax(-1) for line in lines]
    end = [line.shape[-1] - line[..., ::-1].argmax(-1) for line in lines]
    return np.stack([*first, *end], -1) * np.any(masks, axis=(-2, -1), keepdims=True)[..., 0]


assert (NUM_FRAMES - 1) % HOLD == 0
