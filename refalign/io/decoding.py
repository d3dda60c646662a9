"""Files opened, their best video stream chosen and decoded: every frame in order of presentation, and whether it is broken."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import av.error
from av.stream import Disposition

from refalign.errors import DataError
from refalign.io.looks import UNSUPPORTED

_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegvideo,mpegts,asf,flv,ogg,mxf,dv,gxf,ivf,h264,hevc,av1,obu"
"""Containers of videos. FFmpeg tells many more by their content: text, pictures, playlists that open other files."""
_STILL = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image
_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
"""FFmpeg's own decoders of these leave out the transparency, which WebM keeps beside the picture."""
_MAX_REORDERED = 16
"""Frames that may stand between the order of decoding and that of presentation: the most that H.264 and HEVC allow."""
_MAX_PENDING = 512
_TAIL_BYTES, _TAIL_SHARE = 4096, 0.1
"""Indices, tags and padding at the end of a file are smaller than one of these."""


def open_container(path: Path) -> Any:
    """Opens a file of one of the known kinds of container; FFmpeg's errors pass through."""
    # Titles in other encodings than UTF-8 are common; they must not cost the video.
    return av.open(str(path), metadata_errors="replace", options={"format_whitelist": _FORMATS})


def find_stream(path: Path, container: Any) -> Any:
    """The video stream that FFmpeg takes for the best; never a cover picture or a thumbnail.

    Raises:
        DataError: NO_VIDEO, UNREADABLE.
    """
    if not container.streams.video:
        raise DataError("NO_VIDEO", f"{path}: has no video stream")
    moving = [stream for stream in container.streams.video if not stream.disposition & _STILL]
    if not moving:
        raise DataError("NO_VIDEO", f"{path}: has no video stream, only a cover picture")
    known = [stream for stream in moving if stream.codec_context is not None]
    if not known:
        raise DataError("UNREADABLE", f"{path}: its video is encrypted, or of a codec that is not known here")
    best = container.streams.best("video")
    return next((stream for stream in known if best is not None and stream.index == best.index), known[0])


@dataclass(frozen=True)
class Decoded:
    """One frame.

    Attributes:
        is_broken: FFmpeg flagged it, its packet, or one that it may depend on, as corrupt.
        is_after_damage: between it and the frame before, there was a corrupt one, of which there may be no picture.
    """

    raw: av.VideoFrame
    is_broken: bool
    is_after_damage: bool


@dataclass
class Decoder:
    """Decodes one stream of an open container, with as many threads as the actor has cores."""

    path: Path
    container: Any
    stream: Any
    _context: Any = field(init=False)
    _end: int = field(default=0, init=False)
    """Where the packets that were read end in the file, in bytes."""
    _header_aspect: Fraction | None = field(init=False)

    def __post_init__(self) -> None:
        own = self.stream.codec_context
        self._header_aspect = own.sample_aspect_ratio
        self._context = own
        is_transparent = any(key.lower() == "alpha_mode" and value == "1" for key, value in self.stream.metadata.items())
        if is_transparent and own.name in _ALPHA_DECODERS:
            name = _ALPHA_DECODERS[own.name]
            if name not in av.codecs_available:
                raise DataError(UNSUPPORTED, f"{self.path}: is transparent, and this build of PyAV has no decoder {name}")
            self._context = av.CodecContext.create(name, "r")
        self._context.thread_type = "AUTO"
        self._context.thread_count = _count_threads()

    @property
    def pixel_aspect(self) -> Fraction | None:
        """Width over height of a stored pixel: as the container says, else as the frames decoded last say."""
        said, now = self.stream.sample_aspect_ratio, self.stream.codec_context.sample_aspect_ratio
        return now if said == self._header_aspect and now else said

    @property
    def leaves_bytes(self) -> bool:
        """Whether FFmpeg stopped well before the end of the file, as it does where files of some kinds were joined."""
        if "mov" in self.container.format.name or not self._end:  # its header may stand at the end
            return False
        size = self.path.stat().st_size
        return size - self._end > max(_TAIL_BYTES, _TAIL_SHARE * size)

    def iter_frames(self) -> Iterator[Decoded]:
        """Yields each frame in order of presentation.

        Packets without content say "as before" (dropped frames of AVI, duplicates of Theora) and are passed over.

        Raises:
            DataError: TRUNCATED: after all frames of a file that was cut off.
        """
        order = _Order()
        flush = None
        num_packets, is_short = 0, False
        try:
            for packet in self.container.demux(self.stream):
                num_packets += packet.size > 0 or packet.dts is not None
                if not packet.size:
                    flush = packet
                    continue
                is_short = packet.is_corrupt
                self._end = max(self._end, (packet.pos or 0) + packet.size)
                order.expect(packet)
                for frame in self._context.decode(packet):
                    yield from order.take(frame, self._context.reorder_depth)
            for frame in self._context.decode(flush):
                yield from order.take(frame, self._context.reorder_depth)
        except av.error.FFmpegError:
            yield from order.finish()
            raise
        yield from order.finish()
        self._check_end(num_packets, is_short)

    def _check_end(self, num_packets: int, is_short: bool) -> None:
        """A file that was cut off ends without an error: its last packet is short, or some that its index announces lack."""
        # Other containers than MP4 announce what they like, or have no full index.
        announced = len(self.stream.index_entries) if "mov" in self.container.format.name else 0
        if is_short or num_packets < announced:
            said = f" of {announced}" if announced else ""
            raise DataError(
                "TRUNCATED",
                f"{self.path}: ends after {num_packets}{said} packets, the last of them {'cut' if is_short else 'whole'}",
            )


