"""Draws one creature: outlined vector shapes at twice the final resolution, so that averaging smooths the edges.

Coordinates are in units of the creature's standing height, origin at the point between its feet, y upwards. A ``Pen`` maps them
to pixels, with the pose's tilt and squash, so that nothing is ever rotated as a raster.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from PIL import Image, ImageDraw

from refalign.toy.identities import COLOURS, Attributes, attributes_of

Pose = Literal["standing", "walking", "jumping", "waving", "dancing", "sleeping"]
POSES: tuple[Pose, ...] = get_args(Pose)
SUPERSAMPLING = 2
TILE_HEIGHTS = 1.9
"""Width and height of the tile a creature is drawn in, in creature heights; room for raised arms, jumps and lying down."""
GROUND_FROM_TOP = 1.5
"""Where the feet stand in the tile, in creature heights from its top."""

OUTLINE = (38, 32, 44)
LEG_LENGTH = 0.2
Point = tuple[float, float]
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class PoseState:
    """One moment of a pose.

    Attributes:
        phase: time in cycles; a pose repeats at every integer.
        yaw: where it looks, -1 left .. 1 right, 0 at the viewer.
    """

    pose: Pose
    phase: float = 0.0
    yaw: float = 0.0


@dataclass(frozen=True)
class BodyForm:
    """Body polygon in the unit box (u in [-.5, .5], v in [0, 1] upwards), its size in creature heights, and where things sit."""

    polygon: tuple[Point, ...]
    width: float
    height: float
    face_v: float
    ears: Point
    """Where the right ear grows; the left one mirrors it."""
    arm_v: float
    arm_u: float


def _superellipse(exponent: float) -> tuple[Point, ...]:
    angles = np.linspace(0, 2 * math.pi, 40, endpoint=False)
    c, s = np.cos(angles), np.sin(angles)
    u = 0.5 * np.sign(c) * np.abs(c) ** (2 / exponent)
    v = 0.5 + 0.5 * np.sign(s) * np.abs(s) ** (2 / exponent)
    return tuple(zip(u.tolist(), v.tolist(), strict=True))


def _star(tips: int, inner: float, roundness: int) -> tuple[Point, ...]:
    """A star whose radius swings between ``inner`` / 2 and 1 / 2; a cosine for ``roundness`` 1, pointed tips for 0."""
    points = []
    for step in range(tips * 8):
        angle = 2 * math.pi * step / (tips * 8)
        wave = (1 + math.cos(tips * angle)) / 2 if roundness else abs(1 - (step / 4) % 2)
        radius = 0.5 * (inner + (1 - inner) * wave)
        points.append((radius * math.sin(angle), 0.5 + radius * math.cos(angle)))
    return tuple(points)


BODY_FORMS: dict[str, BodyForm] = {
    "round": BodyForm(_superellipse(2.0), 0.62, 0.58, 0.64, (0.3, 0.9), 0.45, 0.48),
    "square": BodyForm(_superellipse(9.0), 0.56, 0.55, 0.66, (0.33, 0.97), 0.45, 0.5),
    "triangular": BodyForm(((-0.5, 0.0), (0.5, 0.0), (0.06, 1.0), (-0.06, 1.0)), 0.76, 0.64, 0.4, (0.17, 0.7), 0.3, 0.36),
    "tall": BodyForm(_superellipse(3.0), 0.38, 0.66, 0.72, (0.27, 0.95), 0.42, 0.5),
    "star-shaped": BodyForm(_star(5, 0.5, 0), 0.82, 0.72, 0.56, (0.19, 0.78), 0.62, 0.42),
    "fluffy": BodyForm(_star(9, 0.8, 1), 0.7, 0.6, 0.62, (0.27, 0.92), 0.45, 0.47),
}


class Pen:
    """Draws in creature units onto a tile, under the tilt and squash of a pose."""

    def __init__(
        self, scale_px: float, *, tilt_deg: float = 0.0, squash: float = 1.0, lift: float = 0.0, pivot_height: float = 0.5
    ):
        """``scale_px``: pixels per creature height; ``lift`` in creature heights; the tilt turns about ``pivot_height``."""
        self.size_px = round(TILE_HEIGHTS * scale_px)
        self.scale_px = scale_px
        self.image = Image.new("RGBA", (self.size_px, self.size_px), (0, 0, 0, 0))
        self.draw = ImageDraw.Draw(self.image)
        self.line_px = max(2, round(0.032 * scale_px))
        self._cos, self._sin = math.cos(math.radians(tilt_deg)), math.sin(math.radians(tilt_deg))
        self._squash, self._lift, self._pivot = squash, lift, pivot_height

    def at(self, point: Point) -> Point:
        """Creature units -> tile pixels."""
        x, y = point[0] / math.sqrt(self._squash), point[1] * self._squash - self._pivot
        turned = x * self._cos + y * self._sin, -x * self._sin + y * self._cos
        return (
            self.size_px / 2 + turned[0] * self.scale_px,
            (GROUND_FROM_TOP - self._lift - self._pivot - turned[1]) * self.scale_px,
        )

    def polygon(self, points: list[Point] | tuple[Point, ...], fill: Colour, *, outlined: bool = True) -> None:
        """A filled polygon, with a rounded outline."""
        corners = [self.at(point) for point in points]
        self.draw.polygon(corners, fill=fill)
        if outlined:
            self.draw.line([*corners, corners[0], corners[1]], fill=OUTLINE, width=self.line_px, joint="curve")

    def disc(self, centre: Point, radius: float, fill: Colour, *, outlined: bool = True) -> None:
        """A filled circle; ``radius`` in creature heights."""
        x, y = self.at(centre)
        r = radius * self.scale_px
        thickness = min(self.line_px, max(1, round(0.3 * r))) if outlined else 0
        self.draw.ellipse((x - r, y - r, x + r, y + r), fill=fill, outline=OUTLINE if outlined else None, width=thickness)

    def stroke(self, points: list[Point], width: float, fill: Colour, *, outlined: bool = True) -> None:
        """A line of ``width`` creature heights, outlined on both sides."""
        path = [self.at(point) for point in points]
        width_px = max(2, round(width * self.scale_px))
        if outlined:
            self.draw.line(path, fill=OUTLINE, width=width_px + 2 * self.line_px - 2, joint="curve")
        self.draw.line(path, fill=fill, width=width_px, joint="curve")


def draw_creature(identity: int, state: PoseState, height_px: float) -> Image.Image:
    """Draws a creature on a transparent square tile.

    Args:
        height_px: standing height in final pixels; the tile is ``SUPERSAMPLING`` times larger.

    Returns:
        RGBA tile, ``TILE_HEIGHTS * height_px * SUPERSAMPLING`` px on a side; the feet's ground point is at its horizontal centre
        and ``GROUND_FROM_TOP`` creature heights from its top.
    """
    attributes = attributes_of(identity)
    form = BODY_FORMS[attributes.shape]
    swing = math.sin(2 * math.pi * state.phase)
    pen = Pen(height_px * SUPERSAMPLING, **_posture(state, swing, form))
    main, second = COLOURS[attributes.main_colour], COLOURS[attributes.second_colour]
    _draw_limbs(pen, attributes, state, swing)
    if attributes.headwear in ("cat ears", "bunny ears", "antennae"):
        _draw_headwear(pen, attributes.headwear, form, second)
    _draw_arms(pen, form, main, state, swing)
    _draw_body(pen, form, attributes.pattern, main, second, state.yaw)
    if attributes.headwear in ("top hat", "party cone", "crown"):
        _draw_headwear(pen, attributes.headwear, form, second)
    _draw_face(pen, attributes.eyes, form, state)
    return pen.image


def render_reference(
    identity: int, pose: Pose = "standing", size: int = 96, *, phase: float = 0.25, yaw: float = 0.0
) -> np.ndarray:
    """One creature, cropped to its outline, centred on white: uint8 [size, size, 3]."""
    tile = draw_creature(identity, PoseState(pose, phase, yaw), height_px=size)
    tile = tile.crop(tile.getbbox())
    side = round(max(tile.size) * 1.06)
    canvas = Image.new("RGBA", (side, side), (255, 255, 255, 255))
    canvas.alpha_composite(tile, ((side - tile.width) // 2, (side - tile.height) // 2))
    return np.asarray(canvas.convert("RGB").resize((size, size), Image.Resampling.BOX))


def _posture(state: PoseState, swing: float, form: BodyForm) -> dict[str, float]:
    """Tilt, squash and lift of the whole creature at this moment."""
    if state.pose == "sleeping":
        # Lying on its side: turned about the body's middle, then let down until the side touches the ground.
        pivot = LEG_LENGTH + form.height / 2
        return {"tilt_deg": 82.0, "squash": 1.0 + 0.02 * swing, "pivot_height": pivot, "lift": form.width / 2 - pivot}
    if state.pose == "jumping":
        return {"lift": 0.22 * abs(math.sin(math.pi * state.phase)), "squash": 0.94 + 0.12 * abs(math.sin(math.pi * state.phase))}
    if state.pose == "dancing":
        return {"tilt_deg": 17.0 * swing, "lift": 0.05 * abs(swing), "pivot_height": 0.1}
    if state.pose == "walking":
        return {"tilt_deg": 5.0 * swing, "lift": 0.03 * abs(swing), "pivot_height": 0.1}
    return {"squash": 1.0 + 0.02 * swing}


def _body_point(form: BodyForm, u: float, v: float) -> Point:
    return u * form.width, LEG_LENGTH * 0.92 + v * form.height


def _draw_body(pen: Pen, form: BodyForm, pattern: str, main: Colour, second: Colour, yaw: float) -> None:
    """Body in the main colour, the pattern clipped to it, the outline on top."""
    outline = [_body_point(form, u, v) for u, v in form.polygon]
    corners = [pen.at(point) for point in outline]
    silhouette = Image.new("L", pen.image.size, 0)
    ImageDraw.Draw(silhouette).polygon(corners, fill=255)
    canvas, draw = pen.image, pen.draw
    pen.image = Image.new("RGBA", canvas.size, (*main, 255))
    pen.draw = ImageDraw.Draw(pen.image)
    _draw_pattern(pen, form, pattern, second, 0.1 * yaw)
    canvas.paste(pen.image, mask=silhouette)
    pen.image, pen.draw = canvas, draw
    pen.draw.line([*corners, corners[0], corners[1]], fill=OUTLINE, width=pen.line_px, joint="curve")


def _draw_pattern(pen: Pen, form: BodyForm, pattern: str, second: Colour, shift: float) -> None:
    """The pattern in the second colour; ``shift`` (in u) follows the yaw, as if painted on a round body."""

    def rectangle(u0: float, v0: float, u1: float, v1: float) -> None:
        box = ((u0, v0), (u1, v0), (u1, v1), (u0, v1))
        pen.polygon([_body_point(form, u + shift, v) for u, v in box], second, outlined=False)

    pitch_u, pitch_v = 0.17 / form.width, 0.17 / form.height
    if pattern == "stripes":
        for row in range(-1, 5):
            rectangle(-0.8, 0.12 + 1.1 * row * pitch_v, 0.8, 0.12 + (1.1 * row + 0.45) * pitch_v)
    elif pattern == "bars":
        for column in range(-3, 4):
            rectangle((1.1 * column - 0.23) * pitch_u, -0.1, (1.1 * column + 0.23) * pitch_u, 1.1)
    elif pattern == "checks":
        for row in range(5):
            for column in range(-4, 4):
                if (row + column) % 2:
                    rectangle(
                        column * 0.8 * pitch_u, row * 0.8 * pitch_v, (column + 0.85) * 0.8 * pitch_u, (row + 0.85) * 0.8 * pitch_v
                    )
    elif pattern == "dots":
        for row in range(5):
            for column in range(-3, 4):
                centre = ((column + 0.5 * (row % 2)) * 1.05 * pitch_u + shift, 0.12 + row * 0.85 * pitch_v)
                pen.disc(_body_point(form, *centre), 0.05, second, outlined=False)
    else:
        ellipse = [(0.3 * math.cos(a) + shift, 0.24 + 0.24 * math.sin(a)) for a in np.linspace(0, 2 * math.pi, 24)]
        pen.polygon([_body_point(form, u, v) for u, v in ellipse], second, outlined=False)


def _draw_limbs(pen: Pen, attributes: Attributes, state: PoseState, swing: float) -> None:
    """What it stands on, moving with the pose."""
    main, second = COLOURS[attributes.main_colour], COLOURS[attributes.second_colour]
    stride = {"walking": 0.09, "dancing": 0.05, "jumping": 0.03}.get(state.pose, 0.0) * swing
    top = LEG_LENGTH + 0.14
    if attributes.limbs == "legs":
        for side in (-1, 1):
            foot = (side * 0.13 + stride * side, 0.04)
            pen.stroke([(side * 0.11, top), foot], 0.06, main)
            pen.polygon([(foot[0] + dx, dy) for dx, dy in ((-0.075, 0), (0.075, 0), (0.06, 0.07), (-0.06, 0.07))], second)
    elif attributes.limbs == "wheels":
        pen.stroke([(-0.1, top), (-0.15, 0.11), (0.15, 0.11), (0.1, top)], 0.05, second)
        for side in (-1, 1):
            pen.disc((side * 0.16, 0.11), 0.11, (120, 120, 130))
            spoke = 2 * math.pi * state.phase * (state.pose == "walking")
            pen.disc((side * 0.16 + 0.04 * math.cos(spoke), 0.11 + 0.04 * math.sin(spoke)), 0.04, (235, 235, 235), outlined=False)
    elif attributes.limbs == "tentacles":
        for foot in (-0.21, -0.07, 0.07, 0.21):
            bend = 0.05 * math.sin(2 * math.pi * state.phase + 20 * foot)
            pen.stroke([(foot * 0.8, top), (foot + bend, 0.14), (foot - bend, 0.07), (foot * 1.15 + bend, 0.015)], 0.05, main)
    else:
        zigzag = [(0.0, top)] + [(0.085 * (-1) ** turn, top - 0.08 - turn * 0.06) for turn in range(4)] + [(0.0, 0.02)]
        pen.stroke(zigzag, 0.035, (200, 204, 212))
        pen.stroke([(-0.13, 0.02), (0.13, 0.02)], 0.05, second)


def _draw_arms(pen: Pen, form: BodyForm, main: Colour, state: PoseState, swing: float) -> None:
    """Two arms; their angles (degrees from straight down, outwards) tell the pose."""
    angles = {
        "standing": (28.0, 28.0),
        "walking": (35.0 + 20 * swing, 35.0 - 20 * swing),
        "jumping": (140.0, 140.0),
        "waving": (28.0, 135.0 + 28 * math.sin(4 * math.pi * state.phase)),
        "dancing": (95.0 + 50 * swing, 95.0 - 50 * swing),
        "sleeping": (15.0, 15.0),
    }[state.pose]
    for side, angle_deg in zip((-1, 1), angles, strict=True):
        x, y = _body_point(form, side * form.arm_u * 0.9, form.arm_v)
        angle = math.radians(angle_deg)
        hand = (x + side * 0.2 * math.sin(angle), y - 0.2 * math.cos(angle))
        pen.stroke([(x, y), hand], 0.055, main)
        pen.disc(hand, 0.055, main)


def _draw_headwear(pen: Pen, headwear: str, form: BodyForm, second: Colour) -> None:
    """What it wears on, or grows from, its head."""
    top = _body_point(form, 0, 0.96)[1]
    ear_x, ear_y = _body_point(form, *form.ears)
    if headwear == "top hat":
        pen.polygon([(-0.12, top + 0.02), (0.12, top + 0.02), (0.13, top + 0.21), (-0.13, top + 0.21)], second)
        pen.polygon([(-0.21, top - 0.02), (0.21, top - 0.02), (0.21, top + 0.035), (-0.21, top + 0.035)], second)
    elif headwear == "party cone":
        pen.polygon([(-0.14, top - 0.02), (0.14, top - 0.02), (0.0, top + 0.26)], second)
        pen.disc((0.0, top + 0.26), 0.05, (255, 255, 255))
    elif headwear == "crown":
        zigzag = [(-0.18, 0.17), (-0.09, 0.07), (0.0, 0.19), (0.09, 0.07), (0.18, 0.17), (0.16, -0.03), (-0.16, -0.03)]
        pen.polygon([(x, top + y) for x, y in zigzag], second)
    for side in (-1, 1):
        root = side * ear_x
        if headwear == "antennae":
            pen.stroke([(root * 0.6, ear_y - 0.04), (root * 0.6 + side * 0.08, top + 0.18)], 0.025, OUTLINE, outlined=False)
            pen.disc((root * 0.6 + side * 0.08, top + 0.19), 0.065, second)
        elif headwear == "cat ears":
            pen.polygon(
                [(root - side * 0.11, ear_y + 0.0), (root + side * 0.1, ear_y - 0.1), (root + side * 0.08, ear_y + 0.18)], second
            )
        elif headwear == "bunny ears":
            loop = [(0.06 * math.cos(a), 0.15 * math.sin(a)) for a in np.linspace(0, 2 * math.pi, 20)]
            pen.polygon([(root * 0.75 + x + side * 0.25 * y, ear_y + 0.12 + y) for x, y in loop], second)


def _draw_face(pen: Pen, eyes: str, form: BodyForm, state: PoseState) -> None:
    """Eyes (their number is part of the identity; asleep they are closed lids, still countable) and a mouth."""
    centre_x, centre_y = _body_point(form, 0.14 * state.yaw, form.face_v)
    spots = {
        "one": [(0.0, 0.02, 0.125)],
        "two": [(-0.09, 0.02, 0.085), (0.09, 0.02, 0.085)],
        "three": [(0.0, 0.095, 0.072), (-0.115, 0.0, 0.072), (0.115, 0.0, 0.072)],
        "stalks": [(-0.14, 0.17, 0.085), (0.14, 0.17, 0.085)],
    }[eyes]
    for dx, dy, radius in spots:
        x, y = centre_x + dx, centre_y + dy
        if eyes == "stalks":
            pen.stroke([(centre_x + 0.4 * dx, centre_y - 0.02), (x, y)], 0.035, (255, 255, 255))
        if state.pose == "sleeping":
            pen.disc((x, y), radius, (206, 196, 206))
            pen.stroke([(x - radius * 0.8, y), (x + radius * 0.8, y)], 0.03, OUTLINE, outlined=False)
        else:
            pen.disc((x, y), radius, (255, 255, 255))
            pen.disc((x + 0.3 * radius * state.yaw, y), 0.42 * radius, OUTLINE, outlined=False)
    mouth_y = centre_y - 0.12
    smile = [(centre_x + dx, mouth_y - 0.035 * math.cos(math.pi * dx / 0.14)) for dx in (-0.06, -0.03, 0.0, 0.03, 0.06)]
    pen.stroke(smile, 0.028, OUTLINE, outlined=False)
