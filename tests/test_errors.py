import pickle

import pytest

from refalign import errors
from refalign.errors import RefAlignError

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, RefAlignError)]


def make(kind):
    return kind("REASON", "a message") if issubclass(kind, errors.DataError) else kind("a message")


@pytest.mark.parametrize("kind", KINDS)
def test_errors_cross_processes_whole(kind):
    for other in (RefAlignError.from_record(make(kind).to_record()), pickle.loads(pickle.dumps(make(kind)))):
        assert type(other) is kind and str(other) == "a message"
        assert getattr(other, "reason", "REASON") == "REASON"


def test_every_error_is_drawn_in_the_tree():
    assert all(kind.__name__ in (errors.__doc__ or "") for kind in KINDS)
