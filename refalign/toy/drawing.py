"""What creatures look like: signed distances to a few large forms, drawn for many creatures at once.

All creatures are equally tall, so that in a reference, which is cut to its box, one is about as large as in a clip. All forms
are at least half a token of the Transformer (4 px) wide, except the smile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike

from refalign.toy.identities import COLOURS, EYES, HEADWEAR, PATTERNS, SHAPES, attributes_of

Action = Literal["standing", "jumping", "walking left", "walking right", "waving"]
ACTIONS: tuple[Action, ...] = get_args(Action)

FRAME_HEIGHT_PX, FRAME_WIDTH_PX = 48, 80
HEIGHT = 40.0
"""Of a creature from the ground to the top of its headwear, in units: pixels at ``height_px=HEIGHT``."""
_MIDDLE, _HALF = 15.5, 12.0  # of the body: centre above the ground, half of its height
_EYES_V, _MOUTH_V = 19.0, 14.6
_WHITE, _INK = (255.0, 255.0, 255.0), (38.0, 38.0, 46.0)
_SHADE = 0.1
"""Relative change of brightness from the middle of a body to its top and bottom."""

Grid = np.ndarray
"""float32 [N, H, W]."""
Form = Callable[[Grid, Grid], Grid]
"""Signed distance to an outline, in units, from the places u and v."""


@dataclass(frozen=True)
class Pose:
    """A moment of an action."""

    action: Action
    step: int = 0  # 0 or 1: which foot is up, where a waving arm is
    lift: float = 0.0  # units above the ground
    blink: bool = False


@dataclass(frozen=True)
class Figures:
    """N drawn creatures, each alone.

    Attributes:
        colour: float32 [N, H, W, 3], RGB in [0, 255] times alpha.
        alpha: float32 [N, H, W] in [0, 1].
    """

    colour: np.ndarray
    alpha: np.ndarray

    def over(self, canvas: np.ndarray) -> np.ndarray:
        """The figures on opaque pictures [N, H, W, 3]."""
        return canvas * (1 - self.alpha[..., None]) + self.colour


def draw(
    identities: Sequence[int],
    poses: Sequence[Pose],
    x_px: ArrayLike,
    ground_px: ArrayLike,
    height_px: ArrayLike,
    size_px: tuple[int, int] = (FRAME_HEIGHT_PX, FRAME_WIDTH_PX),
) -> Figures:
    """Draws creature n in pose n, its middle at column ``x_px[n]``, its feet at row ``ground_px[n]``."""
    brush = _Brush(x_px, ground_px, height_px, [pose.lift for pose in poses], size_px)
    looks = [attributes_of(identity) for identity in identities]

    def colours(name: str) -> np.ndarray:
        return np.array([COLOURS[getattr(look, name)] for look in looks], np.float32)

    def choose(name: str, forms: dict[str, Form]) -> Grid:
        return brush.choose([getattr(look, name) for look in looks], forms)

    main, second, third = colours("main_colour"), colours("second_colour"), colours("third_colour")
    walks = np.array([pose.action.startswith("walking") for pose in poses])
    step = np.array([pose.step for pose in poses])
    for side in (-1, 1):
        raised = np.where(walks & ((step == 1) == (side == 1)), 3.0, 0.0)
        brush.paint(_ellipse(brush.u - side * 5.5, brush.v - 2.8 - brush.column(raised), 4.4, 2.8), third)
        brush.paint(_arm(brush, poses, side), main)
    body = choose("shape", _SHAPES)
    shade = 1 + _SHADE * (brush.v - _MIDDLE) / _HALF
    brush.paint(body, main, shade)
    brush.paint(np.maximum(body, choose("pattern", _PATTERNS)), second, shade)
    brush.paint(choose("headwear", _HEADWEAR), third)
    gaze = np.array([{"walking left": -1.0, "walking right": 1.0}.get(pose.action, 0.0) for pose in poses])
    _draw_face(brush, choose, brush.column(gaze), np.array([pose.blink for pose in poses]))
    return Figures(brush.colour, brush.alpha)


class _Brush:
    """N transparent canvases, and the place of each pixel from its creature's feet: u to the right, v up, in units."""

    def __init__(
        self, x_px: ArrayLike, ground_px: ArrayLike, height_px: ArrayLike, lift: ArrayLike, size_px: tuple[int, int]
    ) -> None:
        height, width = size_px
        self.unit_px = self.column(np.asarray(height_px) / HEIGHT)
        rows, columns = np.mgrid[:height, :width].astype(np.float32) + np.float32(0.5)
        self.u = (columns - self.column(x_px)) / self.unit_px
        self.v = (self.column(ground_px) - rows) / self.unit_px - self.column(lift)
        self.colour = np.zeros((*self.u.shape, 3), np.float32)
        self.alpha = np.zeros_like(self.u)

    @staticmethod
    def column(values: ArrayLike) -> np.ndarray:
        """[N] -> [N, 1, 1], which broadcasts over grids."""
        return np.asarray(values, np.float32)[:, None, None]

    def choose(self, names: Sequence[str], forms: dict[str, Form]) -> Grid:
        """The signed distance of each creature to its form."""
        distance = np.empty_like(self.u)
        for name, form in forms.items():
            rows = np.array([each == name for each in names])
            if rows.any():
                distance[rows] = form(self.u[rows], self.v[rows])
        return distance

    def paint(self, distance: Grid, colour: ArrayLike, shade: Grid | None = None, shown: np.ndarray | None = None) -> None:
        """Paints where ``distance`` (in units) is negative, with soft edges one pixel wide."""
        cover = np.clip(0.5 - distance * self.unit_px, 0, 1)
        if shown is not None:
            cover *= self.column(shown)
        # Most forms are small: only the rows and columns that one of them touches are painted.
        used = [np.flatnonzero(cover.any(axis=axes)) for axes in ((0, 2), (0, 1))]
        if not used[0].size:
            return
        window = np.s_[:, used[0][0] : used[0][-1] + 1, used[1][0] : used[1][-1] + 1]
        cover, colour_there, alpha_there = cover[window], self.colour[window], self.alpha[window]
        tint = np.broadcast_to(np.asarray(colour, np.float32), (len(cover), 3))[:, None, None]
        if shade is not None:
            tint = np.clip(tint * shade[window][..., None], 0, 255)
        colour_there += cover[..., None] * (tint - colour_there)
        alpha_there += cover * (1 - alpha_there)


