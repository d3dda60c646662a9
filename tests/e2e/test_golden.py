"""A change of structure changes no result: what ``toy_tiny`` makes and which flags there are, as they were (see `golden`)."""

import json

import numpy as np
import pytest

from tests.e2e import golden

EXPECTED = json.loads(golden.FILE.read_text())


@pytest.fixture(scope="module")
def made(finished_run):
    return golden.describe_run(finished_run[0])


def test_counts_of_every_manifest(made):
    assert json.loads(json.dumps(made["counts"])) == EXPECTED["counts"]


def test_losses_of_every_step(made):
    """Other processors add in another order, so that losses drift apart a little; on the same kind they are equal."""
    same = golden.describe_machine() == EXPECTED["machine"]
    np.testing.assert_allclose(made["losses"], EXPECTED["losses"], rtol=1e-6 if same else 0.05, atol=0 if same else 0.02)


def test_digest_of_the_shards(made):
    """Latents are floats: their bytes are those of one kind of processor and one version of torch."""
    if golden.describe_machine() != EXPECTED["machine"]:
        assert len(made["digest"]) == len(EXPECTED["digest"])
    else:
        assert made["digest"] == EXPECTED["digest"]


def test_commands_and_their_flags():
    assert golden.describe_commands() == EXPECTED["commands"]
