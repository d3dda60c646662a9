"""Masks: COCO run lengths, overlap, and cropping a subject out of its frame."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from refalign.errors import DataError


def decode_rle(size: Sequence[int], counts: str) -> np.ndarray:
    """bool [H, W] of a compressed COCO run-length string (column-major, as pycocotools writes it).

    Written here because annotations come from outside: the C decoder trusts the sizes it is told.

    Raises:
        DataError: the runs do not add up to the size.
    """
    height, width = (int(value) for value in size)
    runs = _read_runs(counts)
    if height <= 0 or width <= 0 or min(runs, default=0) < 0 or sum(runs) != height * width:
        raise DataError("BAD_MASK", f"a mask of {height} x {width} px holds runs over {sum(runs)} px")
    values = np.arange(len(runs)) % 2 == 1
    return np.repeat(values, runs).reshape(width, height).T


def _read_runs(counts: str) -> list[int]:
    """Run lengths from the text form: 5 bits a character, low bits first, each run relative to the one two before it."""
    runs: list[int] = []
    position = 0
    while position < len(counts):
        value, shift, more = 0, 0, True
        while more:
            if position >= len(counts):
                raise DataError("BAD_MASK", "a mask ends inside a run")
            bits = ord(counts[position]) - 48
            if not 0 <= bits < 64 or shift > 30:
                raise DataError("BAD_MASK", f"a mask holds the character {counts[position]!r}")
            value |= (bits & 0x1F) << shift
            more = bool(bits & 0x20)
            shift += 5
            position += 1
            if not more and bits & 0x10:
                value |= -1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
    return runs


def mask_iou(left: np.ndarray, right: np.ndarray) -> float:
    """Intersection over union of two bool masks of one size; 0 when both are empty."""
    union = np.count_nonzero(left | right)
    return np.count_nonzero(left & right) / union if union else 0.0


_MIN_OPAQUE_PX, _MIN_OPAQUE_FRACTION = 16, 0.02
_MIN_VARIANCE = 1.0


def has_content(frame: np.ndarray, mask: np.ndarray, box_xyxy_px: Sequence[int]) -> bool:
    """Whether a picture of the box with the mask as alpha would show something.

    At least 2% of the box and 16 px are opaque, and their brightness varies (variance of 1, grey levels squared).

    Args:
        frame: uint8 [H, W, 3].
        mask: bool [H, W].
    """
    left, top, right, bottom = box_xyxy_px
    shown = mask[top:bottom, left:right]
    if np.count_nonzero(shown) < max(_MIN_OPAQUE_PX, _MIN_OPAQUE_FRACTION * shown.size):
        return False
    return float(frame[top:bottom, left:right][shown].mean(axis=1).var()) >= _MIN_VARIANCE


def cut_out(frame: np.ndarray, mask: np.ndarray, box_xyxy_px: Sequence[int], max_size_px: tuple[int, int]) -> np.ndarray:
    """uint8 RGBA of the box, alpha = mask, scaled down to fit (height, width) ``max_size_px``."""
    left, top, right, bottom = box_xyxy_px
    alpha = mask[top:bottom, left:right, None].astype(np.uint8) * 255
    image = Image.fromarray(np.concatenate([frame[top:bottom, left:right], alpha], axis=2))
    image.thumbnail((max_size_px[1], max_size_px[0]), Image.Resampling.BICUBIC)
    return np.asarray(image)
