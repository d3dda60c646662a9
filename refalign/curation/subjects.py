"""Subjects of a clip: candidates from a detector or an annotation, one per entity, cropped and scored.

`find_candidates` and `read_candidates` give the same `Candidate`; `choose_subjects` applies the rules that both share.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from refalign.config import CurationConfig, RunConfig
from refalign.curation.masks import cut_out, decode_rle, has_content, mask_iou
from refalign.curation.quality import measure_sharpness
from refalign.curation.shots import Window
from refalign.errors import DataError
from refalign.io.images import encode_png

Box = tuple[int, int, int, int]
_MIN_VISIBLE_FRACTION = 0.5
_EDGE_PENALTY = 0.5
_EDGE_MARGIN = 0.005


@dataclass(frozen=True)
class Candidate:
    """One entity in one frame. ``track`` names the entity within the clip."""

    track: int
    class_name: str
    frame: int
    """Position in ``Window.frames``."""
    box_xyxy_px: Box
    mask: np.ndarray
    score: float
    sharpness: float

    @property
    def area_px(self) -> int:
        left, top, right, bottom = self.box_xyxy_px
        return (right - left) * (bottom - top)


def find_candidates(window: Window, detector: Any, config: CurationConfig, classes: Sequence[str] = ()) -> list[Candidate]:
    """Tracks entities over the window's frames, all that the detector knows or those of ``classes``."""
    candidates = []
    for position, found in enumerate(detector.track(np.stack(window.frames), classes)):
        frame = window.frames[position]
        for index in range(len(found)):
            if found.scores[index] < config.min_confidence:
                continue
            candidates.append(
                _make_candidate(
                    frame,
                    track=int(found.track_ids[index]),
                    class_name=found.class_names[index],
                    position=position,
                    box=found.boxes_xyxy_px[index],
                    mask=found.masks[index],
                    score=float(found.scores[index]),
                )
            )
    return [candidate for candidate in candidates if _shows_something(candidate, window, config)]


def choose_classes(caption: str, config: CurationConfig) -> tuple[str, ...]:
    """What to look for in a clip: those of ``classes`` that its caption names, in the singular or with -s or -es, or all."""
    if not config.classes_in_caption:
        return config.classes
    named = [name for name in config.classes if re.search(rf"\b{re.escape(name)}(s|es)?\b", caption, re.IGNORECASE)]
    return tuple(named) or config.classes


def read_candidates(window: Window, annotation: dict[str, Any], config: CurationConfig) -> list[Candidate]:
    """Entities of an OpenS2V entry that pass the published score filter (aesthetic or text-image).

    What the entry's word tags call background is the scene, not a subject.

    Raises:
        DataError: a mask does not fit its frame.
    """
    frame = window.frames[0]
    height, width = frame.shape[:2]
    marked = annotation["annotation"]
    left, right, top, bottom = (int(value) for value in annotation["metadata"]["crop"])  # stored x0, x1, y0, y1
    frame_key = str(marked["ann_frame_data"]["ann_frame_idx"])
    masks = marked["mask_annotation"][frame_key]
    scenes = set((annotation.get("word_tags") or {}).get("background") or ())
    candidates = []
    for index, entry in enumerate(marked["ann_frame_data"]["annotations"]):
        aesthetic, text_image = float(entry.get("aes_score") or 0), float(entry.get("gme_score") or 0)
        if (aesthetic < config.min_aesthetic and text_image < config.min_text_image) or entry["class_name"] in scenes:
            continue
        encoded = masks[str(index + 1)]
        inside = decode_rle(encoded["size"], encoded["counts"])
        if inside.shape != (bottom - top, right - left) or bottom > height or right > width:
            raise DataError(
                "BAD_MASK", f"a mask of {inside.shape} does not fit the crop {left, right, top, bottom} of {width} x {height}"
            )
        mask = np.zeros((height, width), bool)
        mask[top:bottom, left:right] = inside
        box = np.asarray(entry["bbox"], np.float64) + [left, top, left, top]
        candidates.append(
            _make_candidate(frame, track=index, class_name=entry["class_name"], position=0, box=box, mask=mask, score=text_image)
        )
    return [candidate for candidate in candidates if _shows_something(candidate, window, config)]


