"""People choose between two videos without knowing which model made which; their votes are evidence for the gate.

Sides and order follow from the comparison's id and the prompt, so no key to them is stored. People who only see the table and
its files cannot tell the models apart; whoever runs this code can.
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
    """One prompt with its reference pictures (PNG) and both models' videos (mp4)."""

    key: str
    prompt: str
    references: tuple[bytes, ...]
    champion: bytes
    challenger: bytes


@dataclass(frozen=True)
class Votes:
    """What people chose. The prompt is the unit, however many people saw it.

    Attributes:
        share: of the challenger, over prompts; "same" is half a vote.
        low, high: 95% interval of the share (Wilson).
        same: share of the answers "same".
    """

    raters: int
    prompts: int
    share: float
    low: float
    high: float
    same: float


def place_challenger(comparison: str, key: str) -> str:
    """The side of the challenger's video of a prompt."""
    return "left" if _draw(comparison, key, "side") % 2 else "right"


def export_questions(folder: Path, comparison: str, questions: Sequence[Question]) -> Path:
    """Writes videos, pictures and `TABLE`, one row per question, with the column ``answer`` to fill in; returns its path.

    An existing table may hold answers and stays as it is.
    """
    table = folder / TABLE
    if table.exists():
        return table
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(_COLUMNS)
    for number, question in enumerate(sorted(questions, key=lambda each: _draw(comparison, each.key, "order")), 1):
        sides = [question.challenger, question.champion]
        if place_challenger(comparison, question.key) == "right":
            sides.reverse()
        videos = {f"{number:03}-{side}.mp4": data for side, data in zip(("left", "right"), sides, strict=True)}
        pictures = {f"{number:03}-reference-{place}.png": data for place, data in enumerate(question.references, 1)}
        for name, data in {**pictures, **videos}.items():
            write_bytes(folder / name, data)
        # A spreadsheet would compute what begins with one of these signs.
        prompt = f"'{question.prompt}" if question.prompt.startswith(tuple("=+-@\t\r\n")) else question.prompt
        writer.writerow((comparison, question.key, prompt, " ".join(pictures), *videos, ""))
    write_bytes(table, text.getvalue().encode("utf-8-sig"))  # the mark tells spreadsheets the encoding
    return table


def read_votes(source: Path, comparison: str, keys: Collection[str]) -> Votes:
    """Answers in a table of one person, or in a folder of several persons' tables. Questions may stay open.

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
    values = (share, *_wilson(share, len(means)), every.count("same") / len(every))
    return Votes(len(people), len(means), *(round(value, 6) for value in values))


def _load_answers(file: Path, comparison: str, keys: Collection[str]) -> dict[str, str]:
    answers: dict[str, str] = {}
    try:
        text = file.read_text("utf-8-sig")
        if any(len(line) > _MAX_LINE for line in text.splitlines()):
            raise ValueError(f"a line longer than {_MAX_LINE} characters")
        rows = [(row["comparison"], row["question"], row["answer"]) for row in csv.DictReader(io.StringIO(text, newline=""))]
    except (OSError, ValueError, KeyError, csv.Error) as error:
        raise ArtifactError(f"{file}: no table of answers ({error!r}); export it again with register.py ask.") from error
    for about, key, told in rows:
        answer = (told or "").strip().lower()
        if about != comparison:
            raise ArtifactError(f"{file}: answers about comparison {str(about)[:100]}, not {comparison}; export and ask again.")
        if key not in keys or answer not in ("", *_ANSWERS) or key in answers:
            strange = f"{key}: {answer}"[:100]
            raise ArtifactError(f"{file}: {strange!r} is no answer to a prompt of this comparison, or a second one; correct it.")
        if answer:
            answers[key] = answer
    return answers


def _wilson(share: float, count: int) -> tuple[float, float]:
    """Wilson's interval of a share. Half votes and means count like whole votes, which widens the interval."""
    centre = (share + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
    reach = _Z / (1 + _Z**2 / count) * math.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2))
    return max(0.0, centre - reach), min(1.0, centre + reach)


def _draw(*names: str) -> int:
    return int.from_bytes(hashlib.sha256("/".join(names).encode()).digest()[:8])
