"""Each kind of confusion is told from the others; copy-paste lies between the scene and the picture."""

import numpy as np
import pytest

from refalign.evaluation.confusion import agreement, copy_paste, find_fates, interference

ANT, BEE, CAT = (1, 2, 3, 4, 5), (1, 7, 8, 9, 10), (11, 12, 13, 14, 10)


@pytest.mark.parametrize(
    ("shown", "fates"),
    [
        ([ANT, BEE], ["own", "own"]),
        ([BEE, ANT], ["swap", "swap"]),
        ([ANT, ANT], ["own", "dominance"]),
        ([(1, 2, 3, 9, 10), BEE], ["blending", "own"]),
        ([ANT, (0, 0, 0, 0, 0)], ["own", "drift"]),
        ([None, BEE], ["missing", "own"]),
        ([BEE, None], ["dominance", "missing"]),
        ([(1, 2, 3, 4, 0), (0, 7, 8, 9, 10)], ["own", "own"]),
    ],
)
def test_two_subjects(shown, fates):
    assert find_fates(shown, [ANT, BEE]) == fates


def test_three_subjects_and_one_alone():
    assert find_fates([BEE, CAT, ANT], [ANT, BEE, CAT]) == ["swap", "swap", "swap"]
    assert find_fates([ANT, CAT, BEE], [ANT, BEE, CAT]) == ["own", "swap", "swap"]
    assert find_fates([ANT], [ANT]) == ["own"]
    assert find_fates([BEE], [ANT]) == ["drift"]
    assert find_fates([None], [ANT]) == ["missing"]


def test_interference_takes_off_what_the_subjects_have_in_common():
    np.testing.assert_allclose(agreement([ANT, BEE], [ANT, BEE]), [[1, 0.2], [0.2, 1]])
    np.testing.assert_allclose(interference([ANT, BEE], [ANT, BEE]), 0)
    np.testing.assert_allclose(interference([ANT, ANT], [ANT, BEE]), [[0, 0], [0.8, -0.8]])
    np.testing.assert_allclose(interference([None, BEE], [ANT, BEE])[0], [-1, -0.2])


def test_copy_paste_runs_from_the_scene_to_the_picture():
    target, reference = np.array([1.0, 0.0]), np.array([np.cos(0.8), np.sin(0.8)])
    scores = []
    for angle in (0.0, 0.2, 0.4, 0.6, 0.8):
        made = np.array([np.cos(angle), np.sin(angle)])
        scores.append(copy_paste(made @ target, made @ reference, target @ reference))
    np.testing.assert_allclose(scores, [-1, -0.5, 0, 0.5, 1], atol=1e-6)
    assert -1 <= copy_paste(0.5, 1.0, 1.0) <= 1
