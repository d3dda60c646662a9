"""Which subject a generated video shows in each slot: kinds of confusion.

A slot is one subject that the prompt asks for.

Source: MultiBind (arXiv 2603.21937) for the kinds of failure.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Fate = Literal["own", "swap", "dominance", "blending", "drift", "missing"]
FATES: tuple[Fate, ...] = ("own", "swap", "dominance", "blending", "drift", "missing")
"""What a slot shows: its own subject; another's, while its own is in another slot; another's, while its own is nowhere; a
mixture of its own and another's; nobody's; nothing."""
CONFUSED: tuple[Fate, ...] = ("swap", "dominance", "blending")
LEAD = 0.45
"""A slot shows a subject if its share of the telling attributes is this much above the other subject's."""
PRESENT = 0.5
"""Below this share of the telling attributes (of all, where a subject is alone) nobody is there."""


def find_fates(shown: Sequence[Sequence[object] | None], wanted: Sequence[Sequence[object]]) -> list[Fate]:
    """What each slot shows.

    Only attributes in which two subjects differ can tell them apart. A slot is compared with the other subject that leads its
    own by most in those.

    Args:
        shown: attributes read in each slot; None where nothing was found.
        wanted: attributes of the subjects, in the order of the slots.
    """
    rivals = [_find_rival(mine, wanted, slot) if mine else None for slot, mine in enumerate(shown)]
    taken_by = {slot: rival.slot for slot, rival in enumerate(rivals) if rival and rival.leads}
    fates: list[Fate] = []
    for slot, mine in enumerate(shown):
        rival = rivals[slot]
        if mine is None:
            fates.append("missing")
        elif rival is None:  # alone: nobody to be confused with
            fates.append("own" if _share(mine, wanted[slot], range(len(mine))) >= PRESENT else "drift")
        elif slot in taken_by:
            fates.append("swap" if slot in taken_by.values() else "dominance")
        else:
            fates.append(rival.fate_of_own)
    return fates


@dataclass(frozen=True)
class _Rival:
    """Another subject: its share of the attributes that tell the two apart, and the slot's own share."""

    slot: int
    theirs: float
    own: float

    @property
    def leads(self) -> bool:
        return self.theirs >= PRESENT and self.theirs - self.own >= LEAD

    @property
    def fate_of_own(self) -> Fate:
        if self.own >= PRESENT and self.own - self.theirs >= LEAD:
            return "own"
        return "blending" if self.own + self.theirs >= PRESENT and min(self.own, self.theirs) > 0 else "drift"


def _find_rival(mine: Sequence[object], wanted: Sequence[Sequence[object]], slot: int) -> _Rival | None:
    rivals = []
    for other, theirs in enumerate(wanted):
        telling = [index for index, value in enumerate(theirs) if value != wanted[slot][index]]
        if other != slot and telling:
            rivals.append(_Rival(other, _share(mine, theirs, telling), _share(mine, wanted[slot], telling)))
    return max(rivals, key=lambda rival: rival.theirs - rival.own, default=None)


def _share(first: Sequence[object], second: Sequence[object], places: Iterable[int]) -> float:
    return float(np.mean([first[place] == second[place] for place in places]))