class _Order:
    """Which frames depend on a corrupt one: those that are decoded after it, until a key frame that is shown before them.

    A frame waits until those that are decoded before it and shown after it have come; only then is known what it depends on.
    """

    def __init__(self) -> None:
        self._expected: dict[int, int] = {}
        """Places of packets in order of decoding, from 1, by time."""
        self._corrupt: deque[int] = deque(maxlen=_MAX_PENDING)
        self._keys: deque[tuple[int, int]] = deque(maxlen=2 * _MAX_REORDERED)
        """Places of whole key frames in order of decoding and of presentation."""
        self._line: deque[tuple[av.VideoFrame, int, int]] = deque()
        self._num_packets = self._num_frames = self._last_number = 0

    def expect(self, packet: av.Packet) -> None:
        """Takes the next packet in order of decoding."""
        self._num_packets += 1
        if packet.is_corrupt:
            self._corrupt.append(self._num_packets)
        if packet.pts is not None:
            self._expected[packet.pts] = self._num_packets
        if len(self._expected) > _MAX_PENDING:
            del self._expected[next(iter(self._expected))]

    def take(self, raw: av.VideoFrame, depth: int) -> Iterator[Decoded]:
        """Takes the next frame in order of presentation; yields those that can be judged.

        Args:
            depth: frames that may be decoded before a frame and shown after it.
        """
        self._num_frames += 1
        number = self._expected.pop(raw.pts, self._num_frames)
        if raw.is_corrupt:
            self._corrupt.append(number)
        elif raw.key_frame and number not in self._corrupt:
            self._keys.append((number, self._num_frames))
        self._line.append((raw, number, self._num_frames))
        while len(self._line) > min(depth, _MAX_REORDERED):
            yield self._judge(*self._line.popleft())

    def finish(self) -> Iterator[Decoded]:
        """Yields the rest."""
        while self._line:
            yield self._judge(*self._line.popleft())

    def _judge(self, raw: av.VideoFrame, number: int, position: int) -> Decoded:
        key = max((key for key, shown in self._keys if shown <= position and key <= number), default=0)
        before, self._last_number = self._last_number, number
        return Decoded(
            raw,
            is_broken=any(key < corrupt <= number for corrupt in self._corrupt),
            is_after_damage=any(before < corrupt < number for corrupt in self._corrupt),
        )


def _count_threads() -> int:
    """An actor's share of the cores; 0, which takes all of them, where nothing is said."""
    share = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    return int(share) if share.isdecimal() else 0
