"""Finds each subject again in other clips of its source group. The steps before it must be done."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from refalign.cli import run_one  # noqa: E402

if __name__ == "__main__":
    run_one("pairs", __doc__)
