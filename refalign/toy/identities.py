"""Who lives in the toy world: seven visible attributes, one index per identity, three disjoint splits.

An identity is a mixed-radix number over the attributes, so that index and attributes are two spellings of one thing and no table
is stored. Every attribute is seen in every pose: two different identities never look alike.
"""

from __future__ import annotations

import functools
import math
from dataclasses import astuple, dataclass, fields
from typing import Literal

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
LIKENESSES: tuple[Likeness, ...] = ("unlike", "same shape", "same shape and colour")
SPLIT_SHARES: dict[Split, int] = {"heldout": 3, "judges": 3, "train": 14}
"""Twentieths of all identities; the judge's limits are measured on those of ``judges``."""


@dataclass(frozen=True)
class Attributes:
    """What one creature looks like; all seven are visible, only the first two are ever spoken."""

    shape: str
    main_colour: str
    second_colour: str
    """Of the pattern."""
    pattern: str
    headwear: str
    third_colour: str
    """Of headwear and feet."""
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

    The two differ in at least three of the attributes that are never spoken, so that they can be told apart at a glance; unlike
    ones differ in shape and in main colour too.
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
