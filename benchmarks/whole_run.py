"""Times a whole run: a first one, a second one that has nothing to do, and the peak memory over all of its processes.

uv run benchmarks/whole_run.py [--preset toy]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
from recording import describe_machine, write_result

ROOT = Path(__file__).resolve().parents[1]


def measure(command: list[str], poll_s: float = 3.0) -> tuple[float, float]:
    """Seconds and peak GiB (proportional set size, so that shared pages count once) of a command with its children.

    Adding up the memory of all processes takes up to .3 s of a core, every ``poll_s``.
    """
    began = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    peak_bytes = 0
    while process.poll() is None:
        with suppress(psutil.NoSuchProcess):
            peak_bytes = max(peak_bytes, sum_memory(psutil.Process(process.pid)))
        with suppress(subprocess.TimeoutExpired):
            process.wait(poll_s)
    assert process.returncode == 0, f"{command} ended with {process.returncode}"
    return time.monotonic() - began, peak_bytes / 2**30


def sum_memory(root: psutil.Process) -> int:
    """Bytes of a process tree; processes that end meanwhile count nothing."""
    total = 0
    for process in [root, *root.children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:
            continue
    return total


def main() -> None:
    """Runs it twice and keeps the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="toy")
    preset = parser.parse_args().preset
    machine = describe_machine()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "pipelines/full.py", "--preset", preset, "--output", folder]
        seconds, peak_gib = measure(command)
        steps = json.loads((Path(folder) / "summary.json").read_text())["seconds"]
        again_seconds, _ = measure(command)
    figures = {"seconds": round(seconds), "steps_seconds": steps, "peak_gib": round(peak_gib, 2)}
    write_result(f"whole_run_{preset}", {**figures, "second_run_seconds": round(again_seconds, 1)}, machine)


if __name__ == "__main__":
    main()
