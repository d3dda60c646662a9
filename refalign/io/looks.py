"""What a file says about how its frames are shown, and the frames as a player shows them.

That is: upright, mirrored where the file says so, with square pixels, deinterlaced, on white where transparent, in BT.709 colours
of standard range.
"""

from __future__ import annotations

import math
import struct
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path

import av
import av.error
import numpy as np

from refalign.errors import DataError
from refalign.io.colours import to_standard
from refalign.io.images import on_white

UNSUPPORTED = "UNSUPPORTED_PICTURE"
_TRANSFERS = {16: "pq", 18: "hlg"}
_PRIMARIES = {9: "bt2020", 11: "p3", 12: "p3"}
_UNKNOWN_MATRIX = (2, 3)
_OTHER_MATRICES = {8: "YCgCo", 10: "BT.2020 constant luminance", 11: "Y'D'zD'x", 12: "derived", 13: "derived", 14: "ICtCp"}
_OTHER_MATRICES |= {15: "IPT-C2", 16: "YCgCo-R", 17: "YCgCo-R"}
"""Colour matrices (ITU-T H.273, table 4) that swscale does not know: it shows wrong colours without an error."""
_DOLBY_TAGS = frozenset({"dvh1", "dvhe", "dvav", "dva1", "dav1"})
_HD_WIDTH_PX, _HD_LINES = 1280, 576
"""Files of this width, or of more lines, that name no colour matrix are taken for BT.709, as in players; others for BT.601."""
_SQUARE = 0.01
"""A pixel aspect this near to 1 is 1: it comes from sizes rounded to whole pixels."""
_MAX_ASPECT = 8.0
_MAX_TILT_DEG = 1.0


@dataclass(frozen=True)
class Look:
    """How a frame is stored and shown; the fields are explained at `refalign.io.tables.LOOK`."""

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
        """(height, width) with square pixels, before rotation; scaled is the width as shown (``scale=iw*sar:ih``)."""
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
        names = ("size_px", "rotation_deg", "mirrored", "transfer", "primaries")
        return all(getattr(self, name) == getattr(other, name) for name in names)

    def name_unusual(self) -> list[str]:
        """What a person should know of the file, as names to count by."""
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

    def to_row(self) -> dict[str, float | str]:
        """A value of `refalign.io.tables.LOOK`."""
        return asdict(self)


def read_look(path: Path, raw: av.VideoFrame, *, stream: int, aspect: Fraction | None, codec_tag: str = "") -> Look:
    """The look of a decoded frame; ``aspect`` is width over height of a stored pixel. Raises `DataError`: UNSUPPORTED_PICTURE."""
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
    """`Look.rotation_deg` and `Look.mirrored`, by the frame's display matrix."""
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
    """uint8 [H, W, 3] as a player shows it, its long side at most ``long_side_px``. Raises `DataError`: UNSUPPORTED_PICTURE."""
    height, width = look.square_px
    if long_side_px and max(width, height) > long_side_px:
        scale = long_side_px / max(width, height)
        width, height = max(2, round(width * scale)), max(2, round(height * scale))
    is_wide = look.transfer != "sdr" or look.primaries != "bt709"
    kind = ("rgba64le" if look.alpha else "rgb48le") if is_wide else ("rgba" if look.alpha else "rgb24")
    try:
        # By default each frame starts as many threads as there are cores.
        made = raw.reformat(width=width, height=height, format=kind, threads=1, src_colorspace=_guess_matrix(raw, look))
    except (av.error.FFmpegError, ValueError) as error:
        raise DataError(UNSUPPORTED, f"{path}: frames of {raw.format.name} cannot be shown: {error}") from error
    pixels = made.to_ndarray()
    if is_wide:
        colours = to_standard(pixels[..., :3], look.transfer, look.primaries)
        pixels = np.dstack([colours, pixels[..., 3:] // 257]).astype(np.uint8)
    # Recorders that store 32 bits a pixel leave the fourth channel empty: a wholly transparent frame is taken for opaque.
    pixels = on_white(pixels) if pixels[..., 3:].any() else pixels[..., :3]
    return np.ascontiguousarray(np.rot90(pixels[:, ::-1] if look.mirrored else pixels, look.rotation_deg // 90))


def _guess_matrix(raw: av.VideoFrame, look: Look) -> str | None:
    """The colour matrix of a file that does not name it; None is swscale's default."""
    if raw.format.is_rgb or raw.colorspace not in _UNKNOWN_MATRIX:
        return None
    if look.transfer != "sdr":
        return "BT2020"
    if raw.width >= _HD_WIDTH_PX or raw.height > _HD_LINES:
        return "ITU709"
    return None if raw.colorspace == _UNKNOWN_MATRIX[0] else "ITU601"
