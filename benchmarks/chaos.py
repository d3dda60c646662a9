"""What the chaos runs share: steps of the smallest preset, started as a user starts them, and who is killed."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from local_cluster import LocalCluster
from recording import describe_machine, write_result

ROOT = Path(__file__).resolve().parents[1]
ATTEMPT_TIMEOUT_S = 3600


def start(step: str, output: Path, settings: dict[str, Any], cluster: LocalCluster, *flags: str) -> subprocess.Popen[bytes]:
    """Starts one step; its log is beside ``output``."""
    sets = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    command = [sys.executable, f"pipelines/{step}.py", "--preset", "toy_tiny", "--output", str(output), *flags, *sets]
    with output.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(command, cwd=ROOT, env=cluster.environment, stdout=log, stderr=log)


def run_undisturbed(step: str, output: Path, settings: dict[str, Any], cluster: LocalCluster, *flags: str) -> float:
    """Seconds that a step takes."""
    began = time.monotonic()
    code = start(step, output, settings, cluster, *flags).wait(ATTEMPT_TIMEOUT_S)
    assert code == 0, f"{step} failed undisturbed; see {output.with_suffix('.log')}"
    return time.monotonic() - began


def kill(victim: str, driver: subprocess.Popen[bytes], cluster: LocalCluster) -> None:
    """Kills the driver, or a node, which is replaced."""
    if victim == "driver":
        driver.kill()
        driver.wait()
    else:
        cluster.kill_node(cluster.nodes[-1])
        cluster.add_node()


def find_differing(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Names whose values differ, or that only one of the two has."""
    return sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))


def main(name: str, document: str | None, run_chaos: Callable[..., dict[str, Any]], **defaults: int) -> None:
    """Runs the experiment in an empty folder and keeps the figures; ``defaults`` are those of its options."""
    parser = argparse.ArgumentParser(description=document, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, value in defaults.items():
        parser.add_argument(f"--{option}", type=int, default=value)
    parser.add_argument("--folder", type=Path, default=Path("runs") / name)
    arguments = vars(parser.parse_args())
    machine, folder = describe_machine(), arguments.pop("folder").resolve()
    shutil.rmtree(folder, ignore_errors=True)
    write_result(name, run_chaos(folder, **arguments), machine)
