"""A stage of one's own between two others: the example of ARCHITECTURE.md, run on real parts and killed once."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from refalign.io.images import decode_image
from refalign.toy.videos import write_world

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world") / "videos"
    write_world(folder, num_videos=6, seed=3, split="heldout")
    return folder


def run(*arguments):
    command = [sys.executable, "-m", "tests.stages.program", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


def parts_of(output):
    (folder,) = output.glob("sheets-*")
    return {path.name: path.read_bytes() for path in (folder / "parts").iterdir()}, json.loads(
        (folder / "manifest.json").read_text()
    )


def test_a_new_stage_is_made_once_whatever_kills_it(world, tmp_path):
    undisturbed = run(world, tmp_path / "whole")
    assert undisturbed.returncode == 0, undisturbed.stderr[-2000:]
    killed = run(world, tmp_path / "out", 2)
    assert killed.returncode == -signal.SIGKILL
    (folder,) = (tmp_path / "out").glob("sheets-*")
    assert len(list((folder / "parts").glob("*.json"))) == 1 and not (folder / "manifest.json").exists()
    first = next(path for path in (folder / "parts").glob("*.png"))
    made_at = first.stat().st_mtime_ns
    resumed = run(world, tmp_path / "out")
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    order = [line.partition(":")[0] for line in resumed.stdout.splitlines() if "started" in line or "skipped" in line]
    assert order == ["subjects", "sheets", "pairs", "shards"] and "subjects: done before, skipped" in resumed.stdout
    assert first.stat().st_mtime_ns == made_at, "what was committed is not made again"
    parts, manifest = parts_of(tmp_path / "out")
    assert (parts, manifest["crops"]) == (parts_of(tmp_path / "whole")[0], parts_of(tmp_path / "whole")[1]["crops"])
    assert f"sheets: {manifest['crops']} crops on 3 sheets" in resumed.stdout and manifest["crops"] > 6
    assert all(decode_image(data).shape[0] >= 96 for name, data in parts.items() if name.endswith(".png"))


def test_the_example_is_that_of_the_document_and_short():
    code = (ROOT / "tests" / "stages" / "contact_sheets.py").read_text()
    assert code.count("\n") <= 40
    assert code in (ROOT / "ARCHITECTURE.md").read_text()
