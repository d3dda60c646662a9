"""Servers on loopback for the length of a ``with`` block."""

import os
import signal
import subprocess
import time
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def serving(command, address, *, log=None, seconds=300, **options):
    """The process of a server, with its workers in a group of their own, from when ``address`` answers until the block ends.

    ``log`` is where its output goes; ``options`` are those of `subprocess.Popen`.
    """
    with Path(log or os.devnull).open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True, **options)
    try:
        end = time.monotonic() + seconds
        while True:
            assert process.poll() is None, f"the server ended by itself\n{log.read_text()[-3000:] if log else command}"
            with suppress(OSError):
                urllib.request.urlopen(address, timeout=5).close()
                break
            assert time.monotonic() < end, f"{address} does not answer\n{log.read_text()[-3000:] if log else command}"
            time.sleep(0.5)
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)
