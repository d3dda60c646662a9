"""Six kinds of place, painted soft and without outlines, so that creatures stand out from them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

BACKGROUND_PHRASES: dict[str, str] = {
    "meadow": "in a meadow",
    "beach": "on a beach",
    "night": "at night",
    "snow": "in the snow",
    "room": "in a room",
    "sea": "under water",
}
"""Background name -> how a caption says it."""

_Palette = tuple[tuple[int, int, int], tuple[int, int, int], tuple[int, int, int], tuple[int, int, int]]
_PALETTES: dict[str, _Palette] = {
    # sky top, sky bottom, ground near the horizon, ground at the bottom
    "meadow": ((150, 205, 240), (222, 240, 246), (176, 214, 140), (140, 190, 110)),
    "beach": ((170, 220, 245), (250, 236, 214), (240, 220, 170), (226, 198, 146)),
    "night": ((36, 40, 84), (84, 78, 128), (70, 80, 106), (54, 62, 86)),
    "snow": ((196, 212, 230), (232, 238, 246), (240, 244, 250), (214, 226, 240)),
    "room": ((232, 214, 196), (240, 226, 210), (196, 160, 128), (176, 140, 110)),
    "sea": ((120, 190, 214), (70, 140, 180), (150, 160, 150), (130, 136, 128)),
}
_TINT = 14
"""Largest random change of a palette's channel, so that two meadows differ."""


def paint_background(kind: str, seed: int, *, width: int, height: int, horizon: int) -> Image.Image:
    """Paints one place as an RGB image; the same arguments give the same pixels.

    Args:
        width, height: size in pixels.
        horizon: row at which the ground begins.
    """
    rng = np.random.default_rng([seed, 11])
    tint = rng.integers(-_TINT, _TINT + 1, size=(4, 3))
    sky_top, sky_bottom, ground_top, ground_bottom = np.clip(np.array(_PALETTES[kind]) + tint, 0, 255)
    rows = np.concatenate([_gradient(sky_top, sky_bottom, horizon), _gradient(ground_top, ground_bottom, height - horizon)])
    image = Image.fromarray(np.broadcast_to(rows[:, None], (height, width, 3)).astype(np.uint8))
    _DECORATIONS[kind](ImageDraw.Draw(image), rng, width, height, horizon)
    return image


def _gradient(first: np.ndarray, last: np.ndarray, rows: int) -> np.ndarray:
    return first + (last - first) * np.linspace(0, 1, rows)[:, None]


def _scatter(rng: np.random.Generator, count: int, width: int, top: int, bottom: int) -> list[tuple[int, int]]:
    return [(int(rng.integers(width)), int(rng.integers(top, bottom))) for _ in range(count)]


def _disc(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float, fill: tuple[int, int, int]) -> None:
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)


def _meadow(draw: ImageDraw.ImageDraw, rng: np.random.Generator, width: int, height: int, horizon: int) -> None:
    for x, y in _scatter(rng, 3, width, 8, horizon // 2):
        for step in (-1, 0, 1):
            _disc(draw, x + step * 0.06 * height, y, (0.06 - 0.015 * abs(step)) * height, (246, 249, 251))
    for x, y in _scatter(rng, 14, width, horizon + 6, height):
        _disc(draw, x, y, 0.012 * height, ((250, 240, 200), (250, 214, 226))[int(rng.integers(2))])


def _beach(draw: ImageDraw.ImageDraw, rng: np.random.Generator, width: int, height: int, horizon: int) -> None:
    draw.rectangle((0, horizon - 0.1 * height, width, horizon), fill=(128, 196, 216))
    _disc(draw, int(rng.integers(width)), 0.16 * height, 0.09 * height, (255, 244, 190))
    for x, y in _scatter(rng, 16, width, horizon + 4, height):
        _disc(draw, x, y, 0.01 * height, (206, 180, 134))


def _night(draw: ImageDraw.ImageDraw, rng: np.random.Generator, width: int, height: int, horizon: int) -> None:
    for x, y in _scatter(rng, 26, width, 0, horizon - 6):
        _disc(draw, x, y, 0.009 * height, (226, 226, 240))
    _disc(draw, int(rng.integers(width)), 0.17 * height, 0.09 * height, (238, 236, 214))


def _snow(draw: ImageDraw.ImageDraw, rng: np.random.Generator, width: int, height: int, horizon: int) -> None:
    for x, _ in _scatter(rng, 5, width, 0, 1):
        tall = height * float(rng.uniform(0.16, 0.28))
        draw.polygon([(x - 0.4 * tall, horizon), (x + 0.4 * tall, horizon), (x, horizon - tall)], fill=(150, 184, 180))
    for x, y in _scatter(rng, 34, width, 0, height):
        _disc(draw, x, y, 0.011 * height, (252, 253, 255))


def _room(draw: ImageDraw.ImageDraw, rng: np.random.Generator, width: int, height: int, horizon: int) -> None:
    pitch = int(rng.integers(height // 8, height // 5))
    for x in range(0, width, pitch):
        draw.rectangle((x, 0, x + pitch // 4, horizon), fill=(246, 234, 222))
    x, tall = int(rng.integers(width)), 0.3 * height
    draw.rectangle(
        (x, 0.12 * height, x + tall, 0.12 * height + tall),
        fill=(190, 222, 240),
        outline=(250, 250, 250),
        width=max(1, height // 48),
    )
    draw.rectangle((0, horizon - height // 48, width, horizon), fill=(250, 246, 240))


def _sea(draw: ImageDraw.ImageDraw, rng: np.random.Generator, width: int, height: int, horizon: int) -> None:
    for x, y in _scatter(rng, 12, width, 0, horizon):
        _disc(draw, x, y, float(rng.uniform(0.01, 0.03)) * height, (176, 216, 230))
    for x, _ in _scatter(rng, 7, width, 0, 1):
        tall = height * float(rng.uniform(0.12, 0.26))
        draw.polygon([(x - 3, horizon + 4), (x + 3, horizon + 4), (x + 2, horizon - tall)], fill=(96, 160, 130))


_DECORATIONS: dict[str, Callable[[ImageDraw.ImageDraw, np.random.Generator, int, int, int], None]] = {
    "meadow": _meadow,
    "beach": _beach,
    "night": _night,
    "snow": _snow,
    "room": _room,
    "sea": _sea,
}
