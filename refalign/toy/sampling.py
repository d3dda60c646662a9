"""Endless random pictures of the sprite world for training: drawn by number when asked for, so that runs can resume."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from refalign.toy.drawing import POSES, render_reference
from refalign.toy.identities import Split, sample_identity
from refalign.toy.rendering import RenderedScene, render_scene
from refalign.toy.scenes import make_scene


@dataclass(frozen=True)
class FrameTruth:
    """One frame with the subjects that show in it.

    Attributes:
        frame: uint8 [H, W, 3].
        boxes_xyxy_px: int [S, 4], half-open.
        masks: bool [S, H, W].
    """

    frame: np.ndarray
    boxes_xyxy_px: np.ndarray
    masks: np.ndarray


def sample_clip(seed: int, number: int, split: Split = "train") -> RenderedScene:
    """The ``number``-th random shot of a seed."""
    return render_scene(make_scene([seed, number], split=split))


def sample_frame(seed: int, number: int, split: Split = "train", *, min_visible: float = 0.15) -> FrameTruth:
    """The ``number``-th random frame of a seed: a single moment of a shot of its own.

    Args:
        min_visible: subjects of which a smaller fraction shows are left out of the truth.
    """
    plan = make_scene([seed, number], split=split)
    progress = float(np.random.default_rng([seed, number, 1]).uniform())
    moment = tuple(
        replace(
            subject,
            x_px=(subject.x_px[0] + progress * (subject.x_px[1] - subject.x_px[0]),) * 2,
            height_px=(subject.height_px[0] + progress * (subject.height_px[1] - subject.height_px[0]),) * 2,
            yaw=(subject.yaw[0] + progress * (subject.yaw[1] - subject.yaw[0]),) * 2,
            phase=subject.phase + progress * subject.cycles,
        )
        for subject in plan.subjects
    )
    shot = render_scene(replace(plan, subjects=moment, num_frames=1))
    shown = shot.visible_fraction[:, 0] >= min_visible
    return FrameTruth(shot.frames[0], shot.boxes_xyxy_px[shown, 0], shot.masks[shown, 0])


def sample_clutter(seed: int, number: int, size: int = 96) -> FrameTruth:
    """The ``number``-th frame without any creature: cloudy textures, soft and hard shapes, stripes, darkness.

    A detector that has only seen creatures takes whatever stands out in real footage for one.
    """
    rng = np.random.default_rng([seed, number, 4])
    colours = rng.uniform(0, 255, (2, 3)) * rng.uniform(0.15, 1.0)
    frame = colours[0] + (colours[1] - colours[0]) * _clouds(rng, size)[..., None]
    picture = Image.fromarray(frame.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for _ in range(rng.integers(0, 9)):
        corners = rng.uniform(-0.2, 1.2, (2, 2)) * size
        box = [tuple(corners.min(0)), tuple(corners.max(0) + 1)]
        fill = tuple(int(value) for value in rng.uniform(0, 255, 3) * rng.uniform(0.2, 1.0))
        kind = rng.integers(4)
        if kind == 0:
            draw.ellipse(box, fill=fill)
        elif kind == 1:
            draw.rectangle(box, fill=fill)
        elif kind == 2:
            draw.polygon([tuple(point) for point in rng.uniform(-0.1, 1.1, (int(rng.integers(3, 7)), 2)) * size], fill=fill)
        else:
            draw.line([tuple(point) for point in corners], fill=fill, width=int(rng.integers(1, 14)))
        if rng.random() < 0.3:
            picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 3)))
            draw = ImageDraw.Draw(picture)
    noisy = np.asarray(picture) + rng.normal(0, rng.uniform(0, 10), (size, size, 3))
    nothing = np.zeros((0, size, size), bool)
    return FrameTruth(noisy.clip(0, 255).astype(np.uint8), np.zeros((0, 4), int), nothing)


def _clouds(rng: np.random.Generator, size: int) -> np.ndarray:
    """float [size, size] in [0, 1]: noise whose amplitude falls with frequency, as in photographs."""
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size)[None])
    frequency[0, 0] = 1
    spectrum = np.fft.fft2(rng.normal(size=(size, size))) / frequency ** rng.uniform(0.8, 2.0)
    values = np.fft.ifft2(spectrum).real
    return (values - values.min()) / max(float(np.ptp(values)), 1e-9)


def sample_reference(seed: int, number: int, split: Split = "train", *, size: int = 96) -> np.ndarray:
    """The ``number``-th random reference picture of a seed: a creature in some pose on white, uint8 [size, size, 3]."""
    rng = np.random.default_rng([seed, number, 2])
    identity = sample_identity(rng, split)
    pose = POSES[int(rng.integers(len(POSES)))]
    return render_reference(identity, pose, size, phase=float(rng.uniform()), yaw=float(rng.uniform(-1, 1)))
