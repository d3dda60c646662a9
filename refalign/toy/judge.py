"""Reads a clip by drawing it again: a creature is a known function of its attributes, so the best drawing gives the attributes.

In each slot of a scene (left, middle, right), creatures are drawn in every pose and compared with the frames at nearby places.
Then each attribute in turn takes all its values, and the drawing with the smallest squared difference stays. No network is
involved.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from refalign.toy.drawing import ACTIONS, FRAME_WIDTH_PX, HEIGHT, Action, Figures, Pose, draw
from refalign.toy.identities import (
    ATTRIBUTE_NAMES,
    COLOURS,
    MAIN_COLOURS,
    PATTERNS,
    SHAPES,
    Attributes,
    attributes_of,
    identity_of,
    vocabularies,
)
from refalign.toy.scenes import HOLD, PLACES, SIDES, ScenePlan, Side, paint_place

CEILING = 90.0**2
"""Largest squared difference (over the three channels) that a pixel counts."""
ABSENT = 0.75
"""Squared difference of a drawn creature over that of the empty place, on the creature's pixels, above which nobody is there.
Measured: 0.1 to 0.2 on drawn clips, up to 0.5 under noise of 30 or blur of 1.5 px, above 0.9 without a creature."""
STRANGER, NOBODY = 0.6, 0.97
"""The same over the whole slot: above the first, looks of others than the cast are tried; above the second, nobody is there."""
OCCUPIED = 0.5
"""Least share of the middle of a slot that differs from the empty place if somebody stands there."""
UNSURE = 0.004
"""Least lead of the best value over the next, as a share of the empty place's difference; with less the answer is None."""
_ANYBODY = Attributes("round", "red", "blue", "belly", "top hat", "green", "two")
"""Start of the search without a cast."""
_MOMENTS = tuple((action, step) for action in ACTIONS for step in (0, 1))
_SWEEPS = 3
_SCALES = (1.0, 0.96, 1.04)
_GRID = 2
"""A creature's place is searched at every second place with every second pixel, then refined."""
_REACH, _MARGIN = 30, 32
"""Columns of a slot to both sides of its middle; pixels of unknown colour around the frame."""


@dataclass(frozen=True)
class Reading:
    """What is seen in one slot.

    Attributes:
        answers: attribute or "action" -> value, or None if two values fit alike.
        look: the drawing that fits best, sure or not.
        unexplained: squared difference where the creature is, over that of the empty place: 0 is a perfect drawing.
        moments: the action whose pose fits each drawing best.
    """

    answers: dict[str, str | None]
    look: Attributes
    unexplained: float
    moments: tuple[Action, ...]


@dataclass(frozen=True)
class Where:
    """Where a creature is looked for, in px."""

    column: int  # of its middle
    ground: int = 46  # row of its feet
    height: float = 0.97 * HEIGHT
    aside: int = 10  # this far to both sides
    up: int = 8
    down: int = 3


