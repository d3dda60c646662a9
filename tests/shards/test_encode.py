"""What a reference's tokens show, and which frames stand for the latents."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from refalign.geometry import first_frames
from refalign.shards.encode import make_reference


def make_crop(alpha: np.ndarray) -> bytes:
    rgba = np.concatenate([np.full((*alpha.shape, 3), 40, np.uint8), alpha[..., None]], 2)
    buffer = io.BytesIO()
    Image.fromarray(rgba).save(buffer, "PNG")
    return buffer.getvalue()


def test_padding_and_background_of_a_crop_are_told_apart() -> None:
    alpha = np.zeros((32, 64), np.uint8)
    alpha[:, :32] = 255  # the left half is the subject, the right half its cut-out surroundings
    reference = make_reference(make_crop(alpha), 64, 64, {})
    content, foreground = reference.content.reshape(4, 4), reference.foreground.reshape(4, 4)
    assert content.tolist() == [[0] * 4, [1] * 4, [1] * 4, [0] * 4]
    assert foreground.tolist() == [[0] * 4, [1, 1, 0, 0], [1, 1, 0, 0], [0] * 4]
    assert (reference.pixels[:16] == 255).all() and (reference.pixels[16:48, 36:] == 255).all()
    assert (reference.pixels[16:48, :28] == 40).all()


def test_each_latent_frame_begins_with_its_first_pixel_frame() -> None:
    assert first_frames(1) == [0]
    assert first_frames(9) == [0, 1, 5]
    assert first_frames(81)[-1] == 77 and len(first_frames(81)) == 21
