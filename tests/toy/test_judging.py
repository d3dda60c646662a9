"""The judges' arithmetic: cutting crops, pairing readings with what was asked for, chance, likeness without networks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from refalign.errors import ArtifactError
from refalign.toy.drawing import render_reference
from refalign.toy.identities import HIDDEN_ATTRIBUTES, SPOKEN_ATTRIBUTES
from refalign.toy.judges import CROP_PX, MARGIN, VOCABULARIES, Judge, Reader, Reading, cut_crops, encode_truth
from refalign.toy.measure_generation import assign, make_cases, score, shuffle_truth, without_references
from refalign.toy.measures import colour_likeness, edge_likeness
from refalign.toy.train_judges import make_batch

QUESTIONS = (*SPOKEN_ATTRIBUTES, *HIDDEN_ATTRIBUTES, "pose")


def make_reading(truth: dict[str, int]) -> Reading:
    """A reader that is sure, and right."""
    probabilities = {name: np.eye(len(words) + 1)[truth[name]] for name, words in VOCABULARIES.items()}
    return Reading({name: VOCABULARIES[name][index] for name, index in truth.items()}, probabilities)


def test_a_crop_is_the_square_around_the_box_with_its_margin() -> None:
    frames = np.zeros((2, 96, 96, 3), np.uint8)
    frames[:, 30:50, 20:40] = 200
    boxes = np.array([[20, 30, 40, 50], [24, 30, 36, 50]])
    crops = cut_crops(frames, boxes)
    inside = (crops[..., 0] > 100).sum((1, 2)) / CROP_PX**2
    assert crops.shape == (2, CROP_PX, CROP_PX, 3)
    np.testing.assert_allclose(inside, 1 / MARGIN**2, rtol=0.05)  # the second box is narrow: its height decides


def test_crops_at_the_edge_continue_it() -> None:
    frames = np.full((1, 96, 96, 3), 77, np.uint8)
    assert (cut_crops(frames, np.array([[-10, -10, 20, 20]])) == 77).all()


def test_readings_are_paired_with_the_subjects_they_fit_best() -> None:
    truths = [encode_truth(identity, pose) for identity, pose in ((5, "walking"), (70_000, "sleeping"), (123, "waving"))]
    readings = [make_reading(truth) for truth in truths]
    assert assign(list(reversed(readings)), truths, QUESTIONS) == readings
    assert assign([readings[2]], truths, QUESTIONS) == [None, None, readings[2]]
    assert assign([], truths, QUESTIONS) == [None, None, None]


@pytest.mark.parametrize("num_subjects", [1, 2, 3])
def test_perfect_clips_score_one_and_shuffled_ones_chance(num_subjects: int) -> None:
    cases = make_cases(40, num_subjects=num_subjects)
    readings = [[make_reading(encode_truth(s.identity, s.pose)) for s in case.plan.subjects] for case in cases]
    assert all(value == 1 for value in score(cases, readings, QUESTIONS).values())
    by_chance = score(shuffle_truth(cases), readings, QUESTIONS)
    for name in HIDDEN_ATTRIBUTES:
        assert by_chance[name] < 0.65, name
    assert all(value == 0 for value in score(cases, [[] for _ in cases], QUESTIONS).values())


def test_without_references_only_named_subjects_are_asked_for_their_colour() -> None:
    cases = without_references(make_cases(30, num_subjects=1))
    nothing_named = [case for case in cases if not case.plan.subjects[0].named]
    assert nothing_named
    assert np.isnan(score(nothing_named, [[] for _ in nothing_named], ("shape",))["shape"])


def test_references_show_another_pose_than_the_scene() -> None:
    for case in make_cases(5, num_subjects=2):
        assert len(case.references) == 2 and all(picture.shape == (96, 96, 3) for picture in case.references)
        assert case.references[0].mean() != case.references[1].mean()


def test_training_batches_are_a_function_of_the_step_and_hold_something_to_abstain_from() -> None:
    crops, answers = make_batch(3, None)
    again, same = make_batch(3, None)
    assert torch.equal(crops, again) and all(torch.equal(answers[name], same[name]) for name in answers)
    assert crops.shape[1:] == (4, 3, CROP_PX, CROP_PX) and set(answers) == set(VOCABULARIES)
    for name, words in VOCABULARIES.items():
        assert answers[name][-1] == len(words), "the last subject is made unreadable"


def test_reader_answers_every_question_and_reads_clips_of_one_frame() -> None:
    torch.manual_seed(0)
    judge = Judge(Reader())
    readings = judge.read(np.zeros((2, 1, CROP_PX, CROP_PX, 3), np.uint8))
    assert len(readings) == 2 and set(readings[0].answers) == set(VOCABULARIES)
    for name, words in VOCABULARIES.items():
        assert readings[0].probabilities[name].shape == (len(words) + 1,)
        assert readings[0].probabilities[name].sum() == pytest.approx(1, abs=1e-5)


def test_a_missing_or_foreign_reader_is_named(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    with pytest.raises(ArtifactError, match=r"model\.safetensors: not found; python -m refalign\.toy\.train_judges"):
        Judge.load(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ArtifactError, match="not a reader of this version"):
        Judge.load(tmp_path)


def test_likeness_without_networks() -> None:
    one, turned, other = (
        render_reference(identity, pose) for identity, pose in ((11, "standing"), (11, "dancing"), (99_000, "standing"))
    )
    masks = [(picture < 250).any(2) for picture in (one, turned, other)]
    for likeness in (colour_likeness, edge_likeness):
        assert likeness(one, masks[0], one, masks[0]) == pytest.approx(1)
    assert colour_likeness(one, masks[0], turned, masks[1]) > colour_likeness(one, masks[0], other, masks[2])
