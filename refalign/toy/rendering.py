"""Turns a scene into frames and ground truth: the same drawing gives both, so that they cannot disagree."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from refalign.toy.backgrounds import paint_background
from refalign.toy.drawing import GROUND_FROM_TOP, SUPERSAMPLING, PoseState, draw_creature
from refalign.toy.scenes import FRAME_SIZE_PX, PAN_PX, ScenePlan, SubjectPlan

_HORIZON_PX = 54
HOLD = 4
"""Frames that each drawing is shown for, after the first frame: those that share a latent frame of the VAE show one drawing."""


@dataclass(frozen=True)
class RenderedScene:
    """Frames and truth. S subjects in the plan's order (farthest first), F frames, H x W pixels.

    Attributes:
        frames: uint8 [F, H, W, 3], RGB.
        masks: bool [S, F, H, W], the pixels where the subject shows (what stands in front is cut out).
        boxes_xyxy_px: int [S, F, 4], half-open, around the mask; all zero where nothing shows.
        visible_fraction: float [S, F], shown area / the subject's whole area within the frame.
    """

    plan: ScenePlan
    frames: np.ndarray
    masks: np.ndarray
    boxes_xyxy_px: np.ndarray
    visible_fraction: np.ndarray


def render_scene(plan: ScenePlan) -> RenderedScene:
    """Draws every frame of a scene with its ground truth; after the first, one drawing stands for ``HOLD`` frames: the last."""
    scale, size = SUPERSAMPLING, FRAME_SIZE_PX
    place = _paint_place(plan)
    num_subjects = len(plan.subjects)
    frames = np.empty((plan.num_frames, size, size, 3), np.uint8)
    whole = np.empty((num_subjects, plan.num_frames, size, size), bool)
    for index in range(plan.num_frames):
        if index and (index - 1) % HOLD:
            frames[index], whole[:, index] = frames[index - 1], whole[:, index - 1]
            continue
        shown_until = min(-(-index // HOLD) * HOLD, plan.num_frames - 1)
        progress = shown_until / max(1, plan.num_frames - 1)
        left = round(_between(plan.pan_px, progress) * scale)
        canvas = place.crop((left, 0, left + size * scale, size * scale)).convert("RGBA")
        for number, subject in enumerate(plan.subjects):
            layer = _subject_layer(subject, progress, size * scale)
            canvas.alpha_composite(layer)
            whole[number, index] = np.asarray(layer.getchannel("A").reduce(scale)) >= 128
        frames[index] = np.asarray(canvas.convert("RGB").reduce(scale))
    masks = whole.copy()
    for number in range(num_subjects):
        masks[number] &= ~whole[number + 1 :].any(axis=0)
    areas = np.maximum(whole.sum((2, 3)), 1)
    return RenderedScene(plan, frames, masks, boxes_of(masks), masks.sum((2, 3)) / areas)


def render_empty(plan: ScenePlan) -> np.ndarray:
    """The place at the first frame, without anybody: uint8 [H, W, 3]."""
    left, side = round(plan.pan_px[0] * SUPERSAMPLING), FRAME_SIZE_PX * SUPERSAMPLING
    return np.asarray(_paint_place(plan).crop((left, 0, left + side, side)).convert("RGB").reduce(SUPERSAMPLING))


def _paint_place(plan: ScenePlan) -> Image.Image:
    """All that the camera passes over, supersampled."""
    width, height, horizon = (px * SUPERSAMPLING for px in (FRAME_SIZE_PX + PAN_PX, FRAME_SIZE_PX, _HORIZON_PX))
    return paint_background(plan.background, plan.background_seed, width=width, height=height, horizon=horizon)


def boxes_of(masks: np.ndarray) -> np.ndarray:
    """Smallest boxes around masks: bool [..., H, W] -> int [..., 4], xyxy, half-open, px; zeros for an empty mask."""
    columns, rows = np.any(masks, -2), np.any(masks, -1)
    sides = (columns.argmax(-1), rows.argmax(-1), _last_true(columns), _last_true(rows))
    return np.stack(sides, -1) * np.any(masks, axis=(-2, -1), keepdims=True)[..., 0]


def _last_true(line: np.ndarray) -> np.ndarray:
    return line.shape[-1] - line[..., ::-1].argmax(-1)


def _between(ends: tuple[float, float], progress: float) -> float:
    return ends[0] + (ends[1] - ends[0]) * progress


def _subject_layer(subject: SubjectPlan, progress: float, side: int) -> Image.Image:
    """The subject alone on a transparent canvas of ``side`` supersampled px."""
    height_px = _between(subject.height_px, progress)
    state = PoseState(subject.pose, subject.phase + progress * subject.cycles, _between(subject.yaw, progress))
    tile = draw_creature(subject.identity, state, height_px)
    layer = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    left = round(_between(subject.x_px, progress) * SUPERSAMPLING - tile.width / 2)
    top = round((subject.ground_px - GROUND_FROM_TOP * height_px) * SUPERSAMPLING)
    layer.paste(tile, (left, top))
    return layer
