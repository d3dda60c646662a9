"""Identities: two spellings of one thing, disjoint splits, nothing decisive hidden."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from refalign.errors import ConfigError
from refalign.toy import identities as world
from refalign.toy.drawing import POSES, render_reference
from refalign.toy.identities import (
    ATTRIBUTE_NAMES,
    HIDDEN_ATTRIBUTES,
    LIKENESSES,
    NUM_IDENTITIES,
    attributes_of,
    identity_of,
    likeness_of,
    sample_companion,
    sample_identity,
    split_of,
)


def test_index_and_attributes_are_inverse():
    for identity in [0, NUM_IDENTITIES - 1, *range(0, NUM_IDENTITIES, 977)]:
        assert identity_of(attributes_of(identity)) == identity


def test_unknown_identities_and_attributes_are_refused():
    with pytest.raises(ConfigError, match="does not exist"):
        attributes_of(NUM_IDENTITIES)
    with pytest.raises(ConfigError, match="pattern 'tartan'"):
        identity_of(replace(attributes_of(0), pattern="tartan"))


def test_splits_are_disjoint_and_large_enough():
    counts = Counter(split_of(identity) for identity in range(NUM_IDENTITIES))
    assert sum(counts.values()) == NUM_IDENTITIES and set(counts) == {"train", "judges", "heldout"}
    assert counts["train"] >= 20_000 and min(counts["judges"], counts["heldout"]) >= 5_000
    rng = np.random.default_rng(0)
    assert all(split_of(sample_identity(rng, "heldout")) == "heldout" for _ in range(200))


def test_every_attribute_value_occurs_in_every_split_about_equally():
    """Else held-out identities would test another world than the one trained on."""
    for split in world.SPLIT_SHARES:
        members = [attributes_of(identity) for identity in range(0, NUM_IDENTITIES, 11) if split_of(identity) == split]
        for name in ("shape", "main_colour", "pattern", "eyes", "headwear", "limbs"):
            counts = Counter(getattr(attributes, name) for attributes in members)
            assert max(counts.values()) < 1.3 * min(counts.values()), (split, name, counts)


@pytest.mark.parametrize("pose", POSES)
def test_every_attribute_shows_in_every_pose(pose):
    """Changing any one attribute changes the picture by more than an outline's worth of pixels."""
    rng = np.random.default_rng(1)
    for name in ATTRIBUTE_NAMES:
        attributes = attributes_of(sample_identity(rng, "train"))
        values = {
            "shape": world.SHAPES,
            "main_colour": world.MAIN_COLOURS,
            "second_colour": world.second_colours(attributes.main_colour),
            "pattern": world.PATTERNS,
            "eyes": world.EYES,
            "headwear": world.HEADWEAR,
            "limbs": world.LIMBS,
        }[name]
        if name == "main_colour":
            values = [value for value in values if attributes.second_colour in world.second_colours(value)]
        pictures = [render_reference(identity_of(replace(attributes, **{name: value})), pose).astype(int) for value in values]
        for first in range(len(pictures)):
            for second in range(first):
                changed = (np.abs(pictures[first] - pictures[second]).max(-1) > 40).mean()
                assert changed > 0.01, (name, values[first], values[second], attributes)


def test_companions_stand_in_the_tier_asked_for_and_differ_in_hidden_attributes():
    rng = np.random.default_rng(2)
    for likeness in LIKENESSES:
        for _ in range(5):
            identity = sample_identity(rng, "train")
            other = sample_companion(rng, identity, likeness, "train")
            assert likeness_of(identity, other) == likeness and split_of(other) == "train"
            one, two = attributes_of(identity), attributes_of(other)
            assert sum(getattr(one, name) != getattr(two, name) for name in HIDDEN_ATTRIBUTES) >= 3
            assert likeness != "unlike" or one.main_colour != two.main_colour
