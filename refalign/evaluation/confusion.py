"""Whose looks a generated subject has, and whether it is pasted: measures of confusion and copy-paste as pure functions.

A slot is one subject that the prompt asks for; ``agreement[i, j]`` is how far what was generated in slot i agrees with the
reference of slot j. Taking off how far the references agree among themselves leaves the model's own faults: below zero on the
diagonal it lost its subject, above zero beside it another subject came in.

Source: MultiBind (arXiv 2603.21937) for the difference of matrices and the kinds of failure; WithAnyone (arXiv 2510.14975) for
copy-paste.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

Fate = Literal["own", "swap", "dominance", "blending", "drift", "missing"]
FATES: tuple[Fate, ...] = ("own", "swap", "dominance", "blending", "drift", "missing")
"""What can become of a slot: its own subject; another's, its own being in another slot; another's, its own being nowhere; a
mixture of its own and another's; nobody's; nothing there."""
CONFUSED: tuple[Fate, ...] = ("swap", "dominance", "blending")
LEAD = 0.45
"""How far one subject's share of the telling attributes must be above the other's for the slot to be its own."""
PRESENT = 0.5
"""Share of the telling attributes (of all, where a subject is alone) below which nobody is there."""


def agreement(shown: Sequence[Sequence[object] | None], wanted: Sequence[Sequence[object]]) -> Float[np.ndarray, "N N"]:
    """Share of attributes that slot i (row) shows and subject j (column) has; 0 where nothing is shown."""
    return np.array([[_share(mine, theirs, range(len(theirs))) if mine else 0.0 for theirs in wanted] for mine in shown])


def interference(shown: Sequence[Sequence[object] | None], wanted: Sequence[Sequence[object]]) -> Float[np.ndarray, "N N"]:
    """Agreement of the generated slots with the subjects, less that of the subjects among themselves."""
    return agreement(shown, wanted) - agreement(wanted, wanted)


def find_fates(shown: Sequence[Sequence[object] | None], wanted: Sequence[Sequence[object]]) -> list[Fate]:
    """What became of each slot.

    Only attributes in which a slot's subject differs from the other can tell the two apart; a slot is judged against the
    subject whose share of those is largest.

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
    """The other subject that a slot is nearest to: its share of the attributes that tell the two apart, and the slot's own."""

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


def copy_paste(to_target: float, to_reference: float, between: float) -> float:
    """Pull towards the given picture, in [-1, 1]: (angle to the target - angle to the reference) / angle between the two.

    1 is a copy of the reference picture, -1 the subject as the prompt asks for it.

    Args:
        to_target: cosine of the generated subject with its picture in the scene that was asked for.
        to_reference: cosine with the reference picture.
        between: cosine of these two pictures.
    """
    angles = np.arccos(np.clip([to_target, to_reference, between], -1, 1))
    return float(np.clip((angles[0] - angles[1]) / max(angles[2], 1e-3), -1, 1))


def _find_rival(mine: Sequence[object], wanted: Sequence[Sequence[object]], slot: int) -> _Rival | None:
    rivals = []
    for other, theirs in enumerate(wanted):
        telling = [index for index, value in enumerate(theirs) if value != wanted[slot][index]]
        if other != slot and telling:
            rivals.append(_Rival(other, _share(mine, theirs, telling), _share(mine, wanted[slot], telling)))
    return max(rivals, key=lambda rival: rival.theirs - rival.own, default=None)


def _share(first: Sequence[object], second: Sequence[object], places: Sequence[int] | range) -> float:
    return float(np.mean([first[place] == second[place] for place in places]))
