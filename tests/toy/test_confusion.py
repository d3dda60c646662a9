"""Each kind of confusion is told from the others."""

import pytest

from workshop.judging.confusion import find_fates

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
