"""Whether a video shows the subjects of its references: cosines of vision embeddings, beside those of other references.

A small vision encoder finds all pictures similar, so a cosine alone says little. The video is therefore also compared with
references that it was not made from.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from refalign.evaluation.results import VideoScores
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
    windows = []
    for frame in frames[np.linspace(0, len(frames) - 1, min(_FRAMES, len(frames))).round().astype(int)]:
        windows.append(letterbox(frame, side_px, side_px)[0])
        for scale in _SCALES:
            edge = max(1, round(min(frame.shape[:2]) * scale))
            for top, left in product(_places(frame.shape[0], edge), _places(frame.shape[1], edge)):
                cut = Image.fromarray(frame[top : top + edge, left : left + edge])
                windows.append(np.asarray(cut.resize((side_px, side_px), Image.Resampling.BICUBIC)))
    return np.stack(windows)


def best_match(references: Sequence[Float[np.ndarray, "E"]], windows: Float[np.ndarray, "N E"]) -> list[float]:
    """Highest cosine of each reference over the windows; all embeddings are L2-normalised."""
    return (np.stack(references) @ windows.T).max(axis=1).tolist() if len(references) else []


def measure_copy_paste(windows: Float[np.ndarray, "N E"], given: Float[np.ndarray, "E"], target: Float[np.ndarray, "E"]) -> float:
    """How far a subject is pulled towards its given picture, from -1 to 1, in the window that is nearest to it or to the target.

    (angle to the target - angle to the given picture) / angle between these two: 1 is a copy of the given picture, -1 is the
    subject as the target shows it. All embeddings are L2-normalised.

    Args:
        target: the subject's picture in the clip of the prompt.

    Source: WithAnyone (arXiv 2510.14975).
    """
    cosines = windows @ np.stack([target, given]).T
    to_target, to_given = cosines[cosines.max(1).argmax()]
    angles = np.arccos(np.clip(np.array([to_target, to_given, given @ target], float), -1, 1))
    return float(np.clip((angles[0] - angles[1]) / max(angles[2], 1e-3), -1, 1))


def score_video(
    own: Sequence[float], other: Sequence[float], pasted: Sequence[float] = (), judged: float | None = None
) -> VideoScores:
    """Scores of one video from the best matches of its own and of other references, and the copy-paste of its references."""
    above = [float(mine > theirs) + 0.5 * float(mine == theirs) for mine in own for theirs in other]
    return VideoScores(
        judged=judged,
        fidelity=_mean(own),
        chance=_mean(other),
        own_above_other=_mean(above),
        copy_paste=_mean(pasted),
        per_reference=[round(float(value), 6) for value in own],
    )


def _places(length: int, edge: int) -> list[int]:
    """Starts of windows that overlap by half and reach both ends."""
    count = int(np.ceil((length - edge) / (edge / 2))) + 1
    return sorted({round(start) for start in np.linspace(0, length - edge, count)})


def _mean(values: Sequence[float]) -> float | None:
    return round(float(np.mean(values)), 6) if len(values) else None
