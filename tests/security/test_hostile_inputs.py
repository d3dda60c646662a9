"""Hostile files and texts are refused by name: nothing in them runs, nothing is written elsewhere, memory stays small.

Bad videos, sidecars and annotations have tables of their own (tests/curation/test_bad_input.py).
"""

import re
from pathlib import Path

import pytest

from tests.security.cases import CASES

_MAX_GROWTH_BYTES = 300 * 2**20


@pytest.fixture(scope="module", autouse=True)
def _libraries():
    """Loaded beforehand, so that what grows during a case is the case."""
    import refalign.curation.selection
    import refalign.generation.pipeline
    import refalign.models.captioner
    import refalign.models.convert
    import refalign.models.scores
    import refalign.tracking.model_file  # noqa: F401
    from refalign.models.yolo import load_detector
    from refalign.toy import WEIGHTS_FOLDER

    load_detector(WEIGHTS_FOLDER / "detector")


def memory(kind):
    """Bytes of this process: VmRSS now, VmHWM at the most."""
    text = Path("/proc/self/status").read_text()
    found = re.search(rf"{kind}:\s+(\d+) kB", text)
    assert found
    return int(found[1]) * 1024


def list_around(folder):
    """What a careless reader could write to: beside the folder, where we stand, and the fixed name of the tar."""
    beside = [*folder.parent.rglob("*"), *Path.cwd().glob("*"), Path("/tmp/refalign-escaped.pickle")]
    return {path for path in beside if path.exists() and not path.is_relative_to(folder)}


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_by_name(name, tmp_path):
    send, kind, words = CASES[name]
    folder, canary = tmp_path / "given", tmp_path / "canary"
    folder.mkdir()
    before = list_around(folder)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    begin_bytes = memory("VmRSS")
    with pytest.raises(kind) as caught:
        send(folder, canary)
    grown = memory("VmHWM") - begin_bytes
    assert type(caught.value) is kind
    message = f"{getattr(caught.value, 'reason', '')} {caught.value}"
    assert re.search(words, message, re.DOTALL), message
    assert len(message) < 1500 and "hunter2" not in message and "abcdef" not in message
    assert not canary.exists(), "it ran"
    assert list_around(folder) == before, "it wrote elsewhere"
    assert grown < _MAX_GROWTH_BYTES, f"{grown / 2**20:.0f} MiB"


def test_the_canary_sings_when_a_pickle_is_opened_carelessly(tmp_path):
    """The tables above prove something only if their pickles would run."""
    import torch

    from tests.security.hostile import save_pickle

    torch.load(save_pickle(tmp_path / "evil.pt", tmp_path / "canary"), weights_only=False)
    assert (tmp_path / "canary").exists()


def test_there_are_many():
    assert len(CASES) >= 30
