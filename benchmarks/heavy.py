"""Runs the heavy tests of some files and keeps what came of them, a result a file.

uv run benchmarks/heavy.py [tests/e2e/test_server.py ...]          without names: every file that has some
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from recording import describe_machine, write_result

ROOT = Path(__file__).resolve().parents[1]


def run_file(path: Path) -> bool:
    """Runs one file's heavy tests and writes their outcomes; whether all passed."""
    machine = describe_machine()
    with tempfile.TemporaryDirectory() as aside:
        report = Path(aside) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "heavy", str(path), f"--junitxml={report}"]
        code = subprocess.run(command, cwd=ROOT).returncode
        cases = list(ElementTree.parse(report).iter("testcase"))
    outcomes = {case.attrib["name"]: next((child.tag for child in case if child.tag != "properties"), "passed") for case in cases}
    sys.argv[1:] = [str(path.relative_to(ROOT))]  # what is said to have been run
    write_result(
        f"heavy_{path.stem}", {"seconds": round(sum(float(case.attrib["time"]) for case in cases)), "tests": outcomes}, machine
    )
    return code == 0


def main() -> None:
    """Runs the files named, or all."""
    named = [(ROOT / name).resolve() for name in sys.argv[1:]]
    marked = (path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.heavy" in path.read_text())
    passed = [run_file(path) for path in named or marked]
    sys.exit(not all(passed))


if __name__ == "__main__":
    main()
