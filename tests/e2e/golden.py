"""What a finished run and the commands look like, in plain values that a test compares.

    python tests/e2e/golden.py OUTPUT      # writes golden.json from a finished run of toy_tiny

Do that only where a change of the output is meant, and say so in the commit.
"""

import json
import platform
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FILE = Path(__file__).with_name("golden.json")
LOSSES = ("total", "flow_matching", "pull", "push", "alignment")
COUNTS = {
    "world": ("videos",),
    "subjects": ("counts", "clips", "subjects", "crops", "embeddings", "licenses", "consents", "captions", "parts"),
    "pairs": ("counts", "clips", "subjects", "subjects_with_pair", "pairs", "splits", "parts"),
    "shards": ("counts", "samples", "references", "cross_references", "cut_prompts"),
    "train": ("steps", "samples_consumed"),
    "evaluate": ("held_out", "videos"),
    "register": ("name", "alias", "version"),
}


def describe_run(output: Path) -> dict[str, Any]:
    """Counts of every manifest, the digest of the shards and the losses of every step."""
    manifests = {path.parent.name.partition("-")[0]: json.loads(path.read_text()) for path in output.glob("*-*/manifest.json")}
    (metrics,) = output.glob("train-*/metrics.jsonl")
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    counts = {step: {name: manifests[step][name] for name in names if name in manifests[step]} for step, names in COUNTS.items()}
    return {
        "counts": counts,
        "digest": manifests["shards"]["digest"],
        "losses": [[record[name] for name in LOSSES] for record in records if "total" in record],
    }


def describe_commands() -> dict[str, list[str]]:
    """Every command of ``pipelines/`` with its flags and actions."""

    def ask(path: Path) -> list[str]:
        command = [sys.executable, str(path), "--help"]
        text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        return sorted(set(re.findall(r"(?<![\w-])(?:--[a-z][a-z-]+|\{[a-z,]+\})", text.partition("\n\n")[0])))

    paths = sorted((ROOT / "pipelines").glob("*.py"))
    with ThreadPoolExecutor(4) as pool:
        return dict(zip([path.stem for path in paths], pool.map(ask, paths), strict=True))


def describe_machine() -> str:
    """Machines and versions on which the same bytes are expected."""
    import torch

    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} torch {torch.__version__}"


def main() -> None:
    """Writes the expected values."""
    values = {"machine": describe_machine(), "commands": describe_commands(), **describe_run(Path(sys.argv[1]))}
    FILE.write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    main()
