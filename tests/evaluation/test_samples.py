"""Which samples and which pictures are evaluated."""

import pytest
from make_run import make_picture, make_shards, make_subjects

from refalign.errors import ArtifactError
from refalign.evaluation.samples import choose_samples
from refalign.io.images import decode_image, on_white


def test_held_out_samples_with_pictures_from_other_clips(tmp_path):
    subjects = make_subjects(tmp_path, ["a", "b", "c", "d"])
    shards = make_shards(tmp_path, {"train": ["a", "b"], "validation": ["c", "d"]}, cross_pair={"c": "d"})
    samples, split = choose_samples(shards.folder, subjects.folder, count=2, seed=7)
    assert split == "validation" and [sample.key for sample in samples] == ["c", "d"]
    assert [sample.seed for sample in samples] == [7, 8]
    (first,), (second,) = (sample.references for sample in samples)
    pngs = samples[0].pngs | samples[1].pngs
    assert (first.subject_id, first.kind, second.subject_id, second.kind) == ("d-s0", "cross_pair", "d-s0", "in_pair")
    assert (decode_image(pngs["reference-c-0.png"]) == on_white(make_picture(3, alpha=True))).all()
    assert (decode_image(pngs["target-c-0.png"]) == on_white(make_picture(2, alpha=True))).all()
    assert samples[1].targets == [None] and set(samples[1].pngs) == {"reference-d-0.png"}


def test_samples_are_spread_over_the_split(tmp_path):
    clips = [f"clip{number}" for number in range(9)]
    shards, subjects = make_shards(tmp_path, {"validation": clips}), make_subjects(tmp_path, clips)
    samples, _ = choose_samples(shards.folder, subjects.folder, count=3, seed=0)
    assert [sample.key for sample in samples] == ["clip0", "clip4", "clip8"]


def test_without_a_held_out_split_the_training_split_is_named(tmp_path):
    shards, subjects = make_shards(tmp_path, {"train": ["a"], "validation": []}), make_subjects(tmp_path, ["a"])
    samples, split = choose_samples(shards.folder, subjects.folder, count=4, seed=0)
    assert (len(samples), split) == (1, "train")


def test_shards_of_another_subjects_step_are_refused(tmp_path):
    shards, subjects = make_shards(tmp_path, {"train": ["a"]}), make_subjects(tmp_path, ["z"])
    with pytest.raises(ArtifactError, match="no picture of subject a-s0"):
        choose_samples(shards.folder, subjects.folder, count=1, seed=0)


def test_no_sample_at_all_is_one_line(tmp_path):
    shards, subjects = make_shards(tmp_path, {"train": []}), make_subjects(tmp_path, ["z"])
    with pytest.raises(ArtifactError, match="no samples to evaluate"):
        choose_samples(shards.folder, subjects.folder, count=1, seed=0)
