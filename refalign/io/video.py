"""A video's frames as a player shows them, in one forward pass, and on a grid of equal times.

Times are seconds from the first shown frame; where the file's times step back, they go on from the frame before. A frame is shown
until the next one, so that any frame rate, constant or not, falls on any grid.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import av
import av.error
import numpy as np
from av.container import InputContainer
from av.filter import Graph
from PIL import Image

from refalign.config import CurationConfig, VideoConfig
from refalign.errors import DataError
from refalign.io.decoding import Decoder, find_stream, open_container
from refalign.io.looks import Look, read_look, show
from refalign.io.storage import fetch

_GRID_TOLERANCE_S = 1e-4
_GAP_S, _MANY_FRAMES = 1.0, 4
"""After a longer time than this, and than so many frames, there is a gap."""
_JITTER_S = 0.1
"""Times that go back by less are of one recording, whose frames are out of order."""
_LONGEST_GAP_S = 3600.0
"""Two longer gaps in a row are a fault: damaged times would make a shot of every frame."""


@dataclass(frozen=True)
class ShownFrame:
    """One decoded frame; pixels are converted only on request.

    Attributes:
        begins: why a new part begins with it: ``step back``, ``gap``, ``new picture`` (size, rotation, colours), ``damage``.
        is_broken: it, or a frame that it depends on, is corrupt.
    """

    path: Path
    time_s: float
    raw: av.VideoFrame
    look: Look
    begins: str = ""
    is_broken: bool = False

    @property
    def size_px(self) -> tuple[int, int]:
        """(height, width) as shown."""
        return self.look.size_px

    def to_rgb(self, long_side_px: int | None = None) -> np.ndarray:
        """As `refalign.io.looks.show`."""
        return show(self.path, self.raw, self.look, long_side_px)


def check_file(path: Path, config: CurationConfig) -> None:
    """Raises `DataError` for files not worth opening: missing, empty, too large."""
    if not path.is_file():
        raise DataError("MISSING", f"{path}: no such file")
    size_bytes = path.stat().st_size
    if size_bytes == 0:
        raise DataError("EMPTY_FILE", f"{path}: 0 bytes")
    if size_bytes > config.max_video_bytes:
        raise DataError("TOO_LARGE", f"{path}: {size_bytes} bytes; curation.max_video_bytes is {config.max_video_bytes}")


def iter_frames(path: Path, config: CurationConfig, unusual: Counter[str] | None = None) -> Iterator[ShownFrame]:
    """Yields every frame of the best video stream in order of presentation, also broken ones.

    Args:
        unusual: counts unusual frames, by what is unusual.

    Raises:
        DataError: NO_VIDEO, NO_FRAMES, UNREADABLE, TOO_MANY_PIXELS, UNSUPPORTED_PICTURE; or, after the frames before the fault,
            TRUNCATED, BAD_TIMES.
    """
    check_file(path, config)
    unusual = Counter() if unusual is None else unusual
    num_frames = 0
    try:
        with open_container(path) as container:
            for frame in _deinterlace(_place_frames(path, container, config, unusual)):
                unusual.update(_name_unusual(frame, container))
                num_frames += 1
                yield frame
    except (av.error.FFmpegError, UnicodeDecodeError) as error:
        reason = "TRUNCATED" if num_frames else "UNREADABLE"
        raise DataError(reason, f"{path}: {error} (after {num_frames} frames)") from error
    if not num_frames:
        raise DataError("NO_FRAMES", f"{path}: the video stream holds no frame that can be shown")


def _place_frames(path: Path, container: InputContainer, config: CurationConfig, unusual: Counter[str]) -> Iterator[ShownFrame]:
    """Decoded frames with their times and looks, divided into parts."""
    stream = find_stream(path, container)
    _check_pixels(path, stream.codec_context.height, stream.codec_context.width, config)
    decoder, clock, before = Decoder(path, container, stream), _Clock(path, stream), None
    for decoded in decoder.iter_frames():
        raw, is_broken = decoded.raw, decoded.is_broken
        _check_pixels(path, raw.height, raw.width, config)
        look = read_look(path, raw, stream=stream.index, aspect=decoder.pixel_aspect, codec_tag=stream.codec_context.codec_tag)
        _check_pixels(path, *look.size_px, config)
        time_s, begins = clock.place(raw.time)
        if before and not begins and not look.follows(before.look):
            begins = "new picture"
        if before and not begins and (is_broken != before.is_broken or decoded.is_after_damage):
            begins = "damage"
        before = ShownFrame(path, time_s, raw, look, begins, is_broken)
        yield before
    if decoder.leaves_bytes:
        unusual["the end is not read"] += 1


def _deinterlace(frames: Iterator[ShownFrame]) -> Iterator[ShownFrame]:
    """The same frames, deinterlaced within each part."""
    active: _Deinterlacer | None = None
    for frame in frames:
        if active and frame.begins:
            yield from active.push(None)
            active = None
        if frame.look.interlaced and not frame.is_broken:
            active = active or _Deinterlacer(frame.raw)
        yield from active.push(frame) if active else (frame,)
    if active:
        yield from active.push(None)


class _Deinterlacer:
    """FFmpeg's yadif over the frames of one part, one out for each one in. Progressive frames stay unchanged."""

    def __init__(self, raw: av.VideoFrame) -> None:
        self._graph = Graph()
        self._graph.threads = 1
        source = self._graph.add(
            "buffer",
            video_size=f"{raw.width}x{raw.height}",
            pix_fmt=raw.format.name,
            time_base="1/1000",
            pixel_aspect="1/1",
            colorspace=str(raw.colorspace),
            range=str(raw.color_range),
        )
        filters = [source, self._graph.add("yadif", "mode=send_frame:deint=interlaced"), self._graph.add("buffersink")]
        self._graph.link_nodes(*filters).configure()
        self._waiting: deque[ShownFrame] = deque()
        self._count = 0

    def push(self, frame: ShownFrame | None) -> Iterator[ShownFrame]:
        """Takes the next frame, or None after the last one; yields those that are ready."""
        if frame is not None:
            frame.raw.pts, frame.raw.time_base = self._count, Fraction(1, 1000)
            self._count += 1
            self._waiting.append(frame)
        self._graph.push(frame.raw if frame else None)
        while self._waiting:
            try:
                made = self._graph.pull()
            except (av.error.BlockingIOError, av.error.EOFError):
                return
            yield replace(self._waiting.popleft(), raw=made)


