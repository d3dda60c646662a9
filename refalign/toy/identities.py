"""Who lives in the sprite world: seven visible attributes, one index per identity, three disjoint splits.

An identity is a mixed-radix number over the attributes, so that index and attributes are two spellings of one thing and no table
is stored. Every attribute changes the picture in every pose: two different identities never look alike.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass, fields
from typing import Literal

import numpy as np

from refalign.errors import ConfigError

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 48, 48),
    "orange": (248, 146, 30),
    "yellow": (252, 222, 64),
    "green": (66, 172, 74),
    "cyan": (70, 208, 222),
    "blue": (48, 92, 214),
    "purple": (146, 72, 190),
    "pink": (250, 150, 200),
    "white": (250, 250, 250),
    "black": (52, 52, 60),
}
"""Name -> RGB in [0, 255]. The last two occur as second colour only: a white body would vanish on a white reference."""

MAIN_COLOURS = tuple(COLOURS)[:8]
SHAPES = ("round", "square", "triangular", "tall", "star-shaped", "fluffy")
PATTERNS = ("stripes", "bars", "dots", "belly", "checks")
EYES = ("one", "two", "three", "stalks")
HEADWEAR = ("top hat", "party cone", "crown", "antennae", "cat ears", "bunny ears")
LIMBS = ("legs", "wheels", "tentacles", "spring")
NUM_SECOND_COLOURS = 6
"""Second colours each main colour goes with: the six most distant ones, so that a pattern always shows."""

Split = Literal["train", "judges", "heldout"]
Likeness = Literal["unlike", "same shape", "same shape and colour"]
LIKENESSES: tuple[Likeness, ...] = ("unlike", "same shape", "same shape and colour")
SPLIT_SHARES: dict[Split, int] = {"heldout": 3, "judges": 3, "train": 14}
"""Twentieths of all identities; ``judges`` is kept apart for the networks that grade generated videos."""


def second_colours(main_colour: str) -> tuple[str, ...]:
    """The second colours that ``main_colour`` is combined with, most distant first."""
    main = np.array(COLOURS[main_colour], dtype=float)
    distance = {name: float(np.linalg.norm(main - rgb)) for name, rgb in COLOURS.items() if name != main_colour}
    return tuple(sorted(distance, key=lambda name: -distance[name])[:NUM_SECOND_COLOURS])


@dataclass(frozen=True)
class Attributes:
    """What one creature looks like; all seven are visible, only the first two are ever spoken."""

    shape: str
    main_colour: str
    second_colour: str
    pattern: str
    eyes: str
    headwear: str
    limbs: str


ATTRIBUTE_NAMES = tuple(field.name for field in fields(Attributes))
SPOKEN_ATTRIBUTES = ("shape", "main_colour")
HIDDEN_ATTRIBUTES = tuple(name for name in ATTRIBUTE_NAMES if name not in SPOKEN_ATTRIBUTES)
_RADICES = (len(SHAPES), len(MAIN_COLOURS), NUM_SECOND_COLOURS, len(PATTERNS), len(EYES), len(HEADWEAR), len(LIMBS))
NUM_IDENTITIES = math.prod(_RADICES)


def attributes_of(identity: int) -> Attributes:
    """Index in [0, NUM_IDENTITIES) -> attributes."""
    if not 0 <= identity < NUM_IDENTITIES:
        raise ConfigError(f"identity {identity} does not exist; expected 0 .. {NUM_IDENTITIES - 1}.")
    digits = [int(digit) for digit in np.unravel_index(identity, _RADICES)]
    main = MAIN_COLOURS[digits[1]]
    return Attributes(
        shape=SHAPES[digits[0]],
        main_colour=main,
        second_colour=second_colours(main)[digits[2]],
        pattern=PATTERNS[digits[3]],
        eyes=EYES[digits[4]],
        headwear=HEADWEAR[digits[5]],
        limbs=LIMBS[digits[6]],
    )


def identity_of(attributes: Attributes) -> int:
    """Attributes -> index, the inverse of ``attributes_of``."""
    vocabularies = (SHAPES, MAIN_COLOURS, second_colours(attributes.main_colour), PATTERNS, EYES, HEADWEAR, LIMBS)
    digits = []
    for name, value, vocabulary in zip(ATTRIBUTE_NAMES, astuple(attributes), vocabularies, strict=True):
        if value not in vocabulary:
            raise ConfigError(f"{name} {value!r} does not exist here; expected one of {', '.join(vocabulary)}.")
        digits.append(vocabulary.index(value))
    return int(np.ravel_multi_index(digits, _RADICES))


def split_of(identity: int) -> Split:
    """The split an identity belongs to, for ever: a fixed hash of its index."""
    # Fibonacci hashing; the high bits are used because the low ones still carry the last attributes.
    slot = ((identity + 1) * 2654435761 % 2**32 >> 12) % sum(SPLIT_SHARES.values())
    for split, share in SPLIT_SHARES.items():
        if slot < share:
            return split
        slot -= share
    raise AssertionError("the shares cover every slot")


def likeness_of(first: int, second: int) -> Likeness:
    """How much two identities have in common among what a caption can say."""
    one, other = attributes_of(first), attributes_of(second)
    if one.shape != other.shape:
        return "unlike"
    return "same shape and colour" if one.main_colour == other.main_colour else "same shape"


def sample_identity(rng: np.random.Generator, split: Split, *, taken: frozenset[int] | set[int] = frozenset()) -> int:
    """A uniform draw among the identities of ``split`` that are not ``taken``."""
    while True:
        identity = int(rng.integers(NUM_IDENTITIES))
        if split_of(identity) == split and identity not in taken:
            return identity


def sample_companion(
    rng: np.random.Generator, identity: int, likeness: Likeness, split: Split, *, taken: frozenset[int] | set[int] = frozenset()
) -> int:
    """An identity that stands to ``identity`` in the given tier of likeness.

    Alike companions differ in at least three of the attributes that are never spoken, so that the pair can be told apart at a
    glance; unlike ones differ in shape and in main colour.
    """
    attributes = attributes_of(identity)
    while True:
        other = sample_identity(rng, split, taken={*taken, identity})
        candidate = attributes_of(other)
        same_colour = candidate.main_colour == attributes.main_colour
        if likeness_of(identity, other) != likeness or (likeness == "unlike" and same_colour):
            continue
        if sum(getattr(candidate, name) != getattr(attributes, name) for name in HIDDEN_ATTRIBUTES) >= 3:
            return other
