"""Being told to stop, by SIGTERM or by the launcher: the run saves a checkpoint and ends.

One rank is enough: its flag is summed with the terms of the next step, so that all ranks stop after the same one.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EXIT_CODE = 143
"""Of a rank that ended this way: 128 + SIGTERM, which torchrun and shells read as "asked to stop"."""


class Preempted(Exception):
    """The run was told to stop, has saved a checkpoint, and goes on from it when it is started again."""


@contextmanager
def watch_notices(notice: Callable[[], bool] | None) -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether this rank has been told to stop.

    A second SIGTERM goes to the handler that was there before, without a checkpoint. Signals reach the main thread only; under
    Ray Train the run is in another one, and ``notice`` asks Ray instead.

    Args:
        notice: the launcher's own news, asked once per step on every rank.
    """
    told = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield lambda: bool(notice and notice())
        return
    before = signal.getsignal(signal.SIGTERM)

    def note(*_: object) -> None:
        told.set()
        signal.signal(signal.SIGTERM, before)

    signal.signal(signal.SIGTERM, note)
    try:
        yield lambda: told.is_set() or bool(notice and notice())
    finally:
        signal.signal(signal.SIGTERM, before)
