"""Mutations of ten small containers: no crash, no hang, an outcome for each, and nothing called broken that libav reads."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from refalign.pipeline.outcomes import Outcome
from tests.shown.making import draw, write

CONTAINERS = {
    "h264.mp4": {}, "b-frames.mov": {"b_frames": 3}, "hevc.mkv": {"codec": "libx265"}, "vp9.webm": {"codec": "libvpx-vp9"},
    "vp8.webm": {"codec": "libvpx"}, "mpeg4.avi": {"codec": "mpeg4"}, "mpeg2.mpg": {"codec": "mpeg2video", "rate": 25},
    "h264.ts": {"kind": "mpegts"}, "flv1.flv": {"codec": "flv"}, "wmv.asf": {"codec": "msmpeg4"},
}  # fmt: skip
PER_CONTAINER = 30
BROKEN = {"TRUNCATED", "UNREADABLE", "NO_FRAMES"}
ROOT = Path(__file__).parents[2]


def mutate(name, data, others, rng):
    """A file with something wrong: cut off, overwritten or spliced."""
    way = rng.choice(["cut", "overwritten", "header", "spliced", "without a piece", "doubled"])
    at, size = int(rng.integers(8, len(data))), int(rng.integers(1, max(2, len(data) // 8)))
    if way == "cut":
        return data[:at]
    if way in ("overwritten", "header"):
        changed = bytearray(data)
        for _ in range(int(rng.integers(1, 12))):
            place = int(rng.integers(0, min(len(data), 1500) if way == "header" else len(data)))
            changed[place] = int(rng.choice([0, 255, int(rng.integers(0, 256))]))
        return bytes(changed)
    if way == "spliced":
        return data[:at] + others[int(rng.integers(0, len(others)))][at:]
    return data[:at] + data[at + size :] if way == "without a piece" else data[:at] + data[max(0, at - size) :]


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What the child process printed of each file."""
    made, folder = tmp_path_factory.mktemp("made"), tmp_path_factory.mktemp("mutations")
    whole = [write(made / name, draw(14, height=48, width=64), gop=7, **how).read_bytes() for name, how in CONTAINERS.items()]
    rng = np.random.default_rng(20260701)
    for name, data in zip(CONTAINERS, whole, strict=True):
        (folder / f"whole-{name}").write_bytes(data)
        for number in range(PER_CONTAINER):
            (folder / f"{number:02d}-{name}").write_bytes(mutate(name, data, whole, rng))
    ran = subprocess.run(
        [sys.executable, "-m", "tests.shown.fuzz_here", str(folder)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    lines = [json.loads(line) for line in ran.stdout.splitlines()]
    assert ran.returncode == 0, f"{lines[-1:]} ended the process\n{ran.stderr[-3000:]}"
    return {line["name"]: line for line in lines if "name" in line}


def test_every_mutation_has_an_outcome_and_none_crashes(told):
    assert len(told) == len(CONTAINERS) * (PER_CONTAINER + 1)
    assert not {name: line["message"] for name, line in told.items() if line["reason"] == "CRASH"}
    for line in told.values():
        assert Outcome("video", line["name"], line["reason"]).status in ("written", "filtered", "quarantined")
        assert not line["message"] or line["name"] in line["message"]
    counts = Counter(line["reason"] for line in told.values())
    assert counts[""] > 50 and counts["TRUNCATED"] > 10 and counts["UNREADABLE"] > 10, counts


def test_whole_files_are_used(told):
    assert {name: told[f"whole-{name}"]["reason"] for name in CONTAINERS} == dict.fromkeys(CONTAINERS, "")


def test_what_libav_reads_without_complaint_is_not_called_broken(told):
    silent = {name: line["reason"] for name, line in told.items() if not line["complains"]}
    assert len(silent) > 50
    assert not {name: reason for name, reason in silent.items() if reason in BROKEN}
