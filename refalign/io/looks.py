"""What a file says about how its pixels are shown, and the pixels as a player shows them.

A frame is shown upright, mirrored where the file says so, with square pixels, without combs of interlaced fields, on white
where it is transparent, and in BT.709 colours of standard range.
"""

from __future__ import annotations

import math
import struct
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import av.error
import numpy as np
from av.filter import Graph

from refalign.errors import DataError
from refalign.io.colours import to_standard
from refalign.io.images import on_white

UNSUPPORTED = "UNSUPPORTED_PICTURE"
_TRANSFERS = {16: "pq", 18: "hlg"}
_PRIMARIES = {9: "bt2020", 11: "p3", 12: "p3"}
_UNKNOWN_MATRIX = (2, 3)
_OTHER_MATRICES = {8: "YCgCo", 10: "BT.2020 constant luminance", 11: "Y'D'zD'x", 12: "derived", 13: "derived", 14: "ICtCp"}
_OTHER_MATRICES |= {15: "IPT-C2", 16: "YCgCo-R", 17: "YCgCo-R"}
"""Colour matrices (ITU-T H.273, table 4) that swscale does not know: it would show other colours and say nothing."""
_DOLBY_TAGS = frozenset({"dvh1", "dvhe", "dvav", "dva1", "dav1"})
_HD_WIDTH_PX, _HD_LINES = 1280, 576
"""Files of this width, or of more lines, that do not name their colour matrix are BT.709, as players take them; others BT.601."""
_SQUARE = 0.01
"""A pixel aspect so near to 1 is 1: it comes of sizes rounded to whole pixels."""
_MAX_ASPECT = 8.0
_MAX_TILT_DEG = 1.0


@dataclass(frozen=True)
class Look:
    """What is said of a frame.

    Attributes:
        stream: index in the container.
        width_px: stored, as ``height_px`` is.
        pixel_aspect: width over height of a stored pixel.
        rotation_deg: counter-clockwise, 0, 90, 180 or 270, applied after ``mirrored`` has swapped left and right.
        transfer: ``sdr``, ``pq`` or ``hlg``.
        primaries: ``bt709`` (and what is near to it), ``bt2020`` or ``p3``.
    """

    stream: int
    width_px: int
    height_px: int
    pixel_aspect: float
    rotation_deg: int
    mirrored: bool
    transfer: str
    primaries: str
    interlaced: bool
    alpha: bool

    @property
    def square_px(self) -> tuple[int, int]:
        """(height, width) with square pixels, before rotation. The width as shown is scaled, as by ``scale=iw*sar:ih``."""
        if self.pixel_aspect == 1:
            return self.height_px, self.width_px
        if self.rotation_deg % 180:
            return max(1, round(self.height_px / self.pixel_aspect)), self.width_px
        return self.height_px, max(1, round(self.width_px * self.pixel_aspect))

    @property
    def size_px(self) -> tuple[int, int]:
        """(height, width) as shown."""
        height, width = self.square_px
        return (width, height) if self.rotation_deg % 180 else (height, width)

    def follows(self, other: Look) -> bool:
        """Whether frames of both may be in one shot."""
        return (self.size_px, self.rotation_deg, self.mirrored, self.transfer, self.primaries) == (
            (other.size_px, other.rotation_deg, other.mirrored, other.transfer, other.primaries)
        )

    def name_unusual(self) -> list[str]:
        """What a person should know of the file, in words for counting."""
        said = {
            "rotated": self.rotation_deg != 0,
            "mirrored": self.mirrored,
            "pixels not square": self.pixel_aspect != 1,
            "HDR": self.transfer != "sdr",
            "wide colours": self.transfer == "sdr" and self.primaries != "bt709",
            "interlaced": self.interlaced,
            "transparent": self.alpha,
        }
        return [name for name, holds in said.items() if holds]

    def to_row(self) -> dict[str, Any]:
        """The columns of `refalign.io.tables.LOOK`."""
        return asdict(self)


def read_look(path: Path, raw: av.VideoFrame, *, stream: int, aspect: Fraction | None, codec_tag: str = "") -> Look:
    """What a decoded frame and its stream say.

    Args:
        aspect: of a stored pixel, None where nothing is said.

    Raises:
        DataError: UNSUPPORTED_PICTURE: the frame cannot be shown as a player shows it.
    """
    transfer = _TRANSFERS.get(raw.color_trc, "sdr")
    if codec_tag in _DOLBY_TAGS and raw.colorspace in _UNKNOWN_MATRIX and transfer == "sdr":
        raise DataError(UNSUPPORTED, f"{path}: Dolby Vision without a standard base layer ({codec_tag}); give HDR10, HLG or SDR")
    if raw.colorspace in _OTHER_MATRICES and not raw.format.is_rgb:
        matrix = _OTHER_MATRICES[raw.colorspace]
        raise DataError(UNSUPPORTED, f"{path}: colours are stored as {matrix} (matrix {raw.colorspace}); convert it to BT.709")
    pixel_aspect = float(aspect) if aspect and aspect > 0 else 1.0
    if not 1 / _MAX_ASPECT <= pixel_aspect <= _MAX_ASPECT:
        raise DataError(UNSUPPORTED, f"{path}: pixels of {aspect} (width to height); at most {_MAX_ASPECT:g} to 1 is believed")
    rotation_deg, mirrored = _read_orientation(path, raw)
    return Look(
        stream=stream,
        width_px=raw.width,
        height_px=raw.height,
        pixel_aspect=1.0 if abs(pixel_aspect - 1) < _SQUARE else pixel_aspect,
        rotation_deg=rotation_deg,
        mirrored=mirrored,
        transfer=transfer,
        primaries="bt2020" if transfer != "sdr" and raw.color_primaries == 2 else _PRIMARIES.get(raw.color_primaries, "bt709"),
        interlaced=raw.interlaced_frame,
        alpha=any(component.is_alpha for component in raw.format.components),
    )


