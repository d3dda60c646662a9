"""What the judge reads in a clip, against what is known of its subjects; and the means over many clips.

Hidden attributes, which no prompt says, are *fidelity*: they can only come from the references.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from typing import NotRequired, TypedDict

import numpy as np

from refalign.evaluation.confusion import CONFUSED, FATES, Fate, find_fates
from refalign.toy.identities import HIDDEN_ATTRIBUTES, SPOKEN_ATTRIBUTES, Likeness, attributes_of
from refalign.toy.judge import Reading, is_occupied, read_clip
from refalign.toy.scenes import SIDES
from workshop.judging.cases import Case


class Record(TypedDict):
    """What one clip shows of its case; a line of ``clips.jsonl``. Lists hold a value per subject.

    Attributes:
        subjects: their number.
        named: whether the prompt says shape and colour.
        shown: attribute -> value as read; None: nobody stands there.
        right: whether each attribute and the action is as wanted.
        unexplained: of `refalign.toy.judge.Reading`.
        extra: slots that somebody fills unasked.
        fates: of `refalign.evaluation.confusion`. This and the rest are there only if the case has references.
        copy_paste: whether the reference's action is shown and not the asked one, from -1 to 1.
        chance: whether each hidden attribute is that of another case.
    """

    key: str
    subjects: int
    likeness: Likeness | None
    named: list[bool]
    shown: list[dict[str, str | None] | None]
    right: list[dict[str, bool]]
    unexplained: list[float | None]
    extra: int
    fates: NotRequired[list[Fate]]
    copy_paste: NotRequired[list[float | None]]
    chance: NotRequired[list[dict[str, bool]]]


def score_clip(case: Case, clip: np.ndarray, other: Case | None = None) -> Record:
    """What one clip, uint8 [F, H, W, 3], shows of its case.

    Args:
        other: the case with another's hidden looks (`workshop.judging.cases.shuffle_references`), whose fidelity is chance.
    """
    subjects = case.plan.subjects
    cast = [subject.identity for subject in subjects]
    seen = read_clip(clip, {subject.side: [subject.identity, *cast] for subject in subjects})
    readings = [seen[subject.side] for subject in subjects]
    wanted = [{**asdict(attributes_of(subject.identity)), "action": subject.action} for subject in subjects]
    record: Record = {
        "key": case.key,
        "subjects": len(subjects),
        "likeness": case.plan.likeness,
        "named": [subject.named for subject in subjects],
        "shown": [reading.answers if reading else None for reading in readings],
        "right": [_compare(*pair) for pair in zip(readings, wanted, strict=True)],
        "unexplained": [round(reading.unexplained, 3) if reading else None for reading in readings],
        "extra": sum(is_occupied(clip, side) for side in SIDES if side not in seen),
    }
    if case.given:
        hidden = [[each[name] for name in HIDDEN_ATTRIBUTES] for each in wanted]
        shown = [[each.answers[name] for name in HIDDEN_ATTRIBUTES] if each else None for each in readings]
        record["fates"] = find_fates(shown, hidden)
        record["copy_paste"] = [
            float(np.mean([(each == pose.action) - (each == subject.action) for each in reading.moments])) if reading else None
            for reading, subject, pose in zip(readings, subjects, case.given, strict=True)
        ]
    if other is not None:
        theirs = [asdict(attributes_of(subject.identity)) for subject in other.plan.subjects]
        record["chance"] = [_compare(*pair) for pair in zip(readings, theirs, strict=True)]
    return record


def _compare(reading: Reading | None, wanted: dict[str, str]) -> dict[str, bool]:
    return {name: reading is not None and reading.answers[name] == value for name, value in wanted.items()}


def summarise(records: Sequence[Record]) -> dict[str, float]:
    """Means over subjects: fidelity and its chance by number of subjects, tier and attribute; spoken attributes; fates."""
    values: dict[str, list[float]] = defaultdict(list)
    for record in records:
        size, tier = f"of {record['subjects']}", record["likeness"] or "alone"
        for place, right in enumerate(record["right"]):
            values["found"].append(record["shown"][place] is not None)
            values["action"].append(right["action"])
            for name in SPOKEN_ATTRIBUTES if record["named"][place] else ():
                for key in ("spoken", f"spoken {size}", name):
                    values[key].append(right[name])
            if "fates" not in record:
                continue
            for name in HIDDEN_ATTRIBUTES:
                for key in ("fidelity", f"fidelity {size}", f"fidelity {name}", f"fidelity, {tier}"):
                    values[key].append(right[name])
                if "chance" in record:
                    for key in ("chance", f"chance {size}", f"chance {name}"):
                        values[key].append(record["chance"][place][name])
            if (pasted := record["copy_paste"][place]) is not None:
                values["copy_paste"].append(pasted)
        values["number"].append(not record["extra"] and all(record["shown"]))
        if "fates" in record and record["subjects"] > 1:
            for fate in record["fates"]:
                for key in ("", f", {tier}"):
                    values[f"confusion{key}"].append(fate in CONFUSED)
                    for each in FATES:
                        values[f"fate {each}{key}"].append(fate == each)
    return {"clips": len(records), **{name: round(float(np.mean(each)), 4) for name, each in sorted(values.items())}}
