"""What README.md tells people to type exists."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text()


def test_every_named_file_exists():
    names = set(re.findall(r"`((?:refalign|pipelines|tests|benchmarks)/[\w/]+\.(?:py|md))`", TEXT))
    assert len(names) > 8
    assert not [name for name in names if not (ROOT / name).exists()]


def test_every_flag_in_the_readme_is_known_to_its_command():
    for command, rest in re.findall(r"(pipelines/\w+\.py)((?:[^\n`]|\\\n)*)", TEXT):
        flags = set(re.findall(r"--[a-z][\w-]*", rest))
        if not flags:
            continue
        told = subprocess.run([sys.executable, command, "--help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert flags <= set(re.findall(r"--[a-z][\w-]*", told)), command


def test_settings_named_in_the_readme_exist():
    from refalign.config import apply_overrides
    from refalign.config.presets import toy

    for setting in set(re.findall(r"--set (\w+\.[\w.]+=\S+?)[`)\s]", TEXT)) - {"section.field=value"}:
        apply_overrides(toy(), [setting])