def _arm(brush: _Brush, poses: Sequence[Pose], side: int) -> Grid:
    """A raised arm: both of a creature that jumps, the right one of one that waves, none of others."""
    shown = np.array([pose.action == "jumping" or (pose.action == "waving" and side == 1) for pose in poses])
    out = np.array([6.5 if pose.action == "jumping" or pose.step == 0 else 3.0 for pose in poses])
    distance = _segment(side * brush.u, brush.v, (8.0, 16.0), (10.0 + brush.column(out), 27.0)) - 2.3
    return np.where(brush.column(shown) > 0, distance, 99.0)


def _draw_face(brush: _Brush, choose, gaze: Grid, blink: np.ndarray) -> None:
    """Eyes that look where the creature goes, and a smile."""
    eyes = choose("eyes", {"one": _eyes(0.0, 5.2), "two": _eyes(4.6, 4.2)})
    brush.paint(eyes, _WHITE, shown=~blink)
    pupils = {"one": _eyes(0.0, 2.4), "two": _eyes(4.6, 2.0)}
    u, brush.u = brush.u, brush.u - 1.3 * gaze
    brush.paint(choose("eyes", pupils), _INK, shown=~blink)
    brush.u = u
    brush.paint(np.maximum(eyes, np.abs(brush.v - _EYES_V) - 0.7), _INK, shown=blink)
    ring = np.abs(np.hypot(u, brush.v - _MOUTH_V) - 3.2) - 0.6
    brush.paint(np.maximum(ring, brush.v - _MOUTH_V + 1.2), _INK)


def _eyes(apart: float, radius: float) -> Form:
    return lambda u, v: np.hypot(np.abs(u) - apart, v - _EYES_V) - radius


def _box(u: Grid, v: Grid, half_width: float, half_height: float, radius: float = 0.0) -> Grid:
    across, up = np.abs(u) - half_width + radius, np.abs(v) - half_height + radius
    return np.hypot(np.maximum(across, 0), np.maximum(up, 0)) + np.minimum(np.maximum(across, up), 0) - radius


def _ellipse(u: Grid, v: Grid, half_width: float, half_height: float) -> Grid:
    return (np.hypot(u / half_width, v / half_height) - 1) * min(half_width, half_height)


def _segment(u: Grid, v: Grid, start: tuple, end: tuple) -> Grid:
    (a, b), (c, d) = start, end
    along = np.clip(((u - a) * (c - a) + (v - b) * (d - b)) / ((c - a) ** 2 + (d - b) ** 2), 0, 1)
    return np.hypot(u - a - along * (c - a), v - b - along * (d - b))


def _wedge(u: Grid, v: Grid, bottom: float, top: float, half_width: float, radius: float = 0.8) -> Grid:
    """A triangle on its base with slightly round corners."""
    height = top - bottom
    slope = (np.abs(u) * height + (v - top) * half_width) / np.hypot(height, half_width)
    return np.maximum(slope, bottom - v + radius) - radius * 0.2


_SHAPES: dict[str, Form] = {
    "round": lambda u, v: np.hypot(u, v - _MIDDLE) - _HALF,
    "square": lambda u, v: _box(u, v - _MIDDLE, 11.0, _HALF, 1.5),
    "triangular": lambda u, v: _wedge(u, v, _MIDDLE - _HALF, 30.5, 13.5),
    "diamond-shaped": lambda u, v: (np.abs(u) / 13.0 + np.abs(v - _MIDDLE) / 13.5 - 1) * 9.4,
}
_PATTERNS: dict[str, Form] = {
    "half": lambda u, v: -u,
    "belt": lambda u, v: np.abs(v - 9.0) - 3.4,
    "belly": lambda u, v: np.hypot(u, v - 8.5) - 5.6,
    "spots": lambda u, v: np.hypot(np.abs(u) - 7.2, v - 11.2) - 3.4,
}
_HEADWEAR: dict[str, Form] = {
    "top hat": lambda u, v: np.minimum(_box(u, v - 33.0, 5.4, 7.0), _box(u, v - 26.8, 9.5, 1.7)),
    "party hat": lambda u, v: _wedge(u, v, 25.0, 41.0, 8.0),
    "rabbit ears": lambda u, v: _segment(np.abs(u), v, (4.2, 24.0), (6.2, 37.0)) - 3.0,
    "bobble": lambda u, v: np.hypot(u, v - 33.0) - 7.0,
}
assert (tuple(_SHAPES), tuple(_PATTERNS), tuple(_HEADWEAR), EYES) == (SHAPES, PATTERNS, HEADWEAR, ("one", "two"))
