"""The scene of a clip as a reference: one frame of it, its subjects cut out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from refalign.config import RunConfig
from refalign.curation.masks import cut_out, has_content
from refalign.curation.quality import measure_sharpness
from refalign.curation.shots import Window
from refalign.curation.subjects import Box, Candidate
from refalign.io.images import encode_png

_MIN_VISIBLE_FRACTION = 0.4
"""Of the frame: behind more subjects than that there is no place to be seen."""
_MARGIN = 0.01
"""Cut out around each mask, as a share of the frame's long side: masks end a little inside of what they mask."""


def make_scene_row(candidates: Sequence[Candidate], window: Window, crop: Box, config: RunConfig) -> dict[str, Any] | None:
    """The columns of `refalign.io.tables.SUBJECT`, save id and embedding; None where subjects hide most of it, or it is blank.

    Of the frames in which most subjects were found, the one that shows most of the scene: where a subject was missed, it would
    be left standing in its scene. What fills the frame is the scene itself and is not cut out.
    """
    left, top, right, bottom = crop
    largest_px = config.curation.max_area_fraction * (right - left) * (bottom - top)
    subjects = [candidate for candidate in candidates if candidate.area_px <= largest_px]
    views: list[tuple[int, float, int, np.ndarray]] = []
    for position in {candidate.frame for candidate in subjects}:
        here = [candidate for candidate in subjects if candidate.frame == position]
        visible = ~_grow(np.any([candidate.mask for candidate in here], axis=0))
        share = float(visible[top:bottom, left:right].mean())
        views.append((len({candidate.track for candidate in here}), share, position, visible))
    if not views:
        return None
    _, share, position, visible = max(views, key=lambda view: (view[0], view[1], -view[2]))
    if share < _MIN_VISIBLE_FRACTION:
        return None
    frame = window.frames[position]
    if not has_content(frame, visible, crop):
        return None
    return {
        "class_name": "scene",
        "frame_time_s": window.frame_indices[position] / config.video.fps,
        "box_xyxy_px": list(crop),
        "area_fraction": 1.0,
        "score": share,
        "sharpness": measure_sharpness(frame[top:bottom, left:right]),
        "crop_png": encode_png(cut_out(frame, visible, crop, (config.video.height_px, config.video.width_px))),
    }


def _grow(mask: np.ndarray) -> np.ndarray:
    import cv2

    margin_px = max(1, round(_MARGIN * max(mask.shape)))
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * margin_px + 1, 2 * margin_px + 1))
    return cv2.dilate(mask.astype(np.uint8), kernel).astype(bool)
