"""People choose between two videos without knowing which model made which; their answers are evidence for the gate.

Sides are a function of the comparison's id and the prompt, so that no key to them is stored or sent: it is blind for whoever
looks, not for whoever computes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from refalign.errors import ArtifactError
from refalign.io.untrusted import parse_json_object

Side = Literal["left", "right"]
_ANSWERS = ("left", "right", "same")
_Z = 1.959964  # of a two-sided 95% interval


@dataclass(frozen=True)
class Question:
    """One prompt with both models' videos.

    Attributes:
        references: pictures, PNG.
        champion: video, mp4; likewise ``challenger``.
    """

    key: str
    prompt: str
    references: tuple[bytes, ...]
    champion: bytes
    challenger: bytes


@dataclass(frozen=True)
class Votes:
    """What people chose; a prompt is the unit, however many people saw it.

    Attributes:
        share: of the challenger, over prompts; "same" is half a vote.
        low: end of the 95% interval (Wilson); likewise ``high``.
        same: share of answers that saw no difference.
    """

    raters: int
    prompts: int
    share: float
    low: float
    high: float
    same: float

    def to_record(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def place_challenger(comparison: str, key: str) -> Side:
    """On which side the challenger's video of a prompt is."""
    return "left" if _draw(comparison, key, "side") % 2 else "right"


def order_questions(comparison: str, questions: Sequence[Question]) -> list[Question]:
    """The questions as they are asked, in an order that says nothing."""
    return sorted(questions, key=lambda question: _draw(comparison, question.key, "order"))


def read_votes(source: Path, comparison: str, keys: Sequence[str]) -> Votes:
    """Answers that the page exported: a file of one person, or a folder of several.

    Args:
        comparison: the id that the page was made with.
        keys: of the prompts that were shown.

    Raises:
        ArtifactError: nothing is there, or a file is damaged or about another comparison.
    """
    files = sorted(source.glob("*.json")) if source.is_dir() else [source]
    people = [_load_answers(file, comparison, keys) for file in files]
    chosen: dict[str, list[float]] = {}
    for answers in people:
        for key, answer in answers.items():
            vote = 0.5 if answer == "same" else float(answer == place_challenger(comparison, key))
            chosen.setdefault(key, []).append(vote)
    if not chosen:
        raise ArtifactError(f"{source}: no answers; open the page, choose, and export them here.")
    means = [sum(votes) / len(votes) for votes in chosen.values()]
    share = sum(means) / len(means)
    every = [answer for answers in people for answer in answers.values()]
    low, high = _wilson(share, len(means))
    values = (round(value, 6) for value in (share, low, high, every.count("same") / len(every)))
    return Votes(len(people), len(means), *values)


def _load_answers(file: Path, comparison: str, keys: Sequence[str]) -> Mapping[str, str]:
    try:
        exported = parse_json_object(file.read_bytes())
        about, answers = exported["comparison"], exported["answers"]
        if not isinstance(answers, dict):
            raise ValueError(f"answers are a {type(answers).__name__}, expected an object")
    except (OSError, ValueError, KeyError) as error:
        raise ArtifactError(f"{file}: no exported answers ({error!r}); export them from the page again.") from error
    if about != comparison:
        raise ArtifactError(
            f"{file}: answers about comparison {str(about)[:100]}, not {comparison}; make the page again and ask again."
        )
    if strange := [f"{key}: {answer}"[:100] for key, answer in answers.items() if key not in keys or answer not in _ANSWERS]:
        raise ArtifactError(
            f"{file}: {strange[0]!r} is no answer to a prompt of this comparison; export them from the page again."
        )
    return answers


def _wilson(share: float, count: int) -> tuple[float, float]:
    """Wilson's interval of a share; halves and means count as they are, which is wider than they deserve, never narrower."""
    centre = (share + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
    reach = _Z / (1 + _Z**2 / count) * math.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2))
    return max(0.0, centre - reach), min(1.0, centre + reach)


def _draw(*names: str) -> int:
    return int.from_bytes(hashlib.sha256("/".join(names).encode()).digest()[:8])
