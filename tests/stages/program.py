"""Runs subjects, sheets, pairs and shards over a folder in a process of its own: program.py INPUT OUTPUT [DIE_IN_PART].

With a number it kills itself in the part of the sheets with that number, as that is being written.
"""

import os
import signal
import sys
from pathlib import Path

import pytest

from refalign.stages import Pairs, Shards, Subjects
from tests.curating_here import curate_here, do_without_ray, make_config
from tests.stages.contact_sheets import Sheets, SheetsWorker


class Mortal(SheetsWorker):
    """Ends its process half way through a part."""

    parts = 0

    def make_part(self, step, name, work: str):
        Mortal.parts += 1
        if Mortal.parts == int(sys.argv[3]):
            step.write_part(name, lambda path: path.write_bytes(b"half") and os.kill(os.getpid(), signal.SIGKILL))
        return super().make_part(step, name, work)


if __name__ == "__main__":
    if len(sys.argv) > 3:
        Sheets.worker = Mortal
    with pytest.MonkeyPatch.context() as patch:
        do_without_ray(patch)
        config = make_config("pairs.validation_fraction=0")
        curate_here(config, sys.argv[1], Path(sys.argv[2]), stages=(Subjects, Sheets, Pairs, Shards))
