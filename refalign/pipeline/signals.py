"""SIGTERM as an interruption like Ctrl-C, so that the same clean-up runs."""

from __future__ import annotations

import signal
import sys

_RAISE_AGAIN_S = 5.0


class Terminated(KeyboardInterrupt):
    """SIGTERM was received."""


def arm_signals() -> None:
    """Makes SIGTERM raise like Ctrl-C. Called again after Ray has started, which installs a handler of its own."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _raise_terminated)


def _raise_terminated(number: int, frame: object) -> None:
    """Raises, and again every few seconds until `heed_signal`: an exception in a finaliser is lost.

    Messages of finalisers are not shown from here on.
    """
    sys.unraisablehook = lambda unraisable: None
    signal.signal(signal.SIGALRM, _raise_terminated)
    signal.setitimer(signal.ITIMER_REAL, _RAISE_AGAIN_S)
    raise Terminated


def heed_signal() -> None:
    """Called where the interruption is handled, so that it is not raised again."""
    signal.setitimer(signal.ITIMER_REAL, 0)
