"""What became of every planned item: written, filtered (not wanted) or quarantined (a fault), with its reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from refalign.errors import TooManyQuarantined

_FILTERED = frozenset(
    {"NOT_A_VIDEO", "UNSUPPORTED_PICTURE", "TOO_SHORT", "NO_SUBJECT", "DUPLICATE", "FILTERED_BEFORE"}
    | {"TOO_BLURRED", "TOO_DARK", "CLIPPED", "NO_MOTION", "TOO_MUCH_MOTION", "POOR_CAPTION_MATCH", "NOT_AESTHETIC"}
    | {"NEAR_DUPLICATE", "CONTAMINATED", "TAKEN_DOWN"}
)
"""Reasons that mean "not wanted"; every other reason is a fault and counts as quarantined."""


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


def count_outcomes(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Per level: planned = written + filtered + quarantined, and both of the latter by reason."""
    counts: dict[str, Any] = {}
    for level in sorted({outcome.level for outcome in outcomes}):
        of_level = [outcome for outcome in outcomes if outcome.level == level]
        status = Counter(outcome.status for outcome in of_level)
        counts[level] = {
            "planned": len(of_level),
            "written": status["written"],
            **{
                kind: dict(sorted(Counter(o.reason for o in of_level if o.status == kind).items()))
                for kind in ("filtered", "quarantined")
            },
        }
    return counts


def check_quarantined(described: Mapping[str, Any], limit: float) -> None:
    """Refuses a step with more faults than are tolerated.

    Args:
        described: what the step's manifest will say: ``counts``, as `count_outcomes` gives them, and ``outcomes``.
        limit: largest share of the items of a level that may be faulty.

    Raises:
        TooManyQuarantined: counts the faults and shows the first.
    """
    for level, count in sorted(described["counts"].items(), reverse=True):  # videos before their clips
        faults = sum(count["quarantined"].values())
        if faults and faults > limit * count["planned"]:
            reasons = ", ".join(f"{reason} {n}" for reason, n in Counter(count["quarantined"]).most_common())
            of_level = [outcome for outcome in described["outcomes"] if outcome["level"] == level]
            first = next(outcome for outcome in of_level if outcome["reason"] in count["quarantined"])
            raise TooManyQuarantined(
                "TOO_MANY_QUARANTINED",
                f"{faults} of {count['planned']} {level}s were quarantined ({reasons}); the limit is {limit}. "
                f"First: {first['message']}. Raise curation.max_quarantine_fraction to continue.",
            )


def describe_deaths(item: str, deaths: int) -> str:
    """What is said of an item that is left out because workers died on it."""
    return f"{item}: {deaths} workers died while they were at it (a crash of the decoder, or too little memory)"
