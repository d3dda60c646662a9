"""Reads a clip by drawing it again: a creature is a known function of its attributes, so the best drawing names them.

For each slot of a scene (left, middle, right) creatures are drawn in every pose and compared with the frames at places nearby.
Then each attribute in turn takes all its values, the others staying as they are, and the drawing with the smallest squared
difference wins. No network is involved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from refalign.toy.drawing import ACTIONS, FRAME_HEIGHT_PX, FRAME_WIDTH_PX, HEIGHT, Action, Figures, Pose, draw
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

HALF_WIDTH = 20
"""Of the window (px) that is compared."""
CEILING = 90.0**2
"""Squared difference (over the three channels) at which a pixel counts as simply wrong."""
ABSENT = 0.75
"""Over the pixels that a creature covers: its squared difference over that of the empty place, above which nobody is there.
Measured: 0.1 to 0.2 on drawn clips, up to 0.5 under noise of 30 or blur of 1.5 px, above 0.9 where nobody is."""
STRANGER = 0.6
"""The same, from which other colours than those of the cast are tried."""
OCCUPIED = 0.5
"""Share of the middle of a slot that differs from the empty place where somebody stands."""
UNSURE = 0.004
"""Lead of the best value over the next, in shares of what the empty place leaves unexplained, below which it is not said."""
_ANYBODY = Attributes("round", "red", "blue", "belly", "top hat", "green", "two")
"""Where the search begins when nobody is named."""
_MOMENTS = tuple((action, step) for action in ACTIONS for step in (0, 1))
_SWEEPS = 3
_SCALES = (1.0, 0.96, 1.04)
_THIN, _GRID = 2, 2
"""To find a creature's place every second pixel is compared, at every second place; what is found is refined."""


@dataclass(frozen=True)
class Reading:
    """What is seen in one slot.

    Attributes:
        answers: attribute -> value, or None where two values fit alike; "action" among them.
        look: the drawing that fits best, sure or not.
        unexplained: squared difference that is left where the creature is, over that of the empty place: 0 is a perfect drawing.
        moments: the action whose pose fits each drawing best, wherever the creature is.
        x_px: column of its middle in each drawing.
    """

    answers: dict[str, str | None]
    look: Attributes
    unexplained: float
    moments: tuple[Action, ...]
    x_px: tuple[float, ...]


@dataclass(frozen=True)
class _Fit:
    """A creature in the frames: its look, and per drawing its moment and the place (row and column shift in px)."""

    look: Attributes
    action: Action
    action_lead: float
    moments: tuple[Action, ...]
    steps: tuple[int, ...]
    shifts: tuple[tuple[int, int], ...]
    error: float
    scale: float = 1.0


@dataclass(frozen=True)
class Where:
    """Where a creature is looked for.

    Attributes:
        column: middle of the place, px.
        ground, height: row of the feet and height of the creature, px.
        aside, up, down: how far from there, px.
    """

    column: int
    ground: int = 46
    height: float = 0.97 * HEIGHT
    aside: int = 10
    up: int = 8
    down: int = 3


