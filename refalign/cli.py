"""What every command of ``pipelines/`` shares: flags, one-line errors, exit codes, and an orderly end on Ctrl-C or SIGTERM."""

from __future__ import annotations

import argparse
import errno
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from refalign.config import RunConfig, apply_overrides
from refalign.config.presets import PRESETS, load_preset
from refalign.errors import RayNotStarted, RefAlignError
from refalign.io.untrusted import hide_secrets
from refalign.pipeline.signals import Terminated, arm_signals, heed_signal

_SECOND_TRY = "REFALIGN_SECOND_TRY"
"""Set in a process that replaces one in which Ray did not start."""
_PLACE_FAULTS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EIO, errno.ESTALE}
)
"""Of disks and folders, not of this program."""


def make_parser(description: str) -> argparse.ArgumentParser:
    """The flags that choose a run: preset, input, settings and output folder."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--preset", default="toy", help=f"where settings start from: {', '.join(PRESETS)} (default: toy)")
    parser.add_argument(
        "--input",
        metavar="FOLDER",
        help="videos to learn from: a folder, file, pattern, list, table, annotation or s3:// URI (default: drawn videos)",
    )
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="change one setting; repeatable")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="where everything goes (default: runs/<preset>)")
    return parser


def load_config(arguments: argparse.Namespace) -> tuple[RunConfig, Path]:
    """The config and the output folder that the flags describe.

    Raises:
        ConfigError: an unknown preset or setting, or a value out of range.
    """
    overrides = list(arguments.set)
    if arguments.input:
        remote = "://" in arguments.input
        overrides.insert(0, f"input.path={arguments.input if remote else Path(arguments.input).expanduser().absolute()}")
    config = apply_overrides(load_preset(arguments.preset), overrides)
    # In a submitted Ray job the working folder is a temporary copy of the code.
    runs = Path.home() / "refalign-runs" if "_ray_pkg_" in str(Path.cwd()) else Path("runs")
    output = arguments.output or runs / arguments.preset
    return config, output.expanduser().resolve()


def run_command(work: Callable[[], object]) -> int:
    """Runs ``work`` and returns the exit code: 0, 1 to 3 (an error of one line), 130 (Ctrl-C), 143 (SIGTERM)."""
    arm_signals()
    try:
        work()
    except RayNotStarted as error:
        print(f"error: {hide_secrets(str(error))}", file=sys.stderr, flush=True)
        if os.environ.get(_SECOND_TRY):
            return error.exit_code
        print("trying once more", file=sys.stderr, flush=True)
        os.environ[_SECOND_TRY] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # Ray cannot start twice in one process
    except RefAlignError as error:
        print(f"error: {hide_secrets(str(error))}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        if error.errno not in _PLACE_FAULTS:
            raise
        where = error.filename or "a file"
        print(f"error: {where}: {error.strerror}; free some space or repair it, or give another --output.", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interruption:
        heed_signal()
        command = hide_secrets(shlex.join(["uv", "run", *sys.argv]))
        print(f"\nstopped; finished parts are kept. Run the same command to continue: {command}", file=sys.stderr)
        return 143 if isinstance(interruption, Terminated) else 130
    return 0


def leave(code: int) -> None:
    """Ends the process without waiting for idle threads of MLflow and Ray, which can take a minute."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_one(only: str | None, description: str) -> None:
    """The command of one stage, for which the stages before it must be done, or of all (None)."""
    arguments = make_parser(description).parse_args()
    leave(run_command(lambda: run_from_flags(arguments, only)))


def run_from_flags(arguments: argparse.Namespace, only: str | None) -> None:
    """Runs the stage, or all, with the settings that the flags describe."""
    from refalign.pipeline.summary import print_ending
    from refalign.run import run_stages  # after the flags: it loads half of the library

    summary = run_stages(*load_config(arguments), only=only)
    if only is None:
        print_ending(summary)
