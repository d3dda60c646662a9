"""Starts Ray on this machine and watches its processes: one that ends is noticed at once, not after Ray's own patience."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import psutil

from refalign.errors import RayNotStarted

_OBJECT_STORE_BYTES = 512 * 2**20
"""Rows are small; Ray's default takes 30% of the memory."""
_PROCESSES = ("gcs_server", "raylet")
_POLL_S, _NOTICE_S, _END_S = 0.2, 20.0, 10.0


def start_ray(environment: Mapping[str, Mapping[str, str]]) -> None:
    """``ray.init`` of a cluster of this process alone, in a thread that can be left: Ray waits inside of C++.

    After a failure this process cannot start Ray again.

    Args:
        environment: Ray's ``runtime_env``.

    Raises:
        RayNotStarted: with what happened and the folder of Ray's logs.
    """
    errors: list[BaseException] = []
    done = threading.Event()
    threading.Thread(target=_init, args=(environment, errors, done), name="ray-init", daemon=True).start()
    began, told, seen = time.monotonic(), False, {}
    while not done.wait(_POLL_S):
        seen |= _find_processes()
        if ended := [name for process, name in seen.items() if not _is_running(process)]:
            for process in seen:
                with suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(seen, _END_S)  # else they are children of the process that tries again
            _refuse(f"its process {ended[0]} ended after {time.monotonic() - began:.0f} s")
        if not told and time.monotonic() - began > _NOTICE_S:
            print(f"Ray is still starting after {_NOTICE_S:g} s; its logs: {_find_logs()}", file=sys.stderr, flush=True)
            told = True
    if errors:
        _refuse(" ".join(str(errors[0]).split()))


def _refuse(what: str) -> NoReturn:
    raise RayNotStarted(
        f"Ray did not start on this machine: {what}. Its logs are in {_find_logs()} (raylet.err, gcs_server.err). Little memory, "
        "a full disk or a busy machine are the usual causes."
    )


def _init(environment: Mapping[str, Mapping[str, str]], errors: list[BaseException], done: threading.Event) -> None:
    import ray

    # It warns that its own handler of SIGTERM is not set outside of the main thread; the command line has one.
    logging.getLogger("ray._private.worker").addFilter(lambda record: "SIGTERM" not in record.getMessage())
    try:
        ray.init(
            address="local",
            include_dashboard=False,
            log_to_driver=False,  # errors arrive as exceptions
            logging_level=logging.WARNING,
            object_store_memory=_OBJECT_STORE_BYTES,
            runtime_env=dict(environment),
        )
    except BaseException as error:  # told by the thread that waits
        errors.append(error)
    done.set()
    threading.Event().wait()  # for ever: Ray's processes end with the thread that started them (PR_SET_PDEATHSIG)


def _find_processes() -> dict[psutil.Process, str]:
    """Ray's own children of this process, by name."""
    found = {}
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if (name := child.name()) in _PROCESSES:  # also of one that ended before it was ever seen
                found[child] = name
    return found


def _is_running(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _find_logs() -> Path:
    return Path(os.environ.get("RAY_TMPDIR", tempfile.gettempdir())) / "ray" / "session_latest" / "logs"
