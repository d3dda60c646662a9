"""What one clip shows of its case, as numbers, and what many clips show together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from refalign.evaluation.confusion import CONFUSED, FATES, copy_paste, find_fates, interference
from refalign.evaluation.opens2v import motion_amplitude
from refalign.toy.cases import Case
from refalign.toy.drawing import render_reference
from refalign.toy.identities import HIDDEN_ATTRIBUTES, SPOKEN_ATTRIBUTES
from refalign.toy.judges import VOCABULARIES, encode_truth
from refalign.toy.measures import colour_likeness, edge_likeness
from refalign.toy.rendering import boxes_of
from refalign.toy.scenes import FRAME_SIZE_PX
from refalign.toy.seeing import Seen, assign

PHASES = 6
"""Moments of a pose's cycle that a subject's outline is compared with."""
OUTLINE_PX = 24
WHITE = 250
"""A reference's background has no channel below it."""

_BY_SIZE = ("fidelity", "text", "pose")
_NUMBERS = (*_BY_SIZE, "chance", "copy_paste", "colour", "edges", "motion_amplitude", "smoothness", "doubled")

Record = dict[str, Any]
Shown = list[str | None] | None


def score_clip(case: Case, clip: np.ndarray, seen: Sequence[Seen], other: Case | None = None) -> Record:
    """What one clip shows of its case; plain values.

    fidelity, text, pose: shares of hidden attributes, spoken attributes and poses that are as wanted (None: nothing was asked);
    carried: fidelity by hidden attribute; chance and carried_by_chance: both against ``other``;
    fates and interference: `refalign.evaluation.confusion`; doubled: subjects too many; copy_paste, colour, edges: means over
    the subjects found, against their reference pictures; motion in px per frame; smoothness: 1 - mean distance of a frame from
    the mean of its neighbours, in [0, 1].

    Args:
        other: the case with another's hidden looks (`refalign.toy.cases.shuffle_references`), whose fidelity is chance.
    """
    subjects = case.plan.subjects
    truths, found, wanted, shown = _match(case, seen)
    spoken = [
        each is not None and each.reading.answers[name] == VOCABULARIES[name][truth[name]]
        for each, truth, subject in zip(found, truths, subjects, strict=True)
        for name in SPOKEN_ATTRIBUTES
        if subject.named or case.given
    ]
    poses = [
        each is not None and each.reading.answers["pose"] == subject.pose for each, subject in zip(found, subjects, strict=True)
    ]
    record: Record = {
        "key": case.key,
        "subjects": len(subjects),
        "likeness": case.plan.likeness,
        "found": len(seen),
        "doubled": max(0, len(seen) - len(subjects)),
        "text": _mean(spoken),
        "pose": _mean(poses),
        "motion_amplitude": round(motion_amplitude(clip), 4),
        "smoothness": round(1 - float(np.abs(clip[1:-1] - (clip[:-2].astype(float) + clip[2:]) / 2).mean()) / 255, 4),
    }
    if case.given:
        record |= {
            "fidelity": _fidelity(shown, wanted),
            "carried": _carried(shown, wanted),
            "fates": find_fates(shown, wanted),
            "interference": interference(shown, wanted).round(3).tolist(),
            **_compare_pictures(case, clip, found),
            # Whoever is pasted stands as in the picture, not as asked: it is known by its looks alone.
            "copy_paste": _copy_paste(case, assign(seen, truths, [HIDDEN_ATTRIBUTES] * len(truths))),
        }
    if other is not None:
        _, _, wanted, shown = _match(other, seen)
        record |= {"chance": _fidelity(shown, wanted), "carried_by_chance": _carried(shown, wanted)}
    return record


def _match(case: Case, seen: Sequence[Seen]) -> tuple[list[dict[str, int]], list[Seen | None], list[list[str]], list[Shown]]:
    """Of each subject: its truth, who was found for it, and the hidden attributes wanted and shown."""
    subjects = case.plan.subjects
    truths = [encode_truth(subject.identity, subject.pose) for subject in subjects]
    told = [(*(SPOKEN_ATTRIBUTES if subject.named else ()), "pose") for subject in subjects]
    found = assign(seen, truths, told, x_px=[subject.x_px[0] for subject in subjects])
    wanted = [[VOCABULARIES[name][truth[name]] for name in HIDDEN_ATTRIBUTES] for truth in truths]
    shown = [None if each is None else [each.reading.answers[name] for name in HIDDEN_ATTRIBUTES] for each in found]
    return truths, found, wanted, shown


