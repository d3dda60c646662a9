"""People choose between two videos without knowing which model made which; their answers are evidence for the gate.

Sides and order are functions of the comparison's id and the prompt, so that no key to them is stored or sent: it is blind for
whoever looks, not for whoever computes.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from refalign.errors import ArtifactError
from refalign.io.writing import write_bytes

TABLE = "questions.csv"
_MAX_LINE = 100_000
_COLUMNS = ("comparison", "question", "prompt", "references", "left", "right", "answer")
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


def place_challenger(comparison: str, key: str) -> str:
    """On which side the challenger's video of a prompt is."""
    return "left" if _draw(comparison, key, "side") % 2 else "right"


def export_questions(folder: Path, comparison: str, questions: Sequence[Question]) -> Path:
    """Writes videos, pictures and `TABLE`, a row a question, with the column ``answer`` to fill in; returns the table's path.

    Names and order say nothing of the models. A table that is there already may hold answers, and stays.
    """
    table = folder / TABLE
    if table.exists():
        return table
    rows: list[tuple[str, ...]] = [_COLUMNS]
    for number, question in enumerate(sorted(questions, key=lambda each: _draw(comparison, each.key, "order")), 1):
        left, right = question.challenger, question.champion
        if place_challenger(comparison, question.key) == "right":
            left, right = right, left
        pictures = {f"{number:03}-reference-{place}.png": data for place, data in enumerate(question.references, 1)}
        videos = {f"{number:03}-left.mp4": left, f"{number:03}-right.mp4": right}
        for name, data in {**pictures, **videos}.items():
            write_bytes(folder / name, data)
        # A spreadsheet would compute what begins with one of these signs.
        prompt = f"'{question.prompt}" if question.prompt.startswith(tuple("=+-@\t\r\n")) else question.prompt
        rows.append((comparison, question.key, prompt, " ".join(pictures), *videos, ""))
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    write_bytes(table, text.getvalue().encode("utf-8-sig"))  # the mark tells spreadsheets the encoding
    return table


def read_votes(source: Path, comparison: str, keys: Collection[str]) -> Votes:
    """Answers in tables that `export_questions` wrote: a file of one person, or a folder of several. Questions may stay open.

    Args:
        comparison: the id that the questions were exported with.
        keys: of the prompts that were shown.

    Raises:
        ArtifactError: nothing is there, or a file is damaged or about another comparison.
    """
    files = sorted(source.glob("*.csv")) if source.is_dir() else [source]
    people = [answers for file in files if (answers := _load_answers(file, comparison, keys))]
    chosen: dict[str, list[float]] = defaultdict(list)
    for answers in people:
        for key, answer in answers.items():
            chosen[key].append(0.5 if answer == "same" else float(answer == place_challenger(comparison, key)))
    if not chosen:
        raise ArtifactError(f"{source}: no answers; write left, right or same into the column answer of {TABLE}.")
    means = [sum(votes) / len(votes) for votes in chosen.values()]
    share = sum(means) / len(means)
    every = [answer for answers in people for answer in answers.values()]
    low, high = _wilson(share, len(means))
    values = (round(value, 6) for value in (share, low, high, every.count("same") / len(every)))
    return Votes(len(people), len(means), *values)


def _load_answers(file: Path, comparison: str, keys: Collection[str]) -> dict[str, str]:
    answers: dict[str, str] = {}
    try:
        text = file.read_text("utf-8-sig")
        if any(len(line) > _MAX_LINE for line in text.splitlines()):
            raise ValueError(f"a line longer than {_MAX_LINE} characters")
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
        told = [(row["comparison"], row["question"], (row["answer"] or "").strip().lower()) for row in rows]
    except (OSError, ValueError, KeyError, csv.Error) as error:
        raise ArtifactError(f"{file}: no table of answers ({error!r}); export it again with register.py ask.") from error
    for about, key, answer in told:
        if about != comparison:
            raise ArtifactError(f"{file}: answers about comparison {str(about)[:100]}, not {comparison}; export and ask again.")
        if key not in keys or answer not in ("", *_ANSWERS) or key in answers:
            strange = f"{key}: {answer}"[:100]
            raise ArtifactError(f"{file}: {strange!r} is no answer, or a second one, to a prompt of this comparison; correct it.")
        if answer:
            answers[key] = answer
    return answers


def _wilson(share: float, count: int) -> tuple[float, float]:
    """Wilson's interval of a share; halves and means count as they are, which is wider than they deserve, never narrower."""
    centre = (share + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
    reach = _Z / (1 + _Z**2 / count) * math.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2))
    return max(0.0, centre - reach), min(1.0, centre + reach)


def _draw(*names: str) -> int:
    return int.from_bytes(hashlib.sha256("/".join(names).encode()).digest()[:8])
