"""What a generated sprite clip shows: subjects followed by the judges' detector, attributes and poses read by the reader."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from refalign.models.yolo import Detector, load_detector
from refalign.toy.judges import Judge, Reading, cut_crops, measure_travel
from refalign.toy.scenes import NUM_FRAMES

MIN_SCORE = 0.5
ORDER_WEIGHT = 3.0
"""What a place at the wrong end of the row costs, in nats; a question answered otherwise costs up to 9."""
MIN_FRAMES = NUM_FRAMES // 2
"""Frames that a subject must be found in to count."""


@dataclass(frozen=True)
class Seen:
    """One subject of a clip, in the F' frames that it was found in.

    Attributes:
        frames: int [F'], which frames.
        boxes_xyxy_px: float [F', 4].
        masks: bool [F', H, W].
    """

    frames: np.ndarray
    boxes_xyxy_px: np.ndarray
    masks: np.ndarray
    reading: Reading


class Watcher:
    """The judges' detector and reader."""

    def __init__(self, detector: Detector, judge: Judge) -> None:
        self._detector, self._judge = detector, judge

    @classmethod
    def load(cls, judges: Path) -> Watcher:
        """Loads ``detector/`` and ``reader/`` of a folder.

        Raises:
            ArtifactError: one is missing.
        """
        return cls(load_detector(judges / "detector", min_score=MIN_SCORE), Judge.load(judges / "reader"))

    def watch(self, clip: np.ndarray) -> list[Seen]:
        """Every subject that is followed through at least ``MIN_FRAMES`` of the frames uint8 [F, H, W, 3]."""
        tracks: dict[int, list[tuple[int, np.ndarray, np.ndarray]]] = {}
        for number, found in enumerate(self._detector.track(clip)):
            assert found.track_ids is not None
            for track, box, mask in zip(found.track_ids.tolist(), found.boxes_xyxy_px, found.masks, strict=True):
                tracks.setdefault(track, []).append((number, box, mask))
        return [self._look(clip, track) for _, track in sorted(tracks.items()) if len(track) >= MIN_FRAMES]

    def _look(self, clip: np.ndarray, track: list[tuple[int, np.ndarray, np.ndarray]]) -> Seen:
        numbers, boxes, masks = (np.stack(values) for values in zip(*track, strict=True))
        (reading,) = self._judge.read(cut_crops(clip[numbers], boxes)[None], measure_travel(boxes)[None])
        return Seen(numbers, boxes, masks, reading)


def assign(
    seen: Sequence[Seen],
    truths: Sequence[dict[str, int]],
    questions: Sequence[Sequence[str]],
    *,
    x_px: Sequence[float] | None = None,
    tie_break: float = 0.02,
) -> list[Seen | None]:
    """For each wanted subject the one that stands for it (None: nobody is left), by the likeliest pairing.

    Args:
        questions: per wanted subject what it is known by; the other questions count ``tie_break`` times as much.
        x_px: where each is wanted in the first frame, of which only the order counts, as captions tell it; None: anywhere.
    """
    from scipy.optimize import linear_sum_assignment  # making clips does without SciPy, judging them does not

    if not seen:
        return [None] * len(truths)
    pairs = zip(truths, questions, strict=True)
    cost = np.array([[_unlikeliness(each.reading, *wanted, tie_break) for each in seen] for wanted in pairs])
    if x_px is not None:
        stands = [float(each.boxes_xyxy_px[0, [0, 2]].mean()) for each in seen]
        cost += ORDER_WEIGHT * np.abs(_places_in_row(x_px)[:, None] - _places_in_row(stands))
    rows, columns = linear_sum_assignment(cost)
    chosen = dict(zip(rows.tolist(), columns.tolist(), strict=True))
    return [seen[chosen[number]] if number in chosen else None for number in range(len(truths))]


def _places_in_row(x_px: Sequence[float]) -> np.ndarray:
    """From 0, the leftmost, to 1."""
    return np.argsort(np.argsort(x_px)) / max(1, len(x_px) - 1)


def _unlikeliness(reading: Reading, truth: dict[str, int], questions: Sequence[str], tie_break: float) -> float:
    weights = {name: 1.0 if name in questions else tie_break for name in truth}
    return -sum(weight * float(np.log(reading.probabilities[name][truth[name]] + 1e-4)) for name, weight in weights.items())