def _name_unusual(frame: ShownFrame, container: InputContainer) -> list[str]:
    names = frame.look.name_unusual() + (["broken frames"] if frame.is_broken else [])
    names += [frame.begins] if frame.begins and frame.begins != "damage" else []
    return names + (["not the first stream"] if frame.look.stream != container.streams.video[0].index else [])


class _Clock:
    """Times of frames from the first one, with gaps and steps back."""

    def __init__(self, path: Path, stream: av.VideoStream) -> None:
        self._path, self._rate = path, float(stream.average_rate or stream.guessed_rate or 25)
        self._usual_s = 1 / self._rate
        self._first_s: float | None = None
        self._last_s, self._count = 0.0, 0
        self._is_timed = self._after_gap = False

    def place(self, file_s: float | None) -> tuple[float, str]:
        """Time of the next frame in seconds, and "step back", "gap" or "" before it. Raises `DataError`: BAD_TIMES."""
        self._is_timed |= file_s is not None
        if file_s is None:
            file_s = (self._first_s or 0.0) + self._last_s + self._usual_s if self._is_timed else self._count / self._rate
        self._count += 1
        if self._first_s is None:
            self._first_s = file_s
        step_s, begins = file_s - self._first_s - self._last_s, ""
        if step_s > max(_GAP_S, _MANY_FRAMES * self._usual_s) or step_s > _LONGEST_GAP_S:
            begins = "gap"
            if self._after_gap and step_s > _LONGEST_GAP_S:
                at_s = file_s - self._first_s
                raise DataError("BAD_TIMES", f"{self._path}: the frame after {self._last_s:.2f} s is at {at_s:.0f} s")
        elif step_s < -max(_JITTER_S, _MANY_FRAMES * self._usual_s):
            begins = "step back"
            self._first_s = file_s - self._last_s - self._usual_s
        elif step_s > 0:
            self._usual_s = step_s
        self._after_gap = begins == "gap"
        self._last_s = file_s - self._first_s
        return self._last_s, begins