def _read_orientation(path: Path, raw: av.VideoFrame) -> tuple[int, bool]:
    """Degrees counter-clockwise, and whether left and right are swapped before, by the frame's display matrix."""
    try:
        data = raw.side_data.get("DISPLAYMATRIX")
    except ValueError:  # side data of a kind that PyAV does not name stands beside it
        return round(raw.rotation / 90) * 90 % 360, False
    if data is None:
        return 0, False
    a, b, _, c, d = struct.unpack("<5i", bytes(data)[:20])
    mirrored = a * d - b * c < 0
    angle = math.degrees(-math.atan2(*((-b, -a) if mirrored else (b, a))))
    rotation = round(angle / 90) * 90
    if abs(angle - rotation) >= _MAX_TILT_DEG:
        raise DataError(UNSUPPORTED, f"{path}: is shown turned by {angle:.0f} degrees; only quarter turns are made here")
    return rotation % 360, mirrored


def show(path: Path, raw: av.VideoFrame, look: Look, long_side_px: int | None = None) -> np.ndarray:
    """uint8 [H, W, 3] as a player shows it, scaled so that its long side is at most ``long_side_px``.

    Raises:
        DataError: UNSUPPORTED_PICTURE: the pixels are of a kind that cannot be converted.
    """
    height, width = look.square_px
    if long_side_px and max(width, height) > long_side_px:
        scale = long_side_px / max(width, height)
        width, height = max(2, round(width * scale)), max(2, round(height * scale))
    is_wide = look.transfer != "sdr" or look.primaries != "bt709"
    kind = ("rgba64le" if look.alpha else "rgb48le") if is_wide else ("rgba" if look.alpha else "rgb24")
    try:
        # By default it starts as many threads as there are cores for each frame, and ends them again.
        made = raw.reformat(width=width, height=height, format=kind, threads=1, src_colorspace=_guess_matrix(raw, look))
    except (av.error.FFmpegError, ValueError) as error:
        raise DataError(UNSUPPORTED, f"{path}: frames of {raw.format.name} cannot be shown: {error}") from error
    pixels = made.to_ndarray()
    if is_wide:
        colours = to_standard(pixels[..., :3], look.transfer, look.primaries)
        pixels = np.dstack([colours, pixels[..., 3:] // 257]).astype(np.uint8)
    # Recorders that store 32 bits a pixel leave the fourth channel empty: a frame that is nowhere visible is meant to be seen.
    pixels = on_white(pixels) if pixels[..., 3:].any() else pixels[..., :3]
    return np.ascontiguousarray(np.rot90(pixels[:, ::-1] if look.mirrored else pixels, look.rotation_deg // 90))


def _guess_matrix(raw: av.VideoFrame, look: Look) -> str | None:
    """The colour matrix of a file that does not name it, where it is another than swscale's default."""
    if raw.format.is_rgb or raw.colorspace not in _UNKNOWN_MATRIX:
        return None
    if look.transfer != "sdr":
        return "BT2020"
    if raw.width >= _HD_WIDTH_PX or raw.height > _HD_LINES:
        return "ITU709"
    return None if raw.colorspace == _UNKNOWN_MATRIX[0] else "ITU601"


class Deinterlacer:
    """FFmpeg's yadif over the frames of one shot: one frame out for each that goes in. Whole frames stay as they are."""

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
        self._waiting: deque[Any] = deque()
        self._count = 0

    def push(self, raw: av.VideoFrame, label: Any) -> Iterator[tuple[av.VideoFrame, Any]]:
        """Takes a frame with a label; yields those that are ready, with theirs."""
        raw.pts, raw.time_base = self._count, Fraction(1, 1000)
        self._count += 1
        self._waiting.append(label)
        yield from self._pull(raw)

    def finish(self) -> Iterator[tuple[av.VideoFrame, Any]]:
        """Yields the rest; no more frames may be pushed."""
        yield from self._pull(None)

    def _pull(self, raw: av.VideoFrame | None) -> Iterator[tuple[av.VideoFrame, Any]]:
        self._graph.push(raw)
        while self._waiting:
            try:
                made = self._graph.pull()
            except (av.error.BlockingIOError, av.error.EOFError):
                return
            yield made, self._waiting.popleft()  # ty: ignore[invalid-yield]
