"""What became of every planned item: written, filtered (not wanted) or quarantined (a fault), with its reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

from refalign.errors import TooManyQuarantined

BESIDE = frozenset({"HIDDEN", "OWN_OUTPUT", "COMMENT"})
"""Reasons of what only lies beside the input: it is counted, and the input stays the same with or without it."""
_FILTERED = frozenset(
    {"NOT_A_VIDEO", "UNSUPPORTED_PICTURE", "TOO_SHORT", "NO_SUBJECT", "DUPLICATE", "FILTERED_BEFORE", "NOT_ANNOTATED"}
    | {"TOO_BLURRED", "TOO_DARK", "CLIPPED", "NO_MOTION", "TOO_MUCH_MOTION", "POOR_CAPTION_MATCH", "NOT_AESTHETIC"}
    | {"NEAR_DUPLICATE", "CONTAMINATED", "TAKEN_DOWN"}
    | BESIDE
)
"""Reasons that mean "not wanted"; every other reason is a fault and counts as quarantined."""

_OF_THE_PLACE = frozenset({"MISSING", "FORBIDDEN", "UNREACHABLE", "CHANGED"})
"""Faults of the place or the moment; every run tries again."""
_OF_THE_MOMENT = frozenset({"CRASH", "KILLS_WORKERS", "IO_ERROR"})
"""Faults that may be the item's own as well: a later run tries once more, and then they hold."""
_MOST_TRIES = 2


@dataclass(frozen=True)
class Outcome:
    """What became of one planned item; ``reason`` is empty when it was written."""

    level: str
    item: str
    reason: str = ""
    message: str = ""

    @property
    def status(self) -> str:
        if not self.reason:
            return "written"
        return "filtered" if self.reason in _FILTERED else "quarantined"


def belongs_to_place(reason: str) -> bool:
    """Whether a fault is that of the place where an item lies, not the item's."""
    return reason in _OF_THE_PLACE


def may_pass(commit: Mapping[str, Any]) -> bool:
    """Whether a part has outcomes that may be others in the next run, so that it is not done."""
    reasons = {outcome["reason"] for outcome in commit.get("outcomes", ())}
    return bool(reasons & _OF_THE_PLACE) or (bool(reasons & _OF_THE_MOMENT) and commit.get("tries", 1) < _MOST_TRIES)


def count_tries(commit: Mapping[str, Any], load_earlier: Callable[[], Mapping[str, Any] | None]) -> dict[str, Any]:
    """What a commit with faults of the moment says besides: in how many runs they came up."""
    reasons = {outcome["reason"] for outcome in commit.get("outcomes", ())}
    return {"tries": (load_earlier() or {}).get("tries", 0) + 1} if reasons & _OF_THE_MOMENT else {}


class Counts(BaseModel):
    """Of the items of one level: planned = written + filtered + quarantined, both of the latter by reason."""

    model_config = ConfigDict(frozen=True)

    planned: int
    written: int
    filtered: dict[str, int] = {}
    quarantined: dict[str, int] = {}

    @property
    def lost(self) -> dict[str, int]:
        """Items that were not written, by reason."""
        return self.filtered | self.quarantined


class Counted(BaseModel):
    """What a stage says of its items.

    Attributes:
        counts: by level (``video``, ``clip``).
        outcomes: the items that were filtered or quarantined.
    """

    model_config = ConfigDict(frozen=True)

    counts: dict[str, Counts] = {}
    outcomes: tuple[Outcome, ...] = ()


def count_outcomes(outcomes: Sequence[Outcome]) -> dict[str, Counts]:
    """Counts by level."""
    counts = {}
    for level in sorted({outcome.level for outcome in outcomes}):
        of_level = [outcome for outcome in outcomes if outcome.level == level]
        reasons = {
            kind: dict(sorted(Counter(each.reason for each in of_level if each.status == kind).items()))
            for kind in ("filtered", "quarantined")
        }
        written = sum(each.status == "written" for each in of_level)
        counts[level] = Counts(planned=len(of_level), written=written, **reasons)
    return counts


def check_quarantined(counts: Mapping[str, Counts], outcomes: Iterable[Outcome], limit: float) -> None:
    """Refuses a stage with more faults than are tolerated.

    Args:
        limit: largest share of the items of a level that may be faulty.

    Raises:
        TooManyQuarantined: counts the faults and shows the first.
    """
    for level, count in sorted(counts.items(), reverse=True):  # videos before their clips
        faults = sum(count.quarantined.values())
        if faults and faults > limit * count.planned:
            reasons = ", ".join(f"{reason} {n}" for reason, n in Counter(count.quarantined).most_common())
            first = next(each for each in outcomes if each.level == level and each.reason in count.quarantined)
            raise TooManyQuarantined(
                "TOO_MANY_QUARANTINED",
                f"{faults} of {count.planned} {level}s were quarantined ({reasons}); the limit is {limit}. "
                f"First: {first.message}. Raise curation.max_quarantine_fraction to continue.",
            )


def describe_deaths(item: str, deaths: int) -> str:
    """What is said of an item that is left out because workers died on it."""
    return f"{item}: {deaths} workers died while they were at it (a crash of the decoder, or too little memory)"
