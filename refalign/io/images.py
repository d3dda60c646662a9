"""Pictures and short videos as bytes and files; equal input gives equal bytes.

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
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from refalign.errors import DataError

Pixels = np.ndarray
_WHITE = 255
# What Pillow raises over damaged pictures, some of it only while it decodes.
_DECODING_ERRORS = (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError, SyntaxError, EOFError)
_DECODING_ERRORS += (struct.error, zlib.error, MemoryError, OverflowError)
_FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "TIFF", "BMP", "GIF")
KINDS = "PNG, JPEG, WebP, AVIF, TIFF, BMP or GIF"
ADVICE = f"give a still picture as {KINDS}"
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".avif", ".tif", ".tiff", ".bmp", ".gif"})
UNREAD_SUFFIXES = frozenset({".heic", ".heif", ".jxl", ".jp2", ".psd", ".svg"})
"""Of pictures of kinds that are not read."""
_OTHERS = (
    (4, (b"ftypheic", b"ftypheix", b"ftyphevc", b"ftypmif1", b"ftypmsf1"), "HEIC, which phones can export as JPEG"),
    (0, (b"\xff\x0a", b"\0\0\0\x0cJXL "), "JPEG XL"),
    (0, (b"8BPS",), "a Photoshop file"),
    (0, (b"%PDF", b"%!PS"), "a document"),
    (0, (b"<svg", b"<?xml"), "a drawing in SVG"),
    (0, (b"<!DOCTYPE", b"<!doctype", b"<html"), "a web page"),
)
"""Other files that are given as pictures: place of the mark, marks, name. HEIC would need pillow-heif."""
MAX_PICTURE_PX = 2**26
"""Larger pictures are refused by their headers; twice an 8K frame."""


def on_white(image: Pixels) -> Pixels:
    """RGB of an RGB or RGBA image; what is transparent becomes white, as references are shown to the models."""
    if image.shape[-1] == 3:
        return image
    alpha = image[..., 3:].astype(np.float32) / 255
    return np.rint(image[..., :3] * alpha + _WHITE * (1 - alpha)).astype(np.uint8)


def decode_image(data: bytes, where: str = "image") -> Pixels:
    """uint8 [H, W, 3] in sRGB of the bytes of a still picture, upright; transparency becomes white.

    Orientation (EXIF), colour profile and 16 bits of grey are applied. Of the pictures in one JPEG (MPO) the first is read.

    Raises:
        DataError: UNREADABLE: no picture of a known kind, damaged, or with several frames.
    """
    try:
        # Pillow knows forty more formats, one of which starts an interpreter of PostScript.
        with Image.open(io.BytesIO(data), formats=_FORMATS) as picture:
            if math.prod(picture.size) > MAX_PICTURE_PX:
                raise ValueError(f"{picture.size[0]} x {picture.size[1]} px, expected {MAX_PICTURE_PX} px in all at the most")
            if getattr(picture, "is_animated", False) and picture.format != "MPO":
                raise ValueError(f"{picture.format} with more than one frame or page")
            picture.load()
            return on_white(_convert(_turn_upright(picture)))
    except (UnidentifiedImageError, ImportError) as error:
        # ImportError: ultralytics replaces Image.open by one that looks for a HEIF plugin when a picture is not recognised.
        raise DataError("UNREADABLE", f"{where}: not a readable picture ({_name_content(data)}); {ADVICE}.") from error
    except _DECODING_ERRORS as error:
        raise DataError("UNREADABLE", f"{where}: not a readable picture ({error}); {ADVICE}.") from error


def _turn_upright(picture: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(picture)
    except _DECODING_ERRORS:  # damaged EXIF, which viewers pass over
        return picture


def _convert(picture: Image.Image) -> Pixels:
    """uint8 [H, W, 3], or [H, W, 4] where there is transparency."""
    if picture.mode.startswith("I;16"):  # Pillow would take all above 255 for white
        grey = np.rint(np.asarray(picture).astype(np.float32) / 257).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if picture.mode in ("I", "F"):
        raise ValueError("grey of 32 bits, of which nothing says what is white; 8 or 16 bits are read")
    kind = "RGBA" if picture.has_transparency_data else "RGB"
    if profile := picture.info.get("icc_profile"):
        picture = _apply_profile(picture.convert(kind) if picture.mode in ("P", "PA", "LA") else picture, profile)
    return np.asarray(picture.convert(kind))


def _apply_profile(picture: Image.Image, profile: bytes) -> Image.Image:
    """The picture in sRGB; unchanged where the profile is sRGB, is damaged or is for other colours than the picture has."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(source).lower():
            return picture
        kind = picture.mode if picture.mode == "RGBA" else "RGB"
        made = ImageCms.profileToProfile(picture, source, ImageCms.createProfile("sRGB"), outputMode=kind)
    except (ImageCms.PyCMSError, *_DECODING_ERRORS):
        return picture
    return made or picture


def _name_content(data: bytes) -> str:
    """What bytes are that are no picture, by how they begin."""
    for place, marks, name in _OTHERS:
        if data[place:].startswith(marks):
            return name
    return f"its {len(data)} bytes begin with {data[:8]!r}" if data else "it is empty"


def read_image(path: Path) -> Pixels:
    """uint8 [H, W, 3] of a picture file, as `decode_image` gives it. Raises `DataError`: the file is missing or no picture."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise DataError("UNREADABLE", f"{path}: cannot be read ({error.strerror}); {ADVICE}.") from error
    return decode_image(data, str(path))


def encode_png(image: Pixels) -> bytes:
    """PNG bytes of an RGB or RGBA image."""
    return _encode(image, "PNG")


def encode_jpeg(image: Pixels, quality: int = 88) -> bytes:
    """JPEG bytes of an image; transparency becomes white."""
    return _encode(on_white(image), "JPEG", quality=quality)


def make_contact_sheet(rows: Sequence[Sequence[Pixels]], height_px: int, gap_px: int = 4) -> Pixels:
    """One picture with a row per sequence, each image scaled to ``height_px``, on white. Rows may differ in length."""
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

    Odd sizes repeat their last row or column, because yuv420p halves both.
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


def _encode(image: Pixels, kind: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind, **options)
    return buffer.getvalue()


def _scaled_to_height(image: Pixels, height_px: int) -> Pixels:
    if image.shape[0] == height_px:
        return image
    width_px = max(1, round(image.shape[1] * height_px / image.shape[0]))
    return np.asarray(Image.fromarray(image).resize((width_px, height_px), Image.Resampling.LANCZOS))