IN_REFERENCE = Where(FRAME_WIDTH_PX // 2, ground=47, height=46.5, aside=4, up=2, down=2)


def read_clip(clip: np.ndarray, casts: dict[Side, Sequence[int]]) -> dict[Side, Reading | None]:
    """What is seen in each named slot; None: nobody.

    Args:
        clip: uint8 [F, H, W, 3].
        casts: per slot the identities to begin with: the search goes on from the one that fits best, so that a few of
            different looks are enough.
    """
    drawings = _drawings_of(clip)
    empty = find_place(drawings)
    return {side: _Search(drawings, empty, Where(int(SIDES[side]))).read(cast) for side, cast in casts.items()}


def read_reference(picture: np.ndarray) -> Reading | None:
    """The creature of a reference, uint8 [H, W, 3] on white; its action is that of the pose."""
    drawings = picture[None].astype(np.float32)
    search = _Search(drawings, np.full_like(drawings[0], 255.0), IN_REFERENCE)
    reading = search.read([])
    return reading and replace(reading, answers=reading.answers | {"action": reading.moments[0]})


def is_occupied(clip: np.ndarray, side: Side) -> bool:
    """Whether somebody stands in a slot, whoever it is: the middle of it is not the empty place's."""
    drawings = _drawings_of(clip)
    middle = int(SIDES[side])
    wrong = np.square(drawings - find_place(drawings)).sum(-1)[:, 12:44, middle - 6 : middle + 6] > CEILING / 2
    return float(wrong.mean()) > OCCUPIED


def _drawings_of(clip: np.ndarray) -> np.ndarray:
    """The last frame of each drawing: float32 [D, H, W, 3]."""
    return clip[[0, *range(HOLD, len(clip), HOLD)]].astype(np.float32)


def find_place(drawings: np.ndarray) -> np.ndarray:
    """The empty place that explains most of the frames: float32 [H, W, 3]."""
    places = [
        paint_place(ScenePlan((), name, True, horizon, (-20.0, -20.0))) for name in PLACES for horizon in (28.0, 30.0, 32.0)
    ]
    errors = [np.minimum(np.square(drawings - place).sum(-1), CEILING).sum() for place in places]
    return places[int(np.argmin(errors))]


class _Search:
    """The search in one place of some frames [D, H, W, 3]."""

    def __init__(self, drawings: np.ndarray, empty: np.ndarray, where: Where) -> None:
        self.where = where
        columns = range(where.column - HALF_WIDTH - where.aside, where.column + HALF_WIDTH + where.aside)
        inside = np.clip(columns, 0, FRAME_WIDTH_PX - 1)
        self.known = np.array([0 <= column < FRAME_WIDTH_PX for column in columns], np.float32)
        self.frames, self.empty = drawings[:, :, inside], empty[:, inside]
        self.base = self._capped(self.empty[None] - self.frames)  # [D, H, W']

    def _capped(self, difference: np.ndarray) -> np.ndarray:
        return np.minimum(np.square(difference).sum(-1), CEILING) * self.known

    def read(self, cast: Sequence[int]) -> Reading | None:
        looks = [attributes_of(identity) for identity in dict.fromkeys(cast)]
        fit = min((self._place(look) for look in looks), key=lambda each: each.error, default=None)
        if fit is None or fit.error > STRANGER:
            forms = [looks[0]] if looks else [replace(_ANYBODY, shape=shape) for shape in SHAPES]
            others = [replace_colour(look, colour) for look in forms for colour in MAIN_COLOURS]
            fits = [self._place(look) for look in others] + ([fit] if fit else [])
            fit = min(fits, key=lambda each: each.error)
        leads: dict[str, float] = {}
        for sweep in range(_SWEEPS):
            before = fit
            fit, leads = self._sweep(fit, from_nothing=not (looks or sweep))
            if fit.look == before.look:
                break
            again = self._place(fit.look)
            fit = again if again.error <= fit.error else fit
        unexplained = self._compare(fit)
        if unexplained > ABSENT:
            return None
        answers: dict[str, str | None] = {
            name: value if leads[name] >= UNSURE else None for name, value in asdict(fit.look).items()
        }
        answers["action"] = fit.action if fit.action_lead >= UNSURE else None
        return Reading(
            answers, fit.look, unexplained, fit.moments, tuple(float(self.where.column + shift[1]) for shift in fit.shifts)
        )

    def _figures(self, looks: Sequence[Attributes], moments: Sequence[tuple[Action, int]], scale: float = 1.0) -> Figures:
        """Each look in each moment at the middle of a window that is larger than the frame by the reach."""
        where = self.where
        size = FRAME_HEIGHT_PX + where.up + where.down, 2 * (HALF_WIDTH + 2 * where.aside)
        pairs = [(identity_of(look), Pose(action, step)) for look in looks for action, step in moments]
        count = len(pairs)
        return draw(
            [identity for identity, _ in pairs],
            [pose for _, pose in pairs],
            np.full(count, size[1] / 2),
            np.full(count, where.ground + where.down),
            np.full(count, scale * where.height),
            size,
        )

    def _place(self, look: Attributes) -> _Fit:
        """Where and in which action a look fits best."""
        table = self._error_table(self._figures([look], _MOMENTS))  # [D, moment, rows, columns]
        results = []
        for number, action in enumerate(ACTIONS):
            for phase in (0, 1):
                steps = tuple((drawing + phase) % 2 for drawing in range(len(table)))
                maps = [table[drawing, 2 * number + step] for drawing, step in enumerate(steps)]
                results.append((*_follow(action, steps, maps, self.where), action, steps))
        results.sort(key=lambda result: result[0])
        error, shifts, action, steps = results[0]
        rival = min(result[0] for result in results if result[2] != action)
        total = float(self.base.sum()) or 1.0
        lead = (rival - error) / total
        free = tuple(_MOMENTS[int(number)][0] for number in table.min((2, 3)).argmin(1))
        return self._refine(_Fit(look, action, lead, free, steps, shifts, error / total))

    def _error_table(self, figures: Figures) -> np.ndarray:
        """What stays unexplained with each figure at every ``_GRID``-th place: [drawings, figures, rows, columns]."""
        height, width = self.frames.shape[1:3]
        frames, empty = self.frames[:, ::_THIN, ::_THIN], self.empty[::_THIN, ::_THIN]
        known = self.known[::_THIN] * _THIN**2
        # A window that starts lower on the figure's canvas shows the creature higher up.
        rows, columns = (range(0, count + 1, _GRID) for count in (self.where.up + self.where.down, 2 * self.where.aside))
        table = np.empty((len(frames), len(figures.alpha), len(rows), len(columns)), np.float32)
        for i, row in enumerate(rows):
            for j, column in enumerate(columns):
                window = np.s_[:, row : row + height : _THIN, column : column + width : _THIN]
                drawn = empty * (1 - figures.alpha[window][..., None]) + figures.colour[window]
                for drawing, frame in enumerate(frames):
                    errors = np.minimum(np.square(drawn - frame).sum(-1), CEILING)
                    table[drawing, :, i, j] = (errors * known).sum((1, 2))
        return table

    def _refine(self, fit: _Fit) -> _Fit:
        """Makes the creature a little smaller or larger, and moves it by a pixel each way, where that explains more."""
        best = fit
        for scale in _SCALES:
            figures = self._figures([fit.look], [(fit.action, step) for step in fit.steps], scale)
            shifts, error = [], 0.0
            for drawing, (down, right) in enumerate(fit.shifts):
                near = [(down + i, right + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
                inside = [place for place in near if self._reaches(place)]
                errors = [self._error_at(figures, drawing, drawing, place) for place in inside]
                shifts.append(inside[int(np.argmin(errors))])
                error += min(errors)
            error /= float(self.base.sum()) or 1.0
            if scale == _SCALES[0] or error < best.error:
                best = replace(fit, shifts=tuple(shifts), error=error, scale=scale)
        return best

    def _reaches(self, place: tuple[int, int]) -> bool:
        return -self.where.up <= place[0] <= self.where.down and abs(place[1]) <= self.where.aside

    def _error_at(self, figures: Figures, index: int, drawing: int, place: tuple[int, int]) -> float:
        height, width = self.frames.shape[1:3]
        top, left = self.where.down - place[0], self.where.aside - place[1]
        window = np.s_[index, top : top + height, left : left + width]
        drawn = self.empty * (1 - figures.alpha[window][..., None]) + figures.colour[window]
        return float(self._capped(drawn - self.frames[drawing]).sum())

    def _compare(self, fit: _Fit) -> float:
        """Where the creature is drawn, what it leaves unexplained over what the empty place does: neighbours do not count."""
        figures = self._figures([fit.look], [(fit.action, step) for step in fit.steps], fit.scale)
        height, width = self.frames.shape[1:3]
        drawn_error = empty_error = 0.0
        for drawing, (down, right) in enumerate(fit.shifts):
            top, left = self.where.down - down, self.where.aside - right
            window = np.s_[drawing, top : top + height, left : left + width]
            alpha = figures.alpha[window]
            drawn = self.empty * (1 - alpha[..., None]) + figures.colour[window]
            drawn_error += float((self._capped(drawn - self.frames[drawing]) * alpha).sum())
            empty_error += float((self.base[drawing] * alpha).sum())
        return drawn_error / (empty_error or 1.0)

    def _sweep(self, fit: _Fit, *, from_nothing: bool) -> tuple[_Fit, dict[str, float]]:
        """Each attribute in turn takes its best value, after the two colours of the body together."""
        leads = {}
        pairs = [replace(other, second_colour=second) for other in _variants(fit.look, "main_colour") for second in COLOURS]
        pairs = [look for look in pairs if look.second_colour != look.main_colour]
        if from_nothing:
            pairs = [replace(look, pattern=pattern) for look in pairs for pattern in PATTERNS]
        best = int(np.argmin(errors := self._errors(pairs, fit)))
        fit = replace(fit, look=pairs[best], error=float(errors[best]))
        for name in ATTRIBUTE_NAMES:
            looks = _variants(fit.look, name)
            errors = self._errors(looks, fit)
            order = np.argsort(errors)
            fit = replace(fit, look=looks[int(order[0])], error=float(errors[order[0]]))
            leads[name] = float(errors[order[1]] - errors[order[0]])
        return fit, leads

    def _errors(self, looks: Sequence[Attributes], fit: _Fit) -> np.ndarray:
        """What stays unexplained by each look at the places of a fit."""
        figures = self._figures(looks, [(fit.action, step) for step in fit.steps], fit.scale)
        count = len(fit.steps)
        errors = [
            sum(self._error_at(figures, number * count + drawing, drawing, place) for drawing, place in enumerate(fit.shifts))
            for number in range(len(looks))
        ]
        return np.array(errors) / (float(self.base.sum()) or 1.0)


def replace_colour(look: Attributes, colour: str) -> Attributes:
    """The look in another main colour; what had that colour gets the one that is free."""
    if colour == look.main_colour:
        return look
    others = {name: look.main_colour for name in ("second_colour", "third_colour") if getattr(look, name) == colour}
    return replace(look, main_colour=colour, **others)


def _variants(look: Attributes, name: str) -> list[Attributes]:
    values = vocabularies(look.main_colour)[name]
    if name == "main_colour":
        return [replace_colour(look, value) for value in values]
    return [replace(look, **{name: value}) for value in values]


def _follow(
    action: Action, steps: Sequence[int], maps: Sequence[np.ndarray], where: Where
) -> tuple[float, tuple[tuple[int, int], ...]]:
    """The best places of one action: (unexplained, per drawing the shift down and right in px).

    Walkers move by 2 to 4 px from drawing to drawing, others by at most 2; who jumps is up in step 1 and down in step 0.
    """
    rows, columns = maps[0].shape
    down = where.down - _GRID * np.arange(rows)  # of each row of the map
    right = where.aside - _GRID * np.arange(columns)
    lines, places = [], []
    for step, values in zip(steps, maps, strict=True):
        allowed = down <= -3 if action == "jumping" and step and len(maps) > 1 else down >= -2
        masked = np.where(allowed[:, None], values, np.inf)
        lines.append(masked.min(0))
        places.append(masked.argmin(0))
    direction = {"walking left": 1, "walking right": -1}.get(action, 0)  # of the index: a larger one is further left
    moves = (direction, 2 * direction) if direction else (-1, 0, 1)
    best: tuple[float, tuple[tuple[int, int], ...]] = (float("inf"), ())
    for start in range(columns):
        column, total, shifts = start, 0.0, []
        for drawing, line in enumerate(lines):
            if drawing:
                choices = [column + move for move in moves if 0 <= column + move < columns]
                if not choices:
                    total = float("inf")
                    break
                column = min(choices, key=lambda each: float(line[each]))
            total += float(line[column])
            shifts.append((int(down[places[drawing][column]]), int(right[column])))
        if total < best[0]:
            best = total, tuple(shifts)
    return best
