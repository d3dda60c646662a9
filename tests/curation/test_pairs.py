import numpy as np
import pytest

from refalign.config import PairsConfig
from refalign.curation.matching import match_subjects
from refalign.stages.pairs import assign_splits
from tests.oracles.pairs import match_subjects_slowly


@pytest.mark.parametrize("block", [1, 5, 2048])
@pytest.mark.parametrize("seed", range(4))
def test_match_subjects_equals_loops(seed, block, monkeypatch):
    rng = np.random.default_rng(seed)
    clips = np.repeat(np.arange(7), rng.integers(1, 4, 7))
    identities = rng.normal(size=(4, 8))
    embeddings = identities[rng.integers(0, 4, len(clips))] + 0.3 * rng.normal(size=(len(clips), 8))
    embeddings = (embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)).astype(np.float32)
    config = PairsConfig(min_similarity=0.6, max_similarity=0.98, max_references_per_subject=2)
    monkeypatch.setattr("refalign.curation.matching._BLOCK", block)
    ours = list(zip(*(column.tolist() for column in match_subjects(embeddings, clips, config))))
    loops = match_subjects_slowly(embeddings, clips, min_similarity=0.6, max_similarity=0.98, limit=2)
    assert [pair[:2] for pair in ours] == [pair[:2] for pair in loops]
    assert [pair[2] for pair in ours] == pytest.approx([pair[2] for pair in loops], abs=1e-5)
    assert len(ours) > 3


def test_the_same_picture_twice_is_no_pair():
    embeddings = np.eye(2, dtype=np.float32)[[0, 0]]
    assert match_subjects(embeddings, np.array([0, 1]), PairsConfig())[0].tolist() == []


def test_one_clip_or_none_has_no_pairs():
    assert match_subjects(np.zeros((0, 4), np.float32), np.array([], int), PairsConfig())[0].tolist() == []
    assert match_subjects(np.eye(2, dtype=np.float32), np.array([0, 0]), PairsConfig())[0].tolist() == []


def test_splits_depend_on_the_group_alone_and_hold_out_at_least_one():
    many = [f"channel-{index}" for index in range(2000)]
    splits = assign_splits(many, 0.1)
    assert 0.07 < list(splits.values()).count("validation") / 2000 < 0.13
    more = assign_splits([*many, "new"], 0.1)
    assert all(more[group] == split for group, split in splits.items())
    assert list(assign_splits(["a", "b", "c"], 0.001).values()).count("validation") == 1
    assert assign_splits(["only"], 0.5) in ({"only": "train"}, {"only": "validation"})
    assert set(assign_splits(["a", "b", "c"], 0.0).values()) == {"train"}
