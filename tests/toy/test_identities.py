"""Identities: two spellings of one thing, disjoint splits, nothing decisive hidden."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from refalign.errors import ConfigError
from refalign.toy.drawing import ACTIONS, Pose
from refalign.toy.identities import (
    ATTRIBUTE_NAMES,
    COLOURS,
    HIDDEN_ATTRIBUTES,
    LIKENESSES,
    NUM_IDENTITIES,
    SPLIT_SHARES,
    attributes_of,
    identity_of,
    likeness_of,
    sample_companion,
    sample_identity,
    split_of,
    vocabularies,
)
from refalign.toy.rendering import render_references


def test_index_and_attributes_are_inverse():
    chosen = [0, NUM_IDENTITIES - 1, *range(1, NUM_IDENTITIES - 1, 7)]
    assert [identity_of(attributes_of(identity)) for identity in chosen] == chosen


def test_unknown_identities_and_attributes_are_refused():
    for identity in (-1, NUM_IDENTITIES):
        with pytest.raises(ConfigError, match="does not exist"):
            attributes_of(identity)
    with pytest.raises(ConfigError, match="pattern 'tartan'"):
        identity_of(replace(attributes_of(0), pattern="tartan"))
    with pytest.raises(ConfigError, match="second_colour 'red'"):
        identity_of(replace(attributes_of(0), main_colour="red", second_colour="red"))


def test_other_colours_differ_from_the_main_one():
    words = vocabularies("red")
    assert tuple(words) == ATTRIBUTE_NAMES
    assert set(words["second_colour"]) == set(COLOURS) - {"red"} and set(words["third_colour"]) == set(COLOURS) - {"red", "black"}


def test_splits_are_disjoint_and_have_their_shares():
    counts = Counter(split_of(identity) for identity in range(NUM_IDENTITIES))
    assert sum(counts.values()) == NUM_IDENTITIES and counts["train"] >= 20_000
    for split, share in SPLIT_SHARES.items():
        assert counts[split] / NUM_IDENTITIES == pytest.approx(share / 20, abs=0.005)
    rng = np.random.default_rng(0)
    assert all(split_of(sample_identity(rng, "heldout")) == "heldout" for _ in range(200))


@pytest.mark.parametrize("action", ACTIONS)
def test_every_attribute_shows_in_every_action(action):
    """Any two values of an attribute, all else alike, are at least 40 pixels apart by more than 40 of 255."""
    rng = np.random.default_rng(1)
    for name in ATTRIBUTE_NAMES:
        for step in (0, 1):
            look = attributes_of(sample_identity(rng, "train"))
            others = (look.second_colour, look.third_colour) if name == "main_colour" else ()
            values = [value for value in vocabularies(look.main_colour)[name] if value not in others]
            cast = [identity_of(replace(look, **{name: value})) for value in values]
            pictures = render_references(cast, [Pose(action, step)] * len(cast)).astype(int)
            apart = (np.abs(pictures[:, None] - pictures[None]).max(-1) > 40).sum((2, 3))
            first, second = np.triu_indices(len(cast), 1)
            assert apart[first, second].min() >= 40, (name, step, look, apart)


def test_companions_stand_in_the_tier_asked_for_and_differ_in_hidden_attributes():
    rng = np.random.default_rng(2)
    for likeness in LIKENESSES:
        for _ in range(5):
            identity = sample_identity(rng, "train")
            other = sample_companion(rng, identity, likeness, "train")
            one, two = attributes_of(identity), attributes_of(other)
            assert likeness_of(identity, other) == likeness and split_of(other) == "train"
            assert sum(getattr(one, name) != getattr(two, name) for name in HIDDEN_ATTRIBUTES) >= 3
            assert likeness != "unlike" or one.main_colour != two.main_colour
