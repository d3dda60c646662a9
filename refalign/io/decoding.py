"""Opens files, chooses the best video stream, and decodes its frames in order of presentation, with what is broken."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import av.error
from av.container import InputContainer
from av.stream import Disposition

from refalign.errors import DataError
from refalign.io.looks import UNSUPPORTED

_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegvideo,mpegts,asf,flv,ogg,mxf,dv,gxf,ivf,h264,hevc,av1,obu"
"""Containers of videos. FFmpeg would also open text, pictures, and playlists that open other files."""
_STILL = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image
_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
"""FFmpeg's own decoders of these leave out the transparency of WebM."""
_MAX_REORDERED = 16
"""Most frames between the order of decoding and that of presentation in H.264 and HEVC."""
_MAX_PENDING = 512
_TAIL_BYTES, _TAIL_SHARE = 4096, 0.1  # indices, tags and padding at the end of a file are smaller than one of these


def open_container(path: Path) -> InputContainer:
    """Opens a file of a known kind of container; FFmpeg's errors pass through."""
    # Titles in other encodings than UTF-8 are common, and no reason to refuse a video.
    return av.open(str(path), metadata_errors="replace", options={"format_whitelist": _FORMATS})


def find_stream(path: Path, container: InputContainer) -> av.VideoStream:
    """FFmpeg's best video stream; never a cover picture or a thumbnail. Raises `DataError`: NO_VIDEO, UNREADABLE."""
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
        is_broken: it, its packet, or one that it may depend on, is corrupt.
        is_after_damage: a corrupt one, of which there may be no picture, lies between it and the frame before.
    """

    raw: av.VideoFrame
    is_broken: bool
    is_after_damage: bool


class Decoder:
    """Decodes one stream of an open container, with as many threads as the actor has cores."""

    def __init__(self, path: Path, container: InputContainer, stream: av.VideoStream) -> None:
        self.path, self.container, self.stream = path, container, stream
        self._read_bytes = 0  # where the packets that were read end in the file
        self._context: Any = stream.codec_context
        self._header_aspect = self._context.sample_aspect_ratio
        is_transparent = any(key.lower() == "alpha_mode" and value == "1" for key, value in stream.metadata.items())
        if is_transparent and (name := _ALPHA_DECODERS.get(self._context.name)):
            if name not in av.codecs_available:
                raise DataError(UNSUPPORTED, f"{path}: is transparent, and this build of PyAV has no decoder {name}")
            self._context = av.CodecContext.create(name, "r")
        self._context.thread_type = "AUTO"
        # An actor's share of the cores; 0 takes all of them.
        share = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
        self._context.thread_count = int(share) if share.isdecimal() else 0

    @property
    def pixel_aspect(self) -> Fraction | None:
        """Width over height of a stored pixel: by the container, else by the frames decoded last."""
        by_container, by_frames = self.stream.sample_aspect_ratio, self.stream.codec_context.sample_aspect_ratio
        return by_frames if by_container == self._header_aspect and by_frames else by_container

    @property
    def leaves_bytes(self) -> bool:
        """Whether FFmpeg stopped well before the end of the file, as it does where some kinds of files were joined."""
        if "mov" in self.container.format.name or not self._read_bytes:  # the header of MOV may stand at the end
            return False
        size = self.path.stat().st_size
        return size - self._read_bytes > max(_TAIL_BYTES, _TAIL_SHARE * size)

    def iter_frames(self) -> Iterator[Decoded]:
        """Yields each frame in order of presentation; at the end of a file that was cut off, raises `DataError` TRUNCATED."""
        order = _Order()
        flush = None
        num_packets, is_short = 0, False
        try:
            for packet in self.container.demux(self.stream):
                num_packets += packet.size > 0 or packet.dts is not None
                if not packet.size:  # the end, or a dropped frame (AVI) or duplicate (Theora)
                    flush = packet
                    continue
                is_short = packet.is_corrupt
                self._read_bytes = max(self._read_bytes, (packet.pos or 0) + packet.size)
                order.expect(packet)
                for frame in self._context.decode(packet):
                    yield from order.take(frame, self._context.reorder_depth)
            for frame in self._context.decode(flush):
                yield from order.take(frame, self._context.reorder_depth)
        except av.error.FFmpegError:
            yield from order.release()
            raise
        yield from order.release()
        self._check_end(num_packets, is_short)

    def _check_end(self, num_packets: int, is_short: bool) -> None:
        """A file that was cut off ends without an error, with a short packet or with fewer packets than its index has."""
        # Only MP4 has a full index.
        announced = len(self.stream.index_entries) if "mov" in self.container.format.name else 0
        if is_short or num_packets < announced:
            said, last = f" of {announced}" if announced else "", "cut" if is_short else "whole"
            raise DataError("TRUNCATED", f"{self.path}: ends after {num_packets}{said} packets, the last of them {last}")


class _Order:
    """Finds the frames that depend on a corrupt one: those decoded after it, until a key frame that is shown before them.

    A frame waits for those that are decoded before it and shown after it; only then is known what it depends on.
    """

    def __init__(self) -> None:
        self._expected: dict[int, int] = {}  # packets' places in order of decoding, from 1, by time
        self._corrupt: deque[int] = deque(maxlen=_MAX_PENDING)
        self._keys: deque[tuple[int, int]] = deque(maxlen=2 * _MAX_REORDERED)  # whole ones: places in decoding, in presentation
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
        """Takes the next frame in order of presentation; at most ``depth`` may be decoded before it and shown after it."""
        self._num_frames += 1
        number = self._expected.pop(raw.pts, self._num_frames)
        if raw.is_corrupt:
            self._corrupt.append(number)
        elif raw.key_frame and number not in self._corrupt:
            self._keys.append((number, self._num_frames))
        self._line.append((raw, number, self._num_frames))
        yield from self.release(min(depth, _MAX_REORDERED))

    def release(self, kept: int = 0) -> Iterator[Decoded]:
        """Yields the waiting frames, all but the last ``kept``."""
        while len(self._line) > kept:
            raw, number, position = self._line.popleft()
            key = max((key for key, shown in self._keys if shown <= position and key <= number), default=0)
            before, self._last_number = self._last_number, number
            yield Decoded(
                raw,
                is_broken=any(key < corrupt <= number for corrupt in self._corrupt),
                is_after_damage=any(before < corrupt < number for corrupt in self._corrupt),
            )
