"""Windows of one shot each: a training clip never crosses a cut.

Everything streams. Of a window only the frames that the detector will see are kept, so memory does not grow with the video.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np

from refalign.config import RunConfig
from refalign.curation.sources import Annotation
from refalign.errors import DataError
from refalign.io.looks import Look
from refalign.io.video import ShownFrame, first_index_at, iter_frames, iter_grid

_SHOT_LONG_SIDE_PX = 160


@dataclass
class Window:
    """``num_frames`` grid frames of one shot, and the few of them that were kept.

    Attributes:
        look: what the file says of the first frame.
        frames: what the detector sees, or the one frame that an annotation is about.
        frame_indices: where on the grid each of them lies.
        sampled: evenly spaced frames by grid index, where they are others than ``frames``.
    """

    start_index: int
    frame_size_px: tuple[int, int]
    look: Look
    frames: list[np.ndarray] = field(default_factory=list)
    frame_indices: list[int] = field(default_factory=list)
    sampled: dict[int, np.ndarray] = field(default_factory=dict)

    @property
    def samples(self) -> dict[int, np.ndarray]:
        """Evenly spaced frames by grid index: what scores and captions are made from."""
        return self.sampled or dict(zip(self.frame_indices, self.frames, strict=True))

    def start_s(self, fps: float) -> float:
        return self.start_index / fps


class ShotDetector:
    """PySceneDetect's content detector, fed frame by frame."""

    def __init__(self, threshold: float) -> None:
        from scenedetect.common import FrameTimecode
        from scenedetect.detectors import ContentDetector

        # Without its flash filter the detector reports a cut at the frame that shows it, never later.
        self._make_detector = lambda: ContentDetector(threshold=threshold, min_scene_len=0)
        self._timecode = FrameTimecode
        self._count = 0

    def begins_shot(self, frame: ShownFrame) -> bool:
        """Whether ``frame`` differs from the one before it as much as a cut does, or does not go on from it."""
        if frame.begins or not self._count:
            self._detector, self._count = self._make_detector(), 0
        bgr = np.ascontiguousarray(frame.to_rgb(_SHOT_LONG_SIDE_PX)[:, :, ::-1])
        position = self._timecode(self._count, fps=Fraction(25))
        self._count += 1
        return bool(self._detector.process_frame(position, bgr)) or self._count == 1


def choose_detection_offsets(num_frames: int, count: int) -> list[int]:
    """``count`` frame offsets spread evenly over a clip of ``num_frames``."""
    count = min(count, num_frames)
    return sorted({round(position) for position in np.linspace(0, num_frames - 1, count)})


def iter_windows(
    path: Path, config: RunConfig, *, duration_s: float | None, unusual: Counter[str] | None = None
) -> Iterator[Window]:
    """Yields the windows of a video in order, at most ``curation.max_clips_per_video``, spread over its duration.

    No window holds a cut, a gap, a step back of the times, another size or a broken frame.

    Args:
        unusual: as `iter_frames` counts it.

    Raises:
        DataError: as `iter_frames`; windows before the fault were yielded.
    """
    length, fps = config.video.num_frames, config.video.fps
    offsets = choose_detection_offsets(length, config.curation.detection_frames)
    limit = config.curation.max_clips_per_video
    spacing = max(length, int((duration_s or 0.0) * fps / limit))
    shots = ShotDetector(config.curation.shot_threshold)
    window: Window | None = None
    next_start, num_windows = 0, 0
    for frame, indices in iter_grid(iter_frames(path, config.curation, unusual), fps):
        if frame.is_broken:
            window = None
            continue
        if shots.begins_shot(frame):
            window = None
        for index in indices:
            if window is None and index >= next_start and num_windows < limit:
                window = Window(index, frame.size_px, frame.look)
            if window is None:
                continue
            if index - window.start_index in offsets:
                window.frames.append(frame.to_rgb())
                window.frame_indices.append(index)
            if index - window.start_index == length - 1:
                next_start = window.start_index + spacing
                num_windows += 1
                yield window
                window = None


def iter_annotated_window(
    path: Path, annotation: Annotation, config: RunConfig, *, unusual: Counter[str] | None = None
) -> Iterator[Window]:
    """Yields the window at the start of an OpenS2V cut, with its annotated frame.

    Nothing if the cut is too short, or if there is in it what no window may hold (see `iter_windows`).

    Args:
        unusual: as `iter_frames` counts it.

    Raises:
        DataError: as `iter_frames`; BAD_ANNOTATION: the frames are shown otherwise than the annotators saw them.
    """
    first, end = annotation.cut
    length, fps = config.video.num_frames, config.video.fps
    offsets = choose_detection_offsets(length, config.curation.detection_frames)
    window: Window | None = None
    grid = iter_grid(iter_frames(path, config.curation, unusual), fps)
    for number, (frame, indices) in enumerate(grid):
        if number < first or number >= end:
            continue
        if frame.is_broken or (frame.begins and number > first):
            return
        if frame.look.mirrored or frame.look.pixel_aspect != 1:
            how = "mirrored" if frame.look.mirrored else f"with pixels of {frame.look.pixel_aspect:.3g} to 1"
            raise DataError("BAD_ANNOTATION", f"{path}: is shown {how}, and boxes and masks are of pixels as stored")
        if window is None and indices:
            window = Window(indices[0], frame.size_px, frame.look)
        if number == first + annotation.frame:
            index = indices[0] if indices else first_index_at(frame.time_s, fps)
            window = window or Window(index, frame.size_px, frame.look)
            window.frames.append(frame.to_rgb())
            window.frame_indices.append(index)
        if window:
            window.sampled |= {index: frame.to_rgb() for index in indices if index - window.start_index in offsets}
        if window and window.frames and indices and indices[-1] >= window.start_index + length - 1:
            yield window
            return