def _agreement(shown: Sequence[Shown], wanted: Sequence[Sequence[str]]) -> np.ndarray:
    """Whether each subject shows each hidden attribute as wanted: bool [subjects, attributes]."""
    return np.array(
        [[bool(mine) and mine[place] == value for place, value in enumerate(theirs)] for mine, theirs in zip(shown, wanted)]
    )


def _fidelity(shown: Sequence[Shown], wanted: Sequence[Sequence[str]]) -> float:
    return float(_agreement(shown, wanted).mean())


def _carried(shown: Sequence[Shown], wanted: Sequence[Sequence[str]]) -> dict[str, float]:
    shares = _agreement(shown, wanted).mean(0)
    return {name: round(float(share), 4) for name, share in zip(HIDDEN_ATTRIBUTES, shares, strict=True)}


def _compare_pictures(case: Case, clip: np.ndarray, found: Sequence[Seen | None]) -> dict[str, float | None]:
    """How alike each subject and its reference are, without any network; in the frame that shows most of it."""
    colour, edges = [], []
    for picture, each in zip(case.references, found, strict=True):
        if each is not None and each.masks.any():
            fullest = int(each.masks.sum((1, 2)).argmax())
            pair = clip[each.frames[fullest]], each.masks[fullest], picture, picture.min(2) < WHITE
            colour.append(colour_likeness(*pair))
            edges.append(edge_likeness(*pair))
    return {"colour": _mean(colour), "edges": _mean(edges)}


def _copy_paste(case: Case, found: Sequence[Seen | None]) -> float | None:
    """By silhouettes: the pose that the prompt asks for, at some moment, against the one in the reference picture."""
    values = []
    for subject, picture, each in zip(case.plan.subjects, case.references, found, strict=True):
        if each is None:
            continue
        moments = [
            render_reference(subject.identity, subject.pose, FRAME_SIZE_PX, phase=step / PHASES, yaw=yaw)
            for step in range(PHASES)
            for yaw in subject.yaw
        ]
        asked, given = np.stack([outline(moment.min(2) < WHITE) for moment in moments]), outline(picture.min(2) < WHITE)
        between = float((asked @ given).max())
        made = [outline(mask) for mask in each.masks if mask.any()]
        values += [copy_paste(float((asked @ one).max()), float(one @ given), between) for one in made]
    return _mean(values)


def outline(mask: np.ndarray) -> np.ndarray:
    """The silhouette bool [H, W] in its box, its proportions kept, as a vector of length 1."""
    x0, y0, x1, y1 = (int(value) for value in boxes_of(mask))
    side = max(x1 - x0, y1 - y0)
    top, left = side - (y1 - y0), (side - (x1 - x0)) // 2
    square = np.zeros((side, side), np.float32)
    square[top : top + y1 - y0, left : left + x1 - x0] = mask[y0:y1, x0:x1]
    small = np.asarray(Image.fromarray(square).resize((OUTLINE_PX, OUTLINE_PX), Image.Resampling.BOX)).ravel()
    return small / float(np.linalg.norm(small))


def summarise(records: Sequence[Record]) -> Record:
    """Means over clips, some also by number of subjects and by attribute, and the share of each fate over slots."""
    summary: Record = {"clips": len(records)}
    for name in _NUMBERS:
        told = [(record["subjects"], record[name]) for record in records if record.get(name) is not None]
        if told:
            summary[name] = _mean([value for _, value in told])
        if told and name in _BY_SIZE:
            for size in sorted({size for size, _ in told}):
                summary[f"{name}_of_{size}"] = _mean([value for each, value in told if each == size])
    for name in HIDDEN_ATTRIBUTES:
        for kind, source in (("fidelity", "carried"), ("chance", "carried_by_chance")):
            if carried := [record[source][name] for record in records if source in record]:
                summary[f"{kind}_{name}"] = _mean(carried)
    several = [fate for record in records for fate in record.get("fates", ()) if record["subjects"] > 1]
    if several:
        summary |= {f"fate_{fate}": round(several.count(fate) / len(several), 4) for fate in FATES}
        summary["confusion"] = round(sum(several.count(fate) for fate in CONFUSED) / len(several), 4)
    return summary


def _mean(values: Sequence[float]) -> float | None:
    return round(float(np.mean(values)), 4) if values else None