IN_REFERENCE = Where(FRAME_WIDTH_PX // 2, ground=47, height=46.5, aside=4, up=2, down=2)


@dataclass(frozen=True)
class _Fit:
    """A creature in the frames: its look, and per drawing its step and its place (shift down and right, px)."""

    look: Attributes
    action: Action
    action_lead: float
    moments: tuple[Action, ...]
    steps: tuple[int, ...]
    shifts: tuple[tuple[int, int], ...]
    error: float
    scale: float = 1.0


def read_clip(clip: np.ndarray, casts: dict[Side, Sequence[int]]) -> dict[Side, Reading | None]:
    """What is seen in each slot; None: nobody.

    Args:
        clip: uint8 [F, H, W, 3].
        casts: per slot some identities. The search starts from the one that fits best.
    """
    drawings = _drawings_of(clip)
    empty = find_place(drawings)
    return {side: _Search(drawings, empty, Where(int(SIDES[side]))).read(cast) for side, cast in casts.items()}


def read_reference(picture: np.ndarray) -> Reading | None:
    """The creature of a reference, uint8 [H, W, 3] on white; its action is that of the pose."""
    drawings = picture[None].astype(np.float32)
    reading = _Search(drawings, np.full_like(drawings[0], 255.0), IN_REFERENCE).read([])
    return reading and replace(reading, answers=reading.answers | {"action": reading.moments[0]})


def is_occupied(clip: np.ndarray, side: Side) -> bool:
    """Whether anybody stands in a slot: its middle is not that of the empty place."""
    drawings = _drawings_of(clip)
    middle = int(SIDES[side])
    wrong = np.square(drawings - find_place(drawings)).sum(-1)[:, 12:44, middle - 6 : middle + 6] > CEILING / 2
    return float(wrong.mean()) > OCCUPIED


def _drawings_of(clip: np.ndarray) -> np.ndarray:
    """The last frame of each drawing: float32 [D, H, W, 3]."""
    return clip[[0, *range(HOLD, len(clip), HOLD)]].astype(np.float32)


@functools.cache
def _empty_places() -> list[np.ndarray]:
    return [paint_place(ScenePlan((), name, True, horizon, (-20.0, -20.0))) for name in PLACES for horizon in (28.0, 30.0, 32.0)]


def find_place(drawings: np.ndarray) -> np.ndarray:
    """The empty place that is most like the frames: float32 [H, W, 3]."""
    errors = [np.minimum(np.square(drawings - place).sum(-1), CEILING).sum() for place in _empty_places()]
    return _empty_places()[int(np.argmin(errors))]


class _Search:
    """The search for one creature in frames [D, H, W, 3]. Figures are drawn on a small canvas and compared at each place."""

    def __init__(self, drawings: np.ndarray, empty: np.ndarray, where: Where) -> None:
        self.where = where
        around = [(_MARGIN, _MARGIN)] * 2 + [(0, 0)]
        self.frames, self.empty = np.pad(drawings, [(0, 0), *around]), np.pad(empty, around)
        self.known = np.pad(np.ones(empty.shape[:2], np.float32), around[:2])
        self.base = np.minimum(np.square(self.empty - self.frames).sum(-1), CEILING) * self.known  # [D, H', W']
        middle = where.column + _MARGIN
        self.total = float(self.base[..., middle - _REACH : middle + _REACH].sum()) or 1.0
        unit = max(_SCALES) * where.height / HEIGHT
        self.size = math.ceil(42 * unit), 2 * math.ceil(20 * unit)

    def read(self, cast: Sequence[int]) -> Reading | None:
        looks = [attributes_of(identity) for identity in dict.fromkeys(cast)]
        fit = self._find(looks) if looks else None
        if fit is None or fit.error > STRANGER:
            forms = looks[:1] or [replace(_ANYBODY, shape=shape) for shape in SHAPES]
            strangers = [_recolour(look, colour) for look in forms for colour in self._main_colours()]
            fit = self._find([*looks, *strangers])
        if looks and fit.error > NOBODY:
            return None
        leads: dict[str, float] = {}
        for sweep in range(_SWEEPS):
            before = fit
            fit, leads = self._sweep(fit, from_nothing=not (looks or sweep))
            if fit.look == before.look:
                break
            again = self._find([fit.look])  # with the new look an action is told more surely
            fit = again if again.error <= fit.error + 1e-3 else fit
        if (unexplained := self._unexplained(fit)) > ABSENT:
            return None
        values, leads = asdict(fit.look) | {"action": fit.action}, leads | {"action": fit.action_lead}
        answers = {name: value if leads[name] >= UNSURE else None for name, value in values.items()}
        return Reading(answers, fit.look, unexplained, fit.moments)

    def _main_colours(self) -> list[str]:
        """The three main colours that most pixels in front of the empty place are nearest to."""
        columns = slice(self.where.column + _MARGIN - 14, self.where.column + _MARGIN + 14)
        pixels = self.frames[:, :, columns][self.base[:, :, columns] > CEILING / 8]
        palette = np.array([*COLOURS.values(), (255, 255, 255)], np.float32)
        nearest = np.square(pixels[:, None] - palette).sum(-1).argmin(1)
        order = np.argsort(-np.bincount(nearest, minlength=len(palette))[: len(MAIN_COLOURS)], kind="stable")
        return [MAIN_COLOURS[number] for number in order[:3]]

    def _figures(self, looks: Sequence[Attributes], moments: Sequence[tuple[Action, int]], scale: float = 1.0) -> Figures:
        """Each look in each moment, its feet near the bottom of the canvas."""
        identities = [identity_of(look) for look in looks for _ in moments]
        poses = [Pose(action, step) for _ in looks for action, step in moments]
        place = (self.size[1] / 2, self.size[0] - 1, scale * self.where.height)
        return draw(identities, poses, *(np.full(len(poses), value) for value in place), self.size)

    def _left(
        self, alpha: np.ndarray, colour: np.ndarray, drawing: int, shift: tuple[int, int], thin: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        """Squared differences at a place: of figures [N, h, w], and of the empty place [h, w]."""
        top = self.where.ground + shift[0] - self.size[0] + 1 + _MARGIN
        left = self.where.column + shift[1] - self.size[1] // 2 + _MARGIN
        under = np.s_[top : top + self.size[0] : thin, left : left + self.size[1] : thin]
        drawn = self.empty[under] * (1 - alpha[..., None]) + colour
        error = np.square(drawn - self.frames[drawing][under]).sum(-1)
        return np.minimum(error, CEILING, out=error) * self.known[under], self.base[drawing][under]

    def _gain(self, alpha: np.ndarray, colour: np.ndarray, drawing: int, shift: tuple[int, int], thin: int = 1) -> np.ndarray:
        """The change of the squared difference as a share of the empty place's: [N]; negative is better than nobody."""
        left, empty = self._left(alpha, colour, drawing, shift, thin)
        return (left.sum((1, 2)) - empty.sum()) * thin**2 / self.total

    def _find(self, looks: Sequence[Attributes]) -> _Fit:
        """The best look, place and action."""
        figures = self._figures(looks, _MOMENTS)
        alpha, colour = figures.alpha[:, ::_GRID, ::_GRID], figures.colour[:, ::_GRID, ::_GRID]
        down = range(self.where.down, -self.where.up - 1, -_GRID)
        right = range(self.where.aside, -self.where.aside - 1, -_GRID)
        gains = [
            [[self._gain(alpha, colour, drawing, (i, j), _GRID) for j in right] for i in down]
            for drawing in range(len(self.frames))
        ]
        tables = np.moveaxis(np.array(gains), -1, 1)  # [D, look x moment, down, right]
        places = np.array(down), np.array(right)
        fits = [_follow(look, table, *places) for look, table in zip(looks, np.split(tables, len(looks), 1), strict=True)]
        return self._refine(min(fits, key=lambda fit: fit.error))

    def _refine(self, fit: _Fit) -> _Fit:
        """Tries sizes and places close to those of a fit."""
        fits = []
        for scale in _SCALES:
            figures = self._figures([fit.look], [(fit.action, step) for step in fit.steps], scale)
            shifts, error = [], 1.0
            for drawing, (down, right) in enumerate(fit.shifts):
                one = slice(drawing, drawing + 1)
                near = [(down + i, right + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
                near = [(i, j) for i, j in near if -self.where.up <= i <= self.where.down and abs(j) <= self.where.aside]
                gains = [float(self._gain(figures.alpha[one], figures.colour[one], drawing, place)[0]) for place in near]
                shifts.append(near[int(np.argmin(gains))])
                error += min(gains)
            fits.append(replace(fit, shifts=tuple(shifts), error=error, scale=scale))
        return min(fits, key=lambda each: each.error)

    def _unexplained(self, fit: _Fit) -> float:
        """Squared difference on the creature's own pixels over that of the empty place."""
        figures = self._figures([fit.look], [(fit.action, step) for step in fit.steps], fit.scale)
        drawn = nothing = 0.0
        for drawing, shift in enumerate(fit.shifts):
            alpha = figures.alpha[drawing]
            left, empty = self._left(alpha[None], figures.colour[drawing][None], drawing, shift)
            drawn, nothing = drawn + float((left[0] * alpha).sum()), nothing + float((empty * alpha).sum())
        return drawn / (nothing or 1.0)

    def _sweep(self, fit: _Fit, *, from_nothing: bool) -> tuple[_Fit, dict[str, float]]:
        """The two colours of the body take their best values together, then each attribute in turn; and the leads."""
        bodies = [_recolour(fit.look, colour) for colour in (self._main_colours() if from_nothing else MAIN_COLOURS)]
        if from_nothing:
            bodies = [replace(look, pattern=pattern) for look in bodies for pattern in PATTERNS]
        pairs = [replace(look, second_colour=colour) for look in bodies for colour in COLOURS if colour != look.main_colour]
        fit, _ = self._choose(pairs, fit)
        leads = {}
        for name in ATTRIBUTE_NAMES:
            fit, leads[name] = self._choose(_variants(fit.look, name), fit)
        return fit, leads

    def _choose(self, looks: Sequence[Attributes], fit: _Fit) -> tuple[_Fit, float]:
        """The best look at the places of a fit, and its lead over the next."""
        figures = self._figures(looks, [(fit.action, step) for step in fit.steps], fit.scale)
        count = len(fit.steps)
        gains = [
            self._gain(figures.alpha[drawing::count], figures.colour[drawing::count], drawing, shift)
            for drawing, shift in enumerate(fit.shifts)
        ]
        errors = 1 + np.sum(gains, axis=0)
        best, rival = np.argsort(errors)[:2]
        return replace(fit, look=looks[int(best)], error=float(errors[best])), float(errors[rival] - errors[best])


def _follow(look: Attributes, table: np.ndarray, down: np.ndarray, right: np.ndarray) -> _Fit:
    """The best action and path of one look, from the gains of its moments at all places: [D, moment, down, right]."""
    paths = []
    for number, action in enumerate(ACTIONS):
        for phase in (0, 1):
            steps = tuple((drawing + phase) % 2 for drawing in range(len(table)))
            maps = [table[drawing, 2 * number + step] for drawing, step in enumerate(steps)]
            paths.append((*_best_path(action, steps, maps, down, right), action, steps))
    gain, shifts, action, steps = min(paths, key=lambda path: path[0])
    rival = min(path[0] for path in paths if path[2] != action)
    free = tuple(_MOMENTS[int(number)][0] for number in table.min((2, 3)).argmin(1))
    return _Fit(look, action, rival - gain, free, steps, shifts, 1 + gain)


def _recolour(look: Attributes, colour: str) -> Attributes:
    """The look in another main colour; what had that colour gets the old one."""
    others = {name: look.main_colour for name in ("second_colour", "third_colour") if getattr(look, name) == colour}
    return replace(look, main_colour=colour, **others)


def _variants(look: Attributes, name: str) -> list[Attributes]:
    values = vocabularies(look.main_colour)[name]
    return [_recolour(look, value) if name == "main_colour" else replace(look, **{name: value}) for value in values]


def _best_path(
    action: Action, steps: Sequence[int], maps: Sequence[np.ndarray], down: np.ndarray, right: np.ndarray
) -> tuple[float, tuple[tuple[int, int], ...]]:
    """The best places of one action: (gain, per drawing the shift down and right in px), by dynamic programming.

    Walkers move by 2 to 4 px from drawing to drawing, others by at most 2. Who jumps is up in step 1 and down in step 0.

    Args:
        maps: per drawing the gain at each place [rows, columns], whose shifts are ``down`` and ``right``.
    """
    lines, rows = [], []
    for step, values in zip(steps, maps, strict=True):
        allowed = down <= -3 if action == "jumping" and step and len(maps) > 1 else down >= -2
        masked = np.where(allowed[:, None], values, np.inf)
        lines.append(masked.min(0))
        rows.append(masked.argmin(0))
    direction = {"walking left": 1, "walking right": -1}.get(action, 0)  # of the column's number: a larger one is further left
    moves = (direction, 2 * direction) if direction else (-1, 0, 1)
    gain, path = np.array(lines[-1]), [np.arange(len(right))]
    for line in lines[-2::-1]:  # backwards: the best way on from each column
        onward = np.full((len(moves), len(right)), np.inf)
        for number, move in enumerate(moves):
            start = np.arange(max(0, -move), min(len(right), len(right) - move))
            onward[number, start] = gain[start + move]
        chosen = onward.argmin(0)
        path.insert(0, np.clip(np.arange(len(right)) + np.array(moves)[chosen], 0, len(right) - 1))
        gain = line + onward.min(0)
    column, shifts = int(np.argmin(gain)), []
    best = float(gain[column])
    for number in range(len(lines)):
        shifts.append((int(down[rows[number][column]]), int(right[column])))
        column = int(path[number][column])
    return best, tuple(shifts)
