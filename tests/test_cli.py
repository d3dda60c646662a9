"""What every command shares: faults of disks and flags are one line, before anything dear is imported."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from refalign.cli import run_command

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.ENOENT])
def test_a_fault_of_the_disk_is_one_line(number, capsys):
    def work():
        raise OSError(number, "No room", "/out/report.html")

    assert run_command(work) == 1
    assert (
        capsys.readouterr().err == "error: /out/report.html: No room; free some space or repair it, or give another --output.\n"
    )


def test_a_fault_of_this_program_keeps_its_traceback():
    def work():
        raise OSError(errno.EBADF, "Bad file descriptor")

    with pytest.raises(OSError, match="Bad file"):
        run_command(work)


def test_a_folder_that_is_a_file_is_one_line_at_the_start(tmp_path):
    (tmp_path / "taken").write_text("")
    command = [sys.executable, "pipelines/subjects.py", "--preset", "toy_tiny", "--output", str(tmp_path / "taken" / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and line.startswith("error: ") and "taken" in line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--hours", "-5"], "--hours: Input should be greater than 0 (got '-5')"),
        (["--hours", "nan"], "--hours: Input should be a finite number (got 'nan')"),
        (["--hours", "5", "--kept", "2"], "--kept: Input should be less than or equal to 1 (got '2')"),
        ([], "give --clips or --hours, one of them"),
    ],
)
def test_flags_out_of_range_are_refused_before_torch_is_imported(flags, message):
    command = [sys.executable, "-X", "importtime", "pipelines/plan.py", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr
    assert not any(line.split("|")[-1].strip() == "torch" for line in done.stderr.splitlines())
