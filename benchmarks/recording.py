"""How a benchmark's result is kept: figures with the command, date and machine that produced them."""

from __future__ import annotations

import json
import os
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any


def describe_machine() -> dict[str, Any]:
    """Processor, cores, memory, GPU and how busy the machine was; nothing that names the machine."""
    import torch

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        cpu = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")), cpu)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "load_average_1_min": round(os.getloadavg()[0], 2),
        "niceness": os.getpriority(os.PRIO_PROCESS, 0),  # below 0: it was measured ahead of whatever else ran
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": version("diffusers"),
    }


def write_result(name: str, figures: dict[str, Any], machine: dict[str, Any]) -> Path:
    """Writes ``benchmarks/results/<name>.json`` and prints it.

    Args:
        machine: from ``describe_machine``, taken before the measurement, so that its load is that of others.
    """
    command = " ".join(["python", "benchmarks/" + Path(sys.argv[0]).name, *sys.argv[1:]])
    result = {"command": command, "date": datetime.now(UTC).date().isoformat(), "machine": machine, **figures}
    path = Path(__file__).parent / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    text = json.dumps(result, indent=2)
    path.write_text(text + "\n")
    print(text)
    return path
