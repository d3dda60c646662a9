"""Verdicts on videos: what each attribute of a subject should be, and what the video shows.

A judge is a function ``(frames, prompt, references) -> verdict`` that ``evaluation.judge`` names. Frames are uint8 [F, H, W, 3];
references are pictures in the order of the prompt. A verdict is a list with one entry per subject:

    {"name": "on the left", "attributes": {"pattern": {"wanted": "belt", "shown": "belly"}, ...}}

``shown`` is None where nothing could be read. A judge that cannot judge a video returns None instead of the list.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import numpy as np
from pydantic import BaseModel, TypeAdapter, ValidationError

from refalign.config import describe_problems
from refalign.errors import ConfigError

Value = str | int | float | bool


class Answer(BaseModel):
    wanted: Value
    shown: Value | None


class SubjectVerdict(BaseModel):
    name: str
    attributes: dict[str, Answer]


Verdict = list[SubjectVerdict]
_VERDICT: TypeAdapter[Verdict | None] = TypeAdapter(Verdict | None)


def load_judge(name: str) -> Callable[..., object]:
    """The function of ``module:name``.

    Raises:
        ConfigError: the module cannot be imported, or has no such function.
    """
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        advice = "name an importable function as module:function, or leave it out"
        raise ConfigError(f"evaluation.judge={name}: {error}; {advice}.") from error


def parse_verdict(returned: object) -> Verdict | None:
    """Raises: ConfigError: a judge returned something else than a verdict."""
    try:
        return _VERDICT.validate_python(returned)
    except ValidationError as error:
        raise ConfigError(f"evaluation.judge: the function returned no verdict ({describe_problems(error)}).") from error


def share_right(verdict: Verdict | None) -> float | None:
    """Share of the attributes that are as wanted; None where no attribute was judged."""
    answers = [answer for subject in verdict or () for answer in subject.attributes.values()]
    return round(float(np.mean([each.shown == each.wanted for each in answers])), 6) if answers else None
