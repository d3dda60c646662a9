"""Verdicts on videos: attribute by attribute, what a subject should look like and what it looks like.

A judge is a function ``(frames, prompt, references) -> verdict`` that ``evaluation.judge`` names. Frames are uint8 [F, H, W, 3],
references pictures in the order of the prompt. A verdict is a list, one entry per subject:

    {"name": "on the left", "attributes": {"pattern": {"wanted": "belt", "shown": "belly"}, ...}}

``shown`` is None where nothing could be read. None in place of the list: this judge cannot say anything about this video.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from refalign.errors import ConfigError

Verdict = list[dict[str, Any]]
Judge = Callable[[np.ndarray, str, Sequence[Any]], Verdict | None]


def load_judge(name: str) -> Judge:
    """The function of ``module:name``.

    Raises:
        ConfigError: the module cannot be imported, or has no such function.
    """
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"evaluation.judge={name}: {error}; name an importable function as module:function, or leave it out."
        ) from error


def iter_answers(verdict: Verdict) -> Iterator[tuple[str, str, bool]]:
    """(subject, attribute, whether it is right) for everything that was asked."""
    for subject in verdict:
        for name, answer in subject["attributes"].items():
            yield subject["name"], name, answer["shown"] == answer["wanted"]


def share_right(verdict: Verdict | None) -> float | None:
    """Share of the attributes that are as wanted; None without a verdict."""
    answers = [right for _, _, right in iter_answers(verdict)] if verdict else []
    return round(float(np.mean(answers)), 6) if answers else None
