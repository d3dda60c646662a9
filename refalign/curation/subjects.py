"""Subjects of a clip: candidates from a detector or an annotation, one per entity, cropped and scored; and its scene.

`find_candidates` and `read_candidates` give the same `Candidate`; `choose_subjects` applies the rules that both share.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import cv2
import numpy as np

from refalign.config import CurationConfig, RunConfig
from refalign.curation.masks import cut_out, decode_rle, has_content, mask_iou
from refalign.curation.quality import measure_sharpness
from refalign.curation.shots import Window
from refalign.curation.sources import Annotation
from refalign.errors import DataError
from refalign.io.images import encode_png

if TYPE_CHECKING:
    from refalign.models.yolo import Detector

Box = tuple[int, int, int, int]
_MIN_VISIBLE_FRACTION = 0.5
_EDGE_PENALTY = 0.5
_EDGE_MARGIN = 0.005
_SCENE = -1
"""Its track; those of subjects are not negative."""
_MIN_VISIBLE_SCENE = 0.4
"""Of the frame. Where subjects hide more of it, there is no scene to show."""
_SCENE_MARGIN = 0.01
"""Also cut out around each mask, as a share of the frame's long side: masks end a little inside of their subject."""


@dataclass
class SubjectRow:
    """Of `refalign.io.tables.SUBJECT`."""

    subject_id: str
    class_name: str
    frame_time_s: float
    box_xyxy_px: Box
    area_fraction: float
    score: float
    sharpness: float
    crop_png: bytes
    embedding: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Candidate:
    """One entity in one frame.

    Attributes:
        track: names the entity within the clip.
        frame: position in ``Window.frames``.
        mask: bool [H, W].
    """

    track: int
    class_name: str
    frame: int
    box_xyxy_px: Box
    mask: np.ndarray
    score: float
    sharpness: float

    @property
    def area_px(self) -> int:
        left, top, right, bottom = self.box_xyxy_px
        return (right - left) * (bottom - top)


def find_candidates(window: Window, detector: Detector, config: CurationConfig, classes: Sequence[str] = ()) -> list[Candidate]:
    """Tracks entities over the window's frames, all that the detector knows or those of ``classes``."""
    candidates = []
    for position, found in enumerate(detector.track(np.stack(window.frames), classes)):
        assert found.track_ids is not None, "the detector tracks"
        each = zip(
            found.track_ids.tolist(), found.class_names, found.boxes_xyxy_px, found.masks, found.scores.tolist(), strict=True
        )
        candidates += [
            _make_candidate(window, track, class_name, position, box, mask, score)
            for track, class_name, box, mask, score in each
            if score >= np.float32(config.min_confidence)
        ]
    return [candidate for candidate in candidates if _shows_something(candidate, window, config)]


def choose_classes(caption: str, config: CurationConfig) -> tuple[str, ...]:
    """What to look for in a clip: those of ``classes`` that its caption names, in the singular or with -s or -es, or all."""
    if not config.classes_in_caption:
        return config.classes
    named = [name for name in config.classes if re.search(rf"\b{re.escape(name)}(s|es)?\b", caption, re.IGNORECASE)]
    return tuple(named) or config.classes


def read_candidates(window: Window, annotation: Annotation, config: CurationConfig) -> list[Candidate]:
    """Entities of an OpenS2V entry that pass the published score filter (aesthetic or text-image).

    What the entry's word tags call background is the scene, not a subject.

    Raises:
        DataError: a mask does not fit its frame.
    """
    frame = window.frames[0]
    height, width = frame.shape[:2]
    left, top, right, bottom = region = annotation.region_xyxy_px
    candidates = []
    for index, found in enumerate(annotation.found):
        is_good = found.aes_score >= config.min_aesthetic or found.gme_score >= config.min_text_image
        if not is_good or found.class_name in annotation.background:
            continue
        inside = decode_rle(found.size, found.counts)
        if inside.shape != (bottom - top, right - left) or bottom > height or right > width:
            raise DataError("BAD_MASK", f"a mask of {inside.shape} does not fit the crop {region} of {width} x {height}")
        mask = np.zeros((height, width), bool)
        mask[top:bottom, left:right] = inside
        box = np.asarray(found.bbox) + [left, top, left, top]
        candidates.append(_make_candidate(window, index, found.class_name, 0, box, mask, found.gme_score))
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


def find_scene(candidates: Sequence[Candidate], window: Window, crop_xyxy_px: Box, config: CurationConfig) -> Candidate | None:
    """The scene of a clip: one frame of it, its subjects cut out; None where subjects hide most of it, or it is blank.

    Of the frames in which most subjects were found, the one that shows most of the scene: where a subject was missed, it would
    be left standing in its scene. What fills the frame is the scene itself and is not cut out.
    """
    left, top, right, bottom = crop_xyxy_px
    largest_px = config.max_area_fraction * (right - left) * (bottom - top)
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
    frame = window.frames[position]
    if share < _MIN_VISIBLE_SCENE or not has_content(frame, visible, crop_xyxy_px):
        return None
    return Candidate(_SCENE, "scene", position, crop_xyxy_px, visible, share, measure_sharpness(frame[top:bottom, left:right]))


def _grow(mask: np.ndarray) -> np.ndarray:
    margin_px = max(1, round(_SCENE_MARGIN * max(mask.shape)))
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * margin_px + 1, 2 * margin_px + 1))
    return cv2.dilate(mask.astype(np.uint8), kernel).astype(bool)


def make_subject_row(subject_id: str, candidate: Candidate, window: Window, crop_xyxy_px: Box, config: RunConfig) -> SubjectRow:
    """The row of a subject or a scene, its embedding still empty."""
    left, top, right, bottom = crop_xyxy_px
    shown = _find_shown(candidate, config.curation)
    size_px = (config.video.height_px, config.video.width_px)
    return SubjectRow(
        subject_id=subject_id,
        class_name=candidate.class_name,
        frame_time_s=window.frame_indices[candidate.frame] / config.video.fps,
        box_xyxy_px=candidate.box_xyxy_px,
        area_fraction=candidate.area_px / ((right - left) * (bottom - top)),
        score=candidate.score,
        sharpness=candidate.sharpness,
        crop_png=encode_png(cut_out(window.frames[candidate.frame], shown, candidate.box_xyxy_px, size_px)),
    )


def _find_shown(candidate: Candidate, config: CurationConfig) -> np.ndarray:
    """bool [H, W]: what the reference shows of the frame inside of the box."""
    return candidate.mask if config.crop == "mask" or candidate.track == _SCENE else np.ones_like(candidate.mask)


def _shows_something(candidate: Candidate, window: Window, config: CurationConfig) -> bool:
    """Masks may be empty, a pixel, or outside of their box, whoever made them: a blank picture is no reference."""
    shown = _find_shown(candidate, config)
    return candidate.area_px > 0 and has_content(window.frames[candidate.frame], shown, candidate.box_xyxy_px)


def _make_candidate(
    window: Window, track: int, class_name: str, position: int, box: np.ndarray, mask: np.ndarray, score: float
) -> Candidate:
    height, width = mask.shape
    left, top = max(0, math.floor(box[0])), max(0, math.floor(box[1]))
    right, bottom = max(left, min(width, math.ceil(box[2]))), max(top, min(height, math.ceil(box[3])))
    inside = window.frames[position][top:bottom, left:right]
    sharpness = measure_sharpness(inside) if inside.size else 0.0
    return Candidate(track, class_name, position, (left, top, right, bottom), mask, score, sharpness)


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
