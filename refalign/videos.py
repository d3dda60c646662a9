"""Decoding: one forward pass over a video gives frames as a player shows them, on a grid of equal times.

Times are seconds from the first shown frame. Rotation is applied. A frame is shown until the next one, so that any frame
rate, constant or not, falls on any grid.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import av.error
import numpy as np
from PIL import Image

from refalign.config import CurationConfig, VideoConfig
from refalign.errors import DataError
from refalign.storage import fetch

_GRID_TOLERANCE_S = 1e-4
_LONGEST_FRAME_S = 3600.0
"""A frame that is on screen for longer is taken for a fault: damaged times would fill the grid, and the memory, without end."""
_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegvideo,mpegts,asf,flv,ogg,h264,hevc"
"""Containers of videos. FFmpeg tells many more by their content: text, pictures, playlists that open other files."""


@dataclass(frozen=True)
class ShownFrame:
    """One decoded frame; pixels are converted only on request."""

    time_s: float
    raw: av.VideoFrame
    rotation_deg: int

    @property
    def size_px(self) -> tuple[int, int]:
        """(height, width) as shown."""
        height, width = self.raw.height, self.raw.width
        return (width, height) if self.rotation_deg % 180 else (height, width)

    def to_rgb(self, long_side_px: int | None = None) -> np.ndarray:
        """uint8 [H, W, 3], scaled so that its long side is at most ``long_side_px``."""
        width, height = self.raw.width, self.raw.height
        if long_side_px and max(width, height) > long_side_px:
            scale = long_side_px / max(width, height)
            width, height = max(2, round(width * scale)), max(2, round(height * scale))
        # By default it starts as many threads as there are cores for each frame, and ends them again.
        pixels = self.raw.reformat(width=width, height=height, format="rgb24", threads=1).to_ndarray()
        return np.ascontiguousarray(np.rot90(pixels, self.rotation_deg // 90))


def check_file(path: Path, config: CurationConfig) -> None:
    """Raises `DataError` for files not worth opening: missing, empty, too large."""
    if not path.is_file():
        raise DataError("MISSING", f"{path}: no such file")
    size_bytes = path.stat().st_size
    if size_bytes == 0:
        raise DataError("EMPTY_FILE", f"{path}: 0 bytes")
    if size_bytes > config.max_video_bytes:
        raise DataError("TOO_LARGE", f"{path}: {size_bytes} bytes; curation.max_video_bytes is {config.max_video_bytes}")


def iter_frames(path: Path, config: CurationConfig) -> Iterator[ShownFrame]:
    """Yields every frame of the first video stream in order of presentation.

    Raises:
        DataError: NO_VIDEO, NO_FRAMES, UNREADABLE, TOO_MANY_PIXELS; or, after the frames before the fault, TRUNCATED, BAD_TIMES.
    """
    check_file(path, config)
    num_frames = 0
    try:
        with _open_container(path) as container:
            stream = _find_stream(path, container, config)
            rate = float(stream.average_rate or stream.guessed_rate or 25)
            first_s: float | None = None
            last_s = 0.0
            for frame in _decode(path, container, stream):
                _check_pixels(path, frame, config)
                time_s = frame.time if frame.time is not None else num_frames / rate
                first_s = time_s if first_s is None else first_s
                if time_s - first_s - last_s > _LONGEST_FRAME_S:
                    raise DataError("BAD_TIMES", f"{path}: the frame after {last_s:.2f} s is at {time_s - first_s:.0f} s")
                last_s = time_s - first_s
                num_frames += 1
                yield ShownFrame(time_s - first_s, frame, round(frame.rotation / 90) * 90 % 360)
    except (av.error.FFmpegError, UnicodeDecodeError) as error:
        reason = "TRUNCATED" if num_frames else "UNREADABLE"
        raise DataError(reason, f"{path}: {error} (after {num_frames} frames)") from error
    if not num_frames:
        raise DataError("NO_FRAMES", f"{path}: the video stream holds no frame that can be shown")


def _find_stream(path: Path, container: Any, config: CurationConfig) -> Any:
    if not container.streams.video:
        raise DataError("NO_VIDEO", f"{path}: has no video stream")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise DataError("UNREADABLE", f"{path}: its video is encrypted, or of a codec that is not known here")
    _check_pixels(path, stream.codec_context, config)
    stream.thread_type = "AUTO"
    stream.thread_count = _count_threads()
    return stream


def _count_threads() -> int:
    """An actor's share of the cores; 0, which takes all of them, where nothing is said."""
    share = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    return int(share) if share.isdecimal() else 0


def _decode(path: Path, container: Any, stream: Any) -> Iterator[av.VideoFrame]:
    """All frames. A file that was cut off ends without an error: its last packet is short, or some of those it announces lack."""
    num_packets, is_short = 0, False
    for packet in container.demux(stream):
        if packet.size:
            num_packets, is_short = num_packets + 1, packet.is_corrupt
        yield from packet.decode()
    if is_short or num_packets < stream.frames:
        announced = f" of {stream.frames}" if stream.frames else ""
        raise DataError(
            "TRUNCATED", f"{path}: ends after {num_packets}{announced} packets, the last of them {'cut' if is_short else 'whole'}"
        )


