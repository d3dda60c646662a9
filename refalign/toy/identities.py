"""The creatures of the toy world: seven visible attributes, one index per identity, three disjoint splits.

An identity is a mixed-radix number over the attributes. Every attribute is seen in every pose.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Set
from dataclasses import astuple, dataclass, fields
from typing import Literal, get_args

import numpy as np

from refalign.errors import ConfigError

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 48, 48),
    "orange": (248, 146, 30),
    "yellow": (252, 222, 64),
    "green": (60, 168, 70),
    "cyan": (70, 205, 222),
    "blue": (48, 88, 214),
    "purple": (142, 66, 190),
    "pink": (250, 150, 200),
    "black": (52, 52, 60),
}
"""Name -> RGB in [0, 255]. Black is a second colour only."""

MAIN_COLOURS = tuple(COLOURS)[:8]
SHAPES = ("round", "square", "triangular", "diamond-shaped")
PATTERNS = ("half", "belt", "belly", "spots")
HEADWEAR = ("top hat", "party hat", "rabbit ears", "bobble")
EYES = ("one", "two")

Split = Literal["train", "judges", "heldout"]
Likeness = Literal["unlike", "same shape", "same shape and colour"]
LIKENESSES: tuple[Likeness, ...] = get_args(Likeness)
SPLIT_SHARES: dict[Split, int] = {"heldout": 3, "judges": 3, "train": 14}
"""Twentieths of all identities. The judge is measured on those of ``judges``."""


@dataclass(frozen=True)
class Attributes:
    """What one creature looks like. Captions say the first two at most."""

    shape: str
    main_colour: str
    second_colour: str  # of the pattern
    pattern: str
    headwear: str
    third_colour: str  # of headwear and feet
    eyes: str


ATTRIBUTE_NAMES = tuple(field.name for field in fields(Attributes))
SPOKEN_ATTRIBUTES = ("shape", "main_colour")
HIDDEN_ATTRIBUTES = tuple(name for name in ATTRIBUTE_NAMES if name not in SPOKEN_ATTRIBUTES)
_RADICES = (len(SHAPES), len(MAIN_COLOURS), len(COLOURS) - 1, len(PATTERNS), len(HEADWEAR), len(MAIN_COLOURS) - 1, len(EYES))
NUM_IDENTITIES = math.prod(_RADICES)


def vocabularies(main_colour: str) -> dict[str, tuple[str, ...]]:
    """Attribute -> the values it can have on a creature of ``main_colour``, whose other colours differ from it."""
    others = tuple(name for name in COLOURS if name != main_colour)
    return {
        "shape": SHAPES,
        "main_colour": MAIN_COLOURS,
        "second_colour": others,
        "pattern": PATTERNS,
        "headwear": HEADWEAR,
        "third_colour": tuple(name for name in others if name in MAIN_COLOURS),
        "eyes": EYES,
    }


@functools.cache
def attributes_of(identity: int) -> Attributes:
    """Index in [0, NUM_IDENTITIES) -> attributes."""
    if not 0 <= identity < NUM_IDENTITIES:
        raise ConfigError(f"identity {identity} does not exist; expected 0 .. {NUM_IDENTITIES - 1}.")
    digits = [int(digit) for digit in np.unravel_index(identity, _RADICES)]
    words = vocabularies(MAIN_COLOURS[digits[1]])
    return Attributes(**{name: words[name][digit] for name, digit in zip(ATTRIBUTE_NAMES, digits, strict=True)})


def identity_of(attributes: Attributes) -> int:
    """Attributes -> index, the inverse of ``attributes_of``."""
    words = vocabularies(attributes.main_colour)
    digits = []
    for name, value in zip(ATTRIBUTE_NAMES, astuple(attributes), strict=True):
        if value not in words[name]:
            raise ConfigError(f"{name} {value!r} does not exist here; expected one of {', '.join(words[name])}.")
        digits.append(words[name].index(value))
    return int(np.ravel_multi_index(digits, _RADICES))


def split_of(identity: int) -> Split:
    """The split of an identity, by a fixed hash of its index."""
    # Fibonacci hashing; the high bits are used because the low ones still carry the last attributes.
    slot = ((identity + 1) * 2654435761 % 2**32 >> 12) % sum(SPLIT_SHARES.values())
    return [split for split, share in SPLIT_SHARES.items() for _ in range(share)][slot]


def likeness_of(first: int, second: int) -> Likeness:
    """What two identities have in common of what a caption can say."""
    one, other = attributes_of(first), attributes_of(second)
    if one.shape != other.shape:
        return "unlike"
    return "same shape and colour" if one.main_colour == other.main_colour else "same shape"


def sample_identity(rng: np.random.Generator, split: Split, *, taken: Set[int] = frozenset()) -> int:
    """A uniform draw among the identities of ``split`` that are not ``taken``."""
    while True:
        identity = int(rng.integers(NUM_IDENTITIES))
        if split_of(identity) == split and identity not in taken:
            return identity


def sample_companion(
    rng: np.random.Generator, identity: int, likeness: Likeness, split: Split, *, taken: Set[int] = frozenset()
) -> int:
    """An identity with the given likeness to ``identity``.

    The two differ in at least three hidden attributes, so that they are easily told apart, and unlike ones also in main colour.
    """
    mine = attributes_of(identity)
    while True:
        other = sample_identity(rng, split, taken={*taken, identity})
        theirs = attributes_of(other)
        differing = sum(getattr(mine, name) != getattr(theirs, name) for name in HIDDEN_ATTRIBUTES)
        same_colour = mine.main_colour == theirs.main_colour
        if likeness_of(identity, other) == likeness and differing >= 3 and not (likeness == "unlike" and same_colour):
            return other
