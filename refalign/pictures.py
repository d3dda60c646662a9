"""Pictures and short videos as bytes and files: PNG, JPEG, H.264 and contact sheets. Equal input gives equal bytes.

Images are ``uint8 [H, W, 3]`` in RGB, or ``[H, W, 4]`` with the subject's mask as alpha; videos are ``uint8 [F, H, W, 3]``.
"""

from __future__ import annotations

import io
import math
import struct
import zlib
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from refalign.errors import DataError

Pixels = np.ndarray
_WHITE = 255
# What Pillow raises over damaged pictures, some of it only while it decodes.
_DECODING_ERRORS = (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError, SyntaxError, EOFError)
_DECODING_ERRORS += (struct.error, zlib.error, MemoryError, OverflowError)
_FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PICTURE_PX = 2**26
"""Larger pictures are refused from their headers; twice an 8K frame."""
SHEET_GAP_PX = 4
"""White around every picture of a contact sheet."""


def on_white(image: Pixels) -> Pixels:
    """RGB of an RGB or RGBA image; what is transparent becomes white, as references are shown to the models."""
    if image.shape[-1] == 3:
        return image
    alpha = image[..., 3:].astype(np.float32) / 255
    return np.rint(image[..., :3] * alpha + _WHITE * (1 - alpha)).astype(np.uint8)


def decode_image(data: bytes, where: str = "image") -> Pixels:
    """RGB pixels of PNG, JPEG or WebP bytes; transparency becomes white.

    Raises:
        DataError: the bytes are no picture that can be read.
    """
    try:
        # Pillow knows forty more formats, one of which starts an interpreter of PostScript.
        with Image.open(io.BytesIO(data), formats=_FORMATS) as picture:
            if math.prod(picture.size) > MAX_PICTURE_PX:
                raise ValueError(f"{picture.size[0]} x {picture.size[1]} px, expected {MAX_PICTURE_PX} px in all at the most")
            return on_white(np.asarray(picture.convert("RGBA" if _has_alpha(picture) else "RGB")))
    except (*_DECODING_ERRORS, ImportError) as error:
        # ImportError: ultralytics replaces Image.open by one that looks for a HEIF plugin when a picture is not recognised.
        raise DataError("UNREADABLE", f"{where}: not a readable picture ({error}); give a PNG or JPEG.") from error


def read_image(path: Path) -> Pixels:
    """RGB pixels of a picture file; transparency becomes white.

    Raises:
        DataError: the file is missing or no picture.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise DataError("UNREADABLE", f"{path}: cannot be read ({error.strerror}); give a PNG or JPEG file.") from error
    return decode_image(data, str(path))


def encode_png(image: Pixels) -> bytes:
    """PNG bytes of an RGB or RGBA image."""
    return _encode(image, "PNG")


def encode_jpeg(image: Pixels, quality: int = 88) -> bytes:
    """JPEG bytes of an image; transparency becomes white."""
    return _encode(on_white(image), "JPEG", quality=quality)


def write_png(path: Path, image: Pixels) -> None:
    """Writes a PNG, whatever the path is called; steps write aside under a temporary name."""
    Path(path).write_bytes(encode_png(image))


def make_contact_sheet(rows: Sequence[Sequence[Pixels]], height_px: int, gap_px: int = SHEET_GAP_PX) -> Pixels:
    """One picture with a row per sequence, every image scaled to ``height_px``, on white. Rows may differ in length."""
    strips = [[_scaled_to_height(on_white(image), height_px) for image in row] for row in rows if len(row)]
    if not strips:
        return np.full((height_px, height_px, 3), _WHITE, np.uint8)
    width_px = max(sum(image.shape[1] + gap_px for image in row) for row in strips) + gap_px
    sheet = np.full((len(strips) * (height_px + gap_px) + gap_px, width_px, 3), _WHITE, np.uint8)
    for number, row in enumerate(strips):
        top, left = gap_px + number * (height_px + gap_px), gap_px
        for image in row:
            sheet[top : top + height_px, left : left + image.shape[1]] = image
            left += image.shape[1] + gap_px
    return sheet


def write_mp4(path: Path, frames: Pixels, fps: float, *, quality_crf: int = 18) -> None:
    """Writes an H.264 mp4 that browsers play while it loads: yuv420p, header first.

    One encoder thread and no creation time, so that equal frames give equal bytes. Odd sizes repeat their last row or column,
    because yuv420p halves both.
    """
    import av

    frames = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode="edge")
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as file:
        stream = file.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        # mbtree reads memory it never wrote at this size of frame: equal frames would give other bytes now and then.
        stream.options = {"crf": str(quality_crf), "preset": "medium", "threads": "1", "x264-params": "mbtree=0"}
        for pixels in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")))
        file.mux(stream.encode())


def _has_alpha(picture: Image.Image) -> bool:
    return "A" in picture.getbands() or "transparency" in picture.info


def _encode(image: Pixels, kind: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind, **options)
    return buffer.getvalue()


def _scaled_to_height(image: Pixels, height_px: int) -> Pixels:
    if image.shape[0] == height_px:
        return image
    width_px = max(1, round(image.shape[1] * height_px / image.shape[0]))
    return np.asarray(Image.fromarray(image).resize((width_px, height_px), Image.Resampling.LANCZOS))