def _open_container(path: Path) -> Any:
    # Titles in other encodings than UTF-8 are common; they must not cost the video.
    return av.open(str(path), metadata_errors="replace", options={"format_whitelist": _FORMATS})


def _check_pixels(path: Path, shown: Any, config: CurationConfig) -> None:
    """Before decoding by what the header says, and again for each frame, which need not agree with it."""
    if shown.width * shown.height > config.max_frame_px:
        raise DataError(
            "TOO_MANY_PIXELS",
            f"{path}: frames of {shown.width} x {shown.height} px; curation.max_frame_px is {config.max_frame_px}",
        )


def iter_grid(frames: Iterator[ShownFrame], fps: float) -> Iterator[tuple[ShownFrame, list[int]]]:
    """Yields each frame with the grid indices (times ``index / fps``) at which it is on screen.

    The last frame is on screen as long as the one before it was.
    """
    current: ShownFrame | None = None
    index, shown_s = 0, 1.0 / fps
    for upcoming in frames:
        if current is not None:
            shown_s = max(upcoming.time_s - current.time_s, 0.0)
            end = _first_index_at(upcoming.time_s, fps)
            yield current, list(range(index, end))
            index = max(index, end)
        current = upcoming
    if current is not None:
        yield current, list(range(index, max(index, _first_index_at(current.time_s + shown_s, fps))))


def _first_index_at(time_s: float, fps: float) -> int:
    return int(np.ceil((time_s - _GRID_TOLERANCE_S) * fps))


def probe_duration_s(path: Path, config: CurationConfig) -> float | None:
    """Seconds by the container's header, or None where it says nothing; not to be trusted for more than planning."""
    check_file(path, config)
    try:
        with _open_container(path) as container:
            return container.duration / av.time_base if container.duration else None
    except (av.error.FFmpegError, UnicodeDecodeError) as error:
        raise DataError("UNREADABLE", f"{path}: {error}") from error


@dataclass(frozen=True)
class ClipSpec:
    """Where a training clip lies in its video."""

    start_s: float
    crop_xyxy_px: tuple[int, int, int, int]


def read_clips(location: str | Path, specs: Sequence[ClipSpec], video: VideoConfig, config: CurationConfig) -> list[np.ndarray]:
    """Frames of several clips of one video, local or remote, in one decode pass: each uint8 [F, height_px, width_px, 3].

    Raises:
        DataError: the video cannot be read, or ends before a clip does.
        BackendUnavailable: the object store that holds it does not answer.
    """
    with fetch(str(location), max_bytes=config.max_video_bytes) as path:
        return _read_local_clips(path, specs, video, config)


def _read_local_clips(path: Path, specs: Sequence[ClipSpec], video: VideoConfig, config: CurationConfig) -> list[np.ndarray]:
    starts = [round(spec.start_s * video.fps) for spec in specs]
    clips: list[list[np.ndarray]] = [[] for _ in specs]
    last = max(starts) + video.num_frames
    for frame, indices in iter_grid(iter_frames(path, config), video.fps):
        for clip, spec, start in zip(clips, specs, starts, strict=True):
            wanted = [index for index in indices if start <= index < start + video.num_frames]
            if wanted:
                clip.extend([resize_crop(frame.to_rgb(), spec.crop_xyxy_px, video)] * len(wanted))
        if indices and indices[-1] >= last:
            break
    for clip, spec in zip(clips, specs, strict=True):
        if len(clip) < video.num_frames:
            raise DataError("TOO_SHORT", f"{path}: the clip at {spec.start_s:.2f} s has {len(clip)} of {video.num_frames} frames")
    return [np.stack(clip) for clip in clips]


def resize_crop(pixels: np.ndarray, crop_xyxy_px: Sequence[int], video: VideoConfig) -> np.ndarray:
    """Cuts out the crop and scales it to the training size, uint8 [height_px, width_px, 3]."""
    left, top, right, bottom = crop_xyxy_px
    image = Image.fromarray(pixels[top:bottom, left:right])
    return np.asarray(image.resize((video.width_px, video.height_px), Image.Resampling.BICUBIC, reducing_gap=3.0))


def make_center_crop(region_xyxy_px: Sequence[int], video: VideoConfig) -> tuple[int, int, int, int]:
    """The largest centred part of a region that has the training clip's aspect ratio; integer source pixels."""
    left, top, right, bottom = (int(value) for value in region_xyxy_px)
    height, width = bottom - top, right - left
    crop_width = min(width, round(height * video.width_px / video.height_px))
    crop_height = min(height, round(width * video.height_px / video.width_px))
    left, top = left + (width - crop_width) // 2, top + (height - crop_height) // 2
    return left, top, left + crop_width, top + crop_height
