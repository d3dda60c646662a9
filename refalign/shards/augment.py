"""Other views of a reference: turned, sheared, in perspective, blurred and tinted, but never cropped.

If every reference were a cut-out of the clip itself, a model would learn to paste it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

BRIGHTNESS = (0.9, 1.1)
TINT = 0.05  # largest relative change of a colour channel
MAX_BLUR = 1.5  # of a Gaussian, as a thousandth of the picture's long side
TURN_DEG, SHEAR_DEG = 45.0, 10.0
PERSPECTIVE, PERSPECTIVE_CHANCE, FLIP_CHANCE = 0.3, 0.5, 0.5
SCALE = (0.7, 1.0)  # of the largest size that fits


@dataclass(frozen=True)
class Placement:
    """Where a picture is put on its white canvas."""

    scale: float = 1.0  # of the largest size that fits, in (0, 1]
    place: tuple[float, float] = (0.5, 0.5)  # share of the free room that lies left of it and above it


def augment(picture: Image.Image, rng: np.random.Generator) -> tuple[Image.Image, Placement]:
    """Another view of an RGBA cut-out and a place for it; equal generators give equal bytes.

    Source: the published stage-1 recipe (blur, colour, flip, shear 10 deg, rotation 45 deg, perspective .3 at .5, scale,
    translation). Its order is not published. Here all geometry is one resampling, so that nothing is blurred twice.
    """
    colour = _tint(picture, rng)
    turned = _warp(colour, _draw_corners(picture.width, picture.height, rng))
    box = turned.getchannel("A").getbbox()
    scale, left, above = rng.uniform(*SCALE), *rng.uniform(0, 1, 2)
    return turned.crop(box) if box else picture, Placement(float(scale), (float(left), float(above)))


def _tint(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Brightness, tint and blur of the colours; the outline stays."""
    alpha = picture.getchannel("A")
    # White under what is cut away: otherwise its hidden colour would bleed into the outline.
    colours = Image.composite(picture.convert("RGB"), Image.new("RGB", picture.size, "white"), alpha)
    colours = ImageEnhance.Brightness(colours).enhance(float(rng.uniform(*BRIGHTNESS)))
    gains = rng.uniform(1 - TINT, 1 + TINT, 3)
    bands = [
        band.point([min(255, round(level * gain)) for level in range(256)])
        for band, gain in zip(colours.split(), gains, strict=True)
    ]
    blur_px = float(rng.uniform(0, MAX_BLUR)) * max(picture.size) / 1000
    return Image.merge("RGBA", [*(band.filter(ImageFilter.GaussianBlur(blur_px)) for band in bands), alpha])


def _draw_corners(width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    """Where the corners (clockwise from the top left) of the picture go: [4, 2] px."""
    corners = np.array([[-width, -height], [width, -height], [width, height], [-width, height]]) / 2
    if rng.random() < PERSPECTIVE_CHANCE:
        corners = corners * (1 - PERSPECTIVE * rng.uniform(0, 1, (4, 2)))
    if rng.random() < FLIP_CHANCE:
        corners = corners * [-1, 1]
    turn, shear = np.radians(rng.uniform(-1, 1, 2) * [TURN_DEG, SHEAR_DEG])
    sheared = corners @ np.array([[1, 0], [math.tan(shear), 1]])
    return sheared @ np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])


def _warp(picture: Image.Image, corners: np.ndarray) -> Image.Image:
    """The picture with its corners moved there, on a transparent canvas that holds all of it."""
    corners = corners - corners.min(0)
    size = np.ceil(corners.max(0)).astype(int).clip(1)
    width, height = picture.size
    source = np.array([[0, 0], [width, 0], [width, height], [0, height]], float)
    # PIL asks where each target pixel comes from: x = (a X + b Y + c) / (g X + h Y + 1), likewise y with d, e, f.
    rows, values = [], []
    for (X, Y), (x, y) in zip(corners, source, strict=True):
        rows += [[X, Y, 1, 0, 0, 0, -x * X, -x * Y], [0, 0, 0, X, Y, 1, -y * X, -y * Y]]
        values += [x, y]
    coefficients = np.linalg.solve(np.array(rows), np.array(values))
    how = Image.Transform.PERSPECTIVE, coefficients.tolist(), Image.Resampling.BICUBIC
    warped = picture.transform(tuple(size.tolist()), *how, fillcolor=(255, 255, 255, 0))
    # Bicubic overshoot must not make the outside faintly visible.
    alpha = warped.getchannel("A").point([0 if level < 8 else level for level in range(256)])
    warped.putalpha(alpha)
    return warped
