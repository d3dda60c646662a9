"""Scores that must not flatter: own references against those the video was not given."""

import numpy as np
import pytest

from refalign.evaluation.fidelity import best_match, make_windows, measure_copy_paste, score_video
from refalign.evaluation.results import average_scores


def test_windows_cover_the_frame_and_have_one_size():
    frames = np.zeros((9, 48, 80, 3), np.uint8)
    frames[:, -1, -1] = 255  # the far corner must be inside some window
    windows = make_windows(frames, 32)
    assert windows.shape[1:] == (32, 32, 3) and windows.dtype == np.uint8
    assert (windows.reshape(len(windows), -1).max(axis=1) > 0).sum() >= 6


def test_a_subject_is_found_where_it_fills_a_window():
    """A stand-in for an encoder: mean colour. The ball fills a corner, so only a window there has its colour."""

    def embed(images):
        mean = images.reshape(len(images), -1, 3).mean(axis=1) - 128
        return mean / np.linalg.norm(mean, axis=1, keepdims=True)

    frame = np.full((96, 96, 3), 30, np.uint8)
    frame[48:, 48:] = (250, 140, 20)
    windows = embed(make_windows(np.stack([frame] * 3), 32))
    own = embed(np.full((1, 8, 8, 3), (250, 140, 20), np.uint8))
    other = embed(np.full((1, 8, 8, 3), (20, 140, 250), np.uint8))
    assert best_match(own, windows)[0] == pytest.approx(1.0)
    assert best_match(other, windows)[0] < 0.5


def test_own_above_other_is_a_half_for_references_that_cannot_be_told_apart():
    assert score_video([0.9, 0.9], [0.9]).own_above_other == 0.5
    assert score_video([0.9], [0.1, 0.2]).own_above_other == 1.0
    random = np.random.default_rng(0).uniform(size=(200, 2))
    assert np.mean([score_video([own], [other]).own_above_other for own, other in random]) == pytest.approx(0.5, abs=0.1)


def test_what_was_not_measured_is_absent_not_zero():
    alone = score_video([0.8], [])
    assert alone.chance is None and alone.own_above_other is None
    assert average_scores([alone]) == {"fidelity": 0.8}
    assert average_scores([alone, score_video([0.6], [0.5])]) == {"fidelity": 0.7, "chance": 0.5, "own_above_other": 1.0}


def test_copy_paste_looks_at_the_window_that_shows_the_subject():
    target, given, elsewhere = np.eye(3)
    halfway = (target + given) / np.sqrt(2)
    for shown, expected in ((target, -1.0), (given, 1.0), (halfway, 0.0)):
        assert measure_copy_paste(np.stack([elsewhere, shown]), given, target) == pytest.approx(expected, abs=1e-6)


def test_copy_paste_runs_from_the_scene_to_the_picture():
    target, given = np.array([1.0, 0.0]), np.array([np.cos(0.8), np.sin(0.8)])
    made = [np.array([[np.cos(angle), np.sin(angle)]]) for angle in (0.0, 0.2, 0.4, 0.6, 0.8)]
    np.testing.assert_allclose([measure_copy_paste(each, given, target) for each in made], [-1, -0.5, 0, 0.5, 1], atol=1e-6)
    assert -1 <= measure_copy_paste(made[2], given, given) <= 1, "a picture that is the target"
