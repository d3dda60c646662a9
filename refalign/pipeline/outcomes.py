"""What became of every planned item: written, filtered (not wanted) or quarantined (faulty), each with a reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

from refalign.errors import TooManyQuarantined

BESIDE = frozenset({"HIDDEN", "OWN_OUTPUT", "COMMENT"})
"""Reasons of files that are not part of the input: they are counted, and do not change the input's fingerprint."""
_FILTERED = frozenset(
    {"NOT_A_VIDEO", "UNSUPPORTED_PICTURE", "TOO_SHORT", "NO_SUBJECT", "DUPLICATE", "FILTERED_BEFORE", "NOT_ANNOTATED"}
    | {"TOO_BLURRED", "TOO_DARK", "CLIPPED", "NO_MOTION", "TOO_MUCH_MOTION", "POOR_CAPTION_MATCH", "NOT_AESTHETIC"}
    | {"NEAR_DUPLICATE", "CONTAMINATED", "TAKEN_DOWN"}
    | BESIDE
)
"""Every other reason is a fault and counts as quarantined."""

_OF_THE_PLACE = frozenset({"MISSING", "FORBIDDEN", "UNREACHABLE", "CHANGED"})
"""Faults of the place or the moment; every run tries again."""
_OF_THE_MOMENT = frozenset({"CRASH", "KILLS_WORKERS", "IO_ERROR"})
"""Faults that may also be the item's own: one later run tries again."""
_MOST_TRIES = 2


@dataclass(frozen=True)
class Outcome:
    """What became of one planned item; ``reason`` is empty if it was written."""

    level: str
    item: str
    reason: str = ""
    message: str = ""

    @property
    def status(self) -> str:
        if not self.reason:
            return "written"
        return "filtered" if self.reason in _FILTERED else "quarantined"


class Commit(dict[str, Any]):
    """The JSON that marks a part as done. Each stage adds fields of its own; what the pipeline itself reads is typed here."""

    @property
    def outcomes(self) -> list[Outcome]:
        return [Outcome(**each) for each in self.get("outcomes", ())]

    @property
    def work(self) -> list[str]:
        """Digests of the part's items, see `refalign.pipeline.reuse`."""
        return self.get("work") or []

    @property
    def has_faults_of_the_moment(self) -> bool:
        return any(each.reason in _OF_THE_MOMENT for each in self.outcomes)

    @property
    def may_pass(self) -> bool:
        """Whether the next run may find other outcomes, so that the part is not done."""
        tries_again = self.has_faults_of_the_moment and self.get("tries", 1) < _MOST_TRIES
        return tries_again or any(belongs_to_place(each.reason) for each in self.outcomes)


def belongs_to_place(reason: str) -> bool:
    """Whether a fault is that of the place where an item lies, not the item's."""
    return reason in _OF_THE_PLACE


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


class Manifest(BaseModel):
    """What a finished stage recorded: its ``manifest.json``."""

    model_config = ConfigDict(frozen=True)


class PartsManifest(Manifest):
    """Of a stage that is made of parts.

    Attributes:
        parts: names in the order of the plan.
        made_of: folders of the stages that these parts were made of.
        versions: folders of earlier versions that hold parts of this one.
        counts: by level (``video``, ``clip``).
        outcomes: the items that were filtered or quarantined.
    """

    parts: tuple[str, ...]
    made_of: tuple[str, ...] = ()
    versions: tuple[str, ...] = ()
    counts: dict[str, Counts] = {}
    outcomes: tuple[Outcome, ...] = ()


def count_outcomes(outcomes: Iterable[Outcome]) -> dict[str, Counts]:
    """Counts by level."""
    found: dict[str, dict[str, Counter[str]]] = {}
    for each in outcomes:
        of_level = found.setdefault(each.level, {"written": Counter(), "filtered": Counter(), "quarantined": Counter()})
        of_level[each.status][each.reason] += 1
    return {
        level: Counts(
            planned=sum(reasons.total() for reasons in of_level.values()),
            written=of_level["written"].total(),
            filtered=dict(sorted(of_level["filtered"].items())),
            quarantined=dict(sorted(of_level["quarantined"].items())),
        )
        for level, of_level in sorted(found.items())
    }


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
    return f"{item}: {deaths} workers died on it (a crash of the decoder, or too little memory)"
