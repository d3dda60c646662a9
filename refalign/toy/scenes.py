"""What happens in one shot: who appears on which side, what each does, where; and its caption.

A caption says sides, actions, mostly the place, and shape and main colour of six creatures in ten. It never says the hidden
attributes (pattern, other colours, headwear, eyes), which a model can only take from the references. Sides tell which words
belong to which reference.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from refalign.errors import ConfigError
from refalign.toy.drawing import ACTIONS, FRAME_HEIGHT_PX, FRAME_WIDTH_PX, HEIGHT, Action, Pose
from refalign.toy.identities import (
    LIKENESSES,
    MAIN_COLOURS,
    SHAPES,
    Likeness,
    Split,
    attributes_of,
    likeness_of,
    sample_companion,
    sample_identity,
)

NUM_FRAMES, FPS = 9, 16
HOLD = 4
"""Frames that each drawing after the first is shown for: the frames of one latent frame of the VAE show one drawing."""
NUM_DRAWINGS = 1 + (NUM_FRAMES - 1) // HOLD
MAX_SUBJECTS = 3
NAMED_SHARE, PLACE_NAMED_SHARE, BLINK_SHARE = 0.6, 0.85, 0.2
STRIDE_PX = 3.5
"""Of a walker, from one drawing to the next."""
JUMP = 5.5
"""Height of a jump in units of `refalign.toy.drawing.HEIGHT`."""

Side = Literal["on the left", "in the middle", "on the right"]
SIDES: dict[Side, float] = {"on the left": 15.5, "in the middle": 40.0, "on the right": 64.5}
"""Side -> the column (px) around which its subject moves."""
_SIDES_OF: dict[int, tuple[tuple[Side, ...], ...]] = {
    1: tuple((side,) for side in SIDES),
    2: (("on the left", "on the right"),),
    3: (tuple(SIDES),),
}
VERBS: dict[Action, str] = {
    "standing": "stands",
    "jumping": "jumps",
    "walking left": "walks left",
    "walking right": "walks right",
    "waving": "waves",
}
Place = Literal["meadow", "night", "beach", "snow", "sea"]
PLACES: dict[Place, str] = {
    "meadow": "in a meadow",
    "night": "at night",
    "beach": "on a beach",
    "snow": "in the snow",
    "sea": "under water",
}
_COLOURS: dict[Place, tuple[tuple[int, int, int], ...]] = {
    "meadow": ((168, 214, 250), (128, 196, 96), (255, 244, 190)),
    "night": ((28, 28, 66), (66, 62, 106), (246, 240, 206)),
    "beach": ((252, 214, 170), (226, 190, 124), (255, 248, 214)),
    "snow": ((206, 220, 238), (240, 244, 250), (252, 250, 240)),
    "sea": ((54, 132, 180), (34, 88, 128), (120, 186, 220)),
}
"""Sky, ground, and sun, moon or bubble: RGB."""


@dataclass(frozen=True)
class SubjectPlan:
    """One creature's part in a shot."""

    identity: int
    side: Side
    action: Action
    named: bool  # the caption says its shape and main colour, else "a creature"
    x_px: float  # column around which it moves
    ground_px: float
    height_px: float
    blinks: bool  # in the second drawing
    phase: int  # 0 or 1, of the step in the first drawing

    def pose(self, drawing: int) -> Pose:
        """Its pose in drawing 0, 1 or 2."""
        step = (drawing + self.phase) % 2
        return Pose(self.action, step, JUMP * step if self.action == "jumping" else 0.0, self.blinks and drawing == 1)

    def column_px(self, drawing: int) -> float:
        """Where it is in drawing 0, 1 or 2."""
        direction = {"walking left": -1, "walking right": 1}.get(self.action, 0)
        return self.x_px + direction * STRIDE_PX * (drawing - 1)


@dataclass(frozen=True)
class ScenePlan:
    """One shot."""

    subjects: tuple[SubjectPlan, ...]  # from left to right, in the order of the caption
    place: Place
    place_named: bool
    horizon_px: float
    light_px: tuple[float, float]  # column and row of sun, moon or bubble

    @property
    def identities(self) -> tuple[int, ...]:
        return tuple(subject.identity for subject in self.subjects)

    @property
    def likeness(self) -> Likeness | None:
        """Of the first two subjects; None for a subject alone."""
        return likeness_of(*self.identities[:2]) if len(self.subjects) > 1 else None


def make_scene(
    seed: int | Sequence[int],
    *,
    split: Split = "train",
    cast: Sequence[int] | None = None,
    num_subjects: int | None = None,
    likeness: Likeness | None = None,
) -> ScenePlan:
    """Draws a scene; the same arguments give the same scene.

    Args:
        split: of the identities, if ``cast`` is None.
        cast: identities that appear, 1 to ``MAX_SUBJECTS``, in any order.
        num_subjects: default: one in 30%, two in 50%, three in 20% of the scenes.
        likeness: of the first two of a drawn cast; by default each equally often.

    Raises:
        ConfigError: ``cast`` is empty or too large.
    """
    rng = np.random.default_rng(seed)
    if cast is None:
        cast = _make_cast(rng, split, num_subjects or int(rng.choice([1, 2, 3], p=[0.3, 0.5, 0.2])), likeness)
    if not 1 <= len(cast) <= MAX_SUBJECTS:
        raise ConfigError(f"a scene with {len(cast)} subjects; expected 1 to {MAX_SUBJECTS}.")
    sides = _SIDES_OF[len(cast)]
    cast = [cast[int(place)] for place in rng.permutation(len(cast))]
    subjects = [_plan(rng, *member) for member in zip(cast, sides[int(rng.integers(len(sides)))], strict=True)]
    return ScenePlan(
        subjects=tuple(subjects),
        place=get_args(Place)[int(rng.integers(len(PLACES)))],
        place_named=bool(rng.random() < PLACE_NAMED_SHARE),
        horizon_px=float(rng.uniform(27, 33)),
        light_px=(float(rng.uniform(8, 72)), float(rng.uniform(5, 11))),
    )


