"""Runs all stages: videos in, a registered reference-to-video model out."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from refalign.cli import run_one  # noqa: E402

if __name__ == "__main__":
    run_one(None, __doc__)
