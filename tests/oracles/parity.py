"""Numbers that the published code produced, and the tiny model they belong to."""

from pathlib import Path

PARITY = Path(__file__).parents[1] / "parity"