def _check_pixels(path: Path, height: int, width: int, config: CurationConfig) -> None:
    """By the header before decoding, and for each frame again, which may differ."""
    if width * height > config.max_frame_px:
        limit = f"curation.max_frame_px is {config.max_frame_px}"
        raise DataError("TOO_MANY_PIXELS", f"{path}: frames of {width} x {height} px; {limit}")


def iter_grid(frames: Iterator[ShownFrame], fps: float) -> Iterator[tuple[ShownFrame, list[int]]]:
    """Yields each frame with the grid indices (times ``index / fps``) at which it is on screen.

    The last frame of a part, and of the video, is on screen no longer than the one before it.
    """
    current: ShownFrame | None = None
    index, shown_s = 0, 1.0 / fps
    for upcoming in frames:
        if current is not None:
            next_s = min(upcoming.time_s, current.time_s + shown_s) if upcoming.begins else upcoming.time_s
            yield current, list(range(index, first_index_at(next_s, fps)))
            shown_s = max(next_s - current.time_s, 0.0)
            index = max(index, first_index_at(upcoming.time_s, fps))
        current = upcoming
    if current is not None:
        yield current, list(range(index, max(index, first_index_at(current.time_s + shown_s, fps))))


def first_index_at(time_s: float, fps: float) -> int:
    """The first grid index whose time is not before ``time_s``."""
    return int(np.ceil((time_s - _GRID_TOLERANCE_S) * fps))


def probe_duration_s(path: Path, config: CurationConfig) -> float | None:
    """Seconds that show something, for planning: the times of damaged files are not exact.

    By the container's header; where times go back or leave a gap, by the times of all packets, without the gaps. None: unknown.

    Raises:
        DataError: as `iter_frames` raises before the first frame, and BAD_TIMES.
    """
    check_file(path, config)
    try:
        with open_container(path) as container:
            said = container.duration / av.time_base if container.duration else None
            stream = find_stream(path, container)
            clock = _Clock(path, stream)
            shown_s, last_s, is_whole = 0.0, 0.0, True
            try:
                for packet in container.demux(stream):
                    if packet.dts is None or packet.time_base is None:
                        continue
                    time_s, begins = clock.place(float(packet.dts * packet.time_base))
                    shown_s += 0.0 if begins else time_s - last_s
                    last_s, is_whole = time_s, is_whole and not begins
            except av.error.FFmpegError:
                return said  # decoding will find the fault and report it
            return said if is_whole else shown_s
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
    starts = [round(spec.start_s * video.fps) for spec in specs]
    clips: list[list[np.ndarray]] = [[] for _ in specs]
    last = max(starts) + video.num_frames
    with fetch(str(location), max_bytes=config.max_video_bytes) as path:
        for frame, indices in iter_grid(iter_frames(path, config), video.fps):
            if frame.is_broken:
                continue
            for clip, spec, start in zip(clips, specs, starts, strict=True):
                if count := sum(start <= index < start + video.num_frames for index in indices):
                    clip.extend([resize_crop(frame.to_rgb(), spec.crop_xyxy_px, video)] * count)
            if indices and indices[-1] >= last:
                break
    for clip, spec in zip(clips, specs, strict=True):
        if len(clip) < video.num_frames:
            had = f"{len(clip)} of {video.num_frames} frames"
            raise DataError("TOO_SHORT", f"{location}: the clip at {spec.start_s:.2f} s has {had}")
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