def _make_cast(rng: np.random.Generator, split: Split, num_subjects: int, likeness: Likeness | None) -> list[int]:
    """Draws identities: the second has ``likeness`` to the first, a third is unlike the first or has its shape."""
    cast = [sample_identity(rng, split)]
    for member in range(1, num_subjects):
        tier = (likeness or LIKENESSES[int(rng.integers(3))]) if member == 1 else LIKENESSES[int(rng.integers(2))]
        cast.append(sample_companion(rng, cast[0], tier, split, taken=set(cast)))
    return cast


def _plan(rng: np.random.Generator, identity: int, side: Side) -> SubjectPlan:
    return SubjectPlan(
        identity=identity,
        side=side,
        action=ACTIONS[int(rng.integers(len(ACTIONS)))],
        named=bool(rng.random() < NAMED_SHARE),
        x_px=SIDES[side] + float(rng.uniform(-1.5, 1.5)),
        ground_px=float(rng.uniform(45, 47)),
        height_px=HEIGHT * float(rng.uniform(0.94, 1.0)),
        blinks=bool(rng.random() < BLINK_SHARE),
        phase=int(rng.integers(2)),
    )


def paint_place(plan: ScenePlan) -> np.ndarray:
    """The empty place: float32 [H, W, 3]."""
    sky, ground, light = (np.array(colour, np.float32) for colour in _COLOURS[plan.place])
    rows, columns = np.mgrid[:FRAME_HEIGHT_PX, :FRAME_WIDTH_PX].astype(np.float32) + 0.5
    picture = sky * (1.06 - 0.12 * rows / FRAME_HEIGHT_PX)[..., None]
    for cover, colour in (
        (np.clip(5.5 - np.hypot(columns - plan.light_px[0], rows - plan.light_px[1]), 0, 1), light),
        (np.clip(rows - plan.horizon_px + 1.5 * np.sin(columns / 12.0), 0, 1), ground),
    ):
        picture += cover[..., None] * (colour - picture)
    return np.clip(picture, 0, 255)


def subject_phrase(identity: int, *, named: bool) -> str:
    """``a red round creature`` or ``a creature``."""
    if not named:
        return "a creature"
    attributes = attributes_of(identity)
    article = "an" if attributes.main_colour[0] in "aeiou" else "a"
    return f"{article} {attributes.main_colour} {attributes.shape} creature"


def make_caption(plan: ScenePlan) -> str:
    """``On the left a red round creature stands and on the right a creature walks left at night.``"""
    clauses: list[str] = []
    spoken: set[str] = set()
    for subject in plan.subjects:
        phrase = subject_phrase(subject.identity, named=subject.named)
        if phrase in spoken:
            phrase = "another " + phrase.split(" ", 1)[1]
        spoken.add(phrase)
        clauses.append(f"{subject.side} {phrase} {VERBS[subject.action]}")
    text = " and ".join([", ".join(clauses[:-1]), clauses[-1]]) if len(clauses) > 1 else clauses[0]
    place = f" {PLACES[plan.place]}" if plan.place_named else ""
    return f"{text[0].upper()}{text[1:]}{place}."


@dataclass(frozen=True)
class Asked:
    """What a caption says of one creature; shape and colour are None if it says "a creature"."""

    side: Side
    action: Action
    shape: str | None
    main_colour: str | None


_NAMED = rf"({'|'.join(MAIN_COLOURS)}) ({'|'.join(SHAPES)})"
_CLAUSE = re.compile(rf"({'|'.join(SIDES)}) (?:an?|another)(?: {_NAMED})? creature ({'|'.join(VERBS.values())})")


def parse_caption(caption: str) -> list[Asked]:
    """What a caption of `make_caption` says, from left to right; empty for other texts."""
    actions: dict[str, Action] = {verb: action for action, verb in VERBS.items()}
    found = _CLAUSE.findall(caption.lower())
    return [Asked(side, actions[verb], shape or None, colour or None) for side, colour, shape, verb in found]


def caption_tier(plan: ScenePlan) -> str:
    """``named`` (shape and colour of all), ``mixed`` or ``plain`` (of none)."""
    named = [subject.named for subject in plan.subjects]
    return "named" if all(named) else "mixed" if any(named) else "plain"


def caption_words() -> list[str]:
    """The toy tokenizer's vocabulary: every word of the captions, lower case, in a fixed order."""
    phrases = ["a an another and , . creature", *SIDES, *MAIN_COLOURS, *SHAPES, *VERBS.values(), *PLACES.values()]
    return list(dict.fromkeys(word for phrase in phrases for word in phrase.split()))
