"""Does a video show the subject of a reference? Cosine of vision embeddings, read against other subjects' references.

A cosine alone says little: a small vision encoder calls everything similar. The same video is therefore also compared with
references it was not given, and what counts is how far its own stand out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from refalign.evaluation.confusion import copy_paste
from refalign.geometry import letterbox

_SCALES = (0.7, 0.5)
_FRAMES = 3
MEASURED = (
    "Attributes right, where a judge was asked: share of the attributes of all subjects that it read as the references and the "
    "prompt have them. "
    "Fidelity: highest cosine between the vision embedding of a reference and those of windows of the video "
    f"({_FRAMES} frames; the whole frame, and squares of {' and '.join(f'{scale:.0%}' for scale in _SCALES)} of its shorter "
    "side), mean over references. "
    "Chance: the same with references of other samples, which the video was not given. "
    "Own above other: share of (own, other) pairs in which the own reference scores higher; 50% is chance. "
    "Copy-paste: from -1 (the subject as its own clip shows it) to 1 (as the given picture, of another clip, shows it), by "
    "angles between embeddings, in the window nearest to either."
)


def make_windows(frames: UInt8[np.ndarray, "F H W 3"], side_px: int) -> UInt8[np.ndarray, "N side side 3"]:
    """Whole frames, letterboxed, and overlapping square windows of some frames, all resized to ``side_px``."""
    shown = frames[np.linspace(0, len(frames) - 1, min(_FRAMES, len(frames))).round().astype(int)]
    windows = []
    for frame in shown:
        windows.append(letterbox(frame, side_px, side_px)[0])
        for scale in _SCALES:
            edge = max(1, round(min(frame.shape[:2]) * scale))
            for top in _places(frame.shape[0], edge):
                for left in _places(frame.shape[1], edge):
                    cut = Image.fromarray(frame[top : top + edge, left : left + edge])
                    windows.append(np.asarray(cut.resize((side_px, side_px), Image.Resampling.BICUBIC)))
    return np.stack(windows)


def best_match(
    references: Float[np.ndarray, "R E"], windows: Float[np.ndarray, "N E"]
) -> Float[np.ndarray, "R"]:  # embeddings are L2-normalised
    """Highest cosine of each reference over the windows."""
    return (references @ windows.T).max(axis=1)


def measure_copy_paste(
    windows: Float[np.ndarray, "N E"], given: Float[np.ndarray, "E"], target: Float[np.ndarray, "E"]
) -> float:  # embeddings are L2-normalised
    """`copy_paste` of the window that is nearest to the given picture or to the target."""
    cosines = windows @ np.stack([target, given]).T
    to_target, to_given = cosines[cosines.max(1).argmax()]
    return copy_paste(float(to_target), float(to_given), float(given @ target))


def score_video(own: Sequence[float], other: Sequence[float], pasted: Sequence[float] = ()) -> dict[str, Any]:
    """Numbers of one video from the best matches of its own references and of others', and each reference's copy-paste."""
    above = [float(mine > theirs) + 0.5 * float(mine == theirs) for mine in own for theirs in other]
    return {
        "fidelity": _mean(own),
        "chance": _mean(other),
        "own_above_other": _mean(above),
        "copy_paste": _mean(pasted),
        "per_reference": [round(float(value), 6) for value in own],
    }


def average_scores(videos: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean over videos of each score that was measured; a score measured on none is absent."""
    averages = {}
    for name in ("judged", "fidelity", "chance", "own_above_other", "copy_paste"):
        values = [video[name] for video in videos if video.get(name) is not None]
        if values:
            averages[name] = round(float(np.mean(values)), 6)
    return averages


def _places(length: int, edge: int) -> list[int]:
    """Starts of windows that overlap by half and reach both ends."""
    count = int(np.ceil((length - edge) / (edge / 2))) + 1
    return sorted({round(start) for start in np.linspace(0, length - edge, count)})


def _mean(values: Sequence[float]) -> float | None:
    return round(float(np.mean(values)), 6) if len(values) else None