def choose_subjects(candidates: Sequence[Candidate], crop_xyxy_px: Box, config: CurationConfig) -> list[Candidate]:
    """The best view of each entity: merged, within the area limits; the largest for which there are places, from left to right.

    Prompts mostly go through their subjects in that order, so that the first picture is the first one named.
    """
    crop_area = (crop_xyxy_px[2] - crop_xyxy_px[0]) * (crop_xyxy_px[3] - crop_xyxy_px[1])
    visible = [
        candidate
        for candidate in candidates
        if config.min_area_fraction <= candidate.area_px / crop_area <= config.max_area_fraction
        and _visible_fraction(candidate, crop_xyxy_px) >= _MIN_VISIBLE_FRACTION
    ]
    tracks: dict[int, list[Candidate]] = {}
    for candidate in visible:
        tracks.setdefault(candidate.track, []).append(candidate)
    kept: list[list[Candidate]] = []
    for track in sorted(tracks.values(), key=lambda views: -max(view.score for view in views)):
        if not any(_same_entity(track, other, config.duplicate_iou) for other in kept):
            kept.append(track)
    best = [max(track, key=lambda view: _view_quality(view, track)) for track in kept]
    places = config.max_references - (1 if config.scene_references else 0)
    largest = sorted(best, key=lambda view: (-view.area_px, view.box_xyxy_px))[:places]
    return sorted(largest, key=lambda view: (view.box_xyxy_px[0] + view.box_xyxy_px[2], view.box_xyxy_px))


def make_subject_row(candidate: Candidate, window: Window, crop_xyxy_px: Box, config: RunConfig) -> dict[str, Any]:
    """The columns of `refalign.io.tables.SUBJECT`, save id and embedding."""
    crop_area = (crop_xyxy_px[2] - crop_xyxy_px[0]) * (crop_xyxy_px[3] - crop_xyxy_px[1])
    size_px = (config.video.height_px, config.video.width_px)
    shown = _find_shown(candidate, config.curation)
    picture = cut_out(window.frames[candidate.frame], shown, candidate.box_xyxy_px, size_px)
    return {
        "class_name": candidate.class_name,
        "frame_time_s": window.frame_indices[candidate.frame] / config.video.fps,
        "box_xyxy_px": list(candidate.box_xyxy_px),
        "area_fraction": candidate.area_px / crop_area,
        "score": candidate.score,
        "sharpness": candidate.sharpness,
        "crop_png": encode_png(picture),
    }


def _find_shown(candidate: Candidate, config: CurationConfig) -> np.ndarray:
    """bool [H, W]: what the reference shows of the frame inside of the box."""
    return candidate.mask if config.crop == "mask" else np.ones_like(candidate.mask)


def _shows_something(candidate: Candidate, window: Window, config: CurationConfig) -> bool:
    """Masks may be empty, a pixel, or outside of their box, whoever made them: a blank picture is no reference."""
    shown = _find_shown(candidate, config)
    return candidate.area_px > 0 and has_content(window.frames[candidate.frame], shown, candidate.box_xyxy_px)


def _make_candidate(
    frame: np.ndarray, *, track: int, class_name: str, position: int, box: np.ndarray, mask: np.ndarray, score: float
) -> Candidate:
    height, width = frame.shape[:2]
    left, top = max(0, math.floor(box[0])), max(0, math.floor(box[1]))
    right, bottom = min(width, math.ceil(box[2])), min(height, math.ceil(box[3]))
    right, bottom = max(left, right), max(top, bottom)
    inside = frame[top:bottom, left:right]
    return Candidate(
        track, class_name, position, (left, top, right, bottom), mask, score, measure_sharpness(inside) if inside.size else 0.0
    )


def _visible_fraction(candidate: Candidate, crop: Box) -> float:
    left, top, right, bottom = candidate.box_xyxy_px
    width = min(right, crop[2]) - max(left, crop[0])
    height = min(bottom, crop[3]) - max(top, crop[1])
    return max(width, 0) * max(height, 0) / candidate.area_px


def _same_entity(left: Sequence[Candidate], right: Sequence[Candidate], min_iou: float) -> bool:
    views = {view.frame: view.mask for view in right}
    return any(view.frame in views and mask_iou(view.mask, views[view.frame]) >= min_iou for view in left)


def _view_quality(view: Candidate, track: Sequence[Candidate]) -> float:
    """Confident, large, sharp and whole, each relative to the track's best view."""
    largest = max(other.area_px for other in track)
    sharpest = max(other.sharpness for other in track) or 1.0
    return view.score * (view.area_px / largest) * (view.sharpness / sharpest) * (_EDGE_PENALTY if _is_cut_off(view) else 1.0)


def _is_cut_off(view: Candidate) -> bool:
    """Whether the box ends at the frame's border, or as near to it as boxes are exact."""
    height, width = view.mask.shape
    left, top, right, bottom = view.box_xyxy_px
    x_px, y_px = int(_EDGE_MARGIN * width), int(_EDGE_MARGIN * height)
    return left <= x_px or top <= y_px or right >= width - x_px or bottom >= height - y_px
