"""Separability: arithmetic on features that are known, and the Transformer's own tokens."""

import numpy as np
import pytest
import torch
from make_run import make_shards

from refalign.config.presets import toy_tiny
from refalign.evaluation.separability import block_features, collect_references, measure, project
from refalign.models.wan import load_transformer
from refalign.shards.reader import ShardIndex


def make_features(spread, subjects=6, each=4):
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(subjects, 16))
    features = np.concatenate([centre + spread * rng.normal(size=(each, 16)) for centre in centres])
    return features, [subject for subject in range(subjects) for _ in range(each)]


def test_subjects_that_lie_apart_are_found_and_mixed_ones_are_not():
    apart, mixed = measure(*make_features(0.05)), measure(*make_features(50.0))
    assert apart.retrieval == 1 and apart.gap > 0.9 and apart.silhouette > 0.8
    assert apart.chance == mixed.chance == pytest.approx(3 / 23)
    assert abs(mixed.gap) < 0.1 and mixed.retrieval < 0.5


def test_a_subject_with_one_reference_is_no_query_but_can_be_mistaken_for():
    features, subjects = make_features(0.05)
    alone = measure(np.concatenate([features, features[:1] + 1e-3]), [*subjects, "stranger"])
    assert 0.8 < alone.retrieval < 1


@pytest.mark.parametrize("subjects", [["a", "b", "c"], ["a", "a", "a"]])
def test_what_cannot_be_measured_is_said(subjects):
    with pytest.raises(ValueError, match="two subjects"):
        measure(np.eye(3), subjects)


def test_the_picture_has_a_place_for_each_reference_and_repeats():
    features, _ = make_features(0.1)
    places = project(features)
    assert places.shape == (24, 2) and np.array_equal(places, project(features))


def test_pictures_that_samples_pair_are_of_one_subject(tmp_path):
    cross_pair = {"a": "b", "b": "c", "d": "e"}
    shards = make_shards(tmp_path, {"train": ["a", "b", "c", "d", "f"]}, cross_pair=cross_pair)
    references = collect_references(ShardIndex.open(shards.folder, "train"), 5, 3)
    assert references is not None
    assert references.subjects == ("a-s0",) * 3 + ("d-s0",) * 2, "f has one picture, a is b is c"
    assert references.latents.shape == (5, 16, 12, 20) and references.foreground.shape == (5, 60)
    few = collect_references(ShardIndex.open(shards.folder, "train"), 5, 2)
    assert few is not None and few.subjects == ("a-s0",) * 2 + ("d-s0",) * 2
    alone = make_shards(tmp_path / "alone", {"train": ["a", "f"]}, cross_pair={"a": "b"})
    assert collect_references(ShardIndex.open(alone.folder, "train"), 5, 3) is None


def test_features_are_of_the_reference_and_of_its_foreground():
    transformer = load_transformer(toy_tiny().models.base).eval()
    latents = torch.randn(2, 16, 12, 20, generator=torch.Generator().manual_seed(1))
    prompt = torch.zeros(1, 3, transformer.config.text_dim)
    half = torch.zeros(2, 60)
    half[:, :30] = 1
    whole, upper, nothing = (
        block_features(transformer, latents, weight, prompt_embeds=prompt, num_latent_frames=3)
        for weight in (torch.ones(2, 60), half, torch.zeros(2, 60))
    )
    assert len(whole) == len(transformer.blocks) and whole[0].shape[0] == 2
    assert not np.allclose(whole[0][0], whole[0][1]) and not np.allclose(whole[0], upper[0])
    np.testing.assert_array_equal(whole[3], nothing[3])
