"""What a reference's tokens show, and how targets are stored."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from refalign.shards.augment import augment
from refalign.shards.encode import make_reference
from refalign.shards.sample import pack_tokens, unpack_tokens


def make_crop(alpha: np.ndarray) -> bytes:
    rgba = np.concatenate([np.full((*alpha.shape, 3), 40, np.uint8), alpha[..., None]], 2)
    buffer = io.BytesIO()
    Image.fromarray(rgba).save(buffer, "PNG")
    return buffer.getvalue()


def test_padding_and_background_of_a_crop_are_told_apart() -> None:
    alpha = np.zeros((32, 64), np.uint8)
    alpha[:, :32] = 255  # the left half is the subject, the right half its cut-out surroundings
    reference = make_reference(make_crop(alpha), 64, 64, 16)
    content, foreground = reference.content.reshape(4, 4), reference.foreground.reshape(4, 4)
    assert content.tolist() == [[0] * 4, [1] * 4, [1] * 4, [0] * 4]
    assert foreground.tolist() == [[0] * 4, [1, 1, 0, 0], [1, 1, 0, 0], [0] * 4]
    assert (reference.pixels[:16] == 255).all() and (reference.pixels[16:48, 36:] == 255).all()
    assert (reference.pixels[16:48, :28] == 40).all()


def test_smaller_tokens_show_the_same_in_more_of_them() -> None:
    alpha = np.zeros((32, 64), np.uint8)
    alpha[:, :32] = 255
    coarse, fine = (make_reference(make_crop(alpha), 64, 64, token_px) for token_px in (16, 8))
    assert coarse.foreground.shape == (16,) and fine.foreground.shape == (64,)
    for shares in ("foreground", "content"):
        pooled = getattr(fine, shares).reshape(4, 2, 4, 2).mean((1, 3)).ravel()
        np.testing.assert_allclose(pooled, getattr(coarse, shares), atol=1e-6)


def make_figure() -> bytes:
    """A square with a spike, touching all sides of its crop, so that cropping any side would show."""
    alpha = np.zeros((60, 40), np.uint8)
    alpha[20:, :] = 255
    alpha[:20, 18:22] = 255
    return make_crop(alpha)


def test_augmented_views_are_never_cropped_and_repeat_by_seed() -> None:
    picture = Image.open(io.BytesIO(make_figure()))
    areas = set()
    for seed in range(40):
        view, placement = augment(picture, np.random.default_rng(seed))
        again, same = augment(picture, np.random.default_rng(seed))
        assert view.tobytes() == again.tobytes() and placement == same
        alpha = np.asarray(view.getchannel("A"))
        for side in (alpha[0], alpha[-1], alpha[:, 0], alpha[:, -1]):
            assert (side > 0).sum() > 0, "the view is as tight as the figure allows"
        areas.add(view.size)
        reference = make_reference(make_figure(), 96, 160, 16, np.random.default_rng(seed))
        dark = (reference.pixels < 128).all(2)
        assert dark.sum() > 0 and reference.content.max() > 0
        assert (reference.foreground <= reference.content + 1e-6).all(), "the subject lies within the picture"
    assert len(areas) > 20


def test_augmentation_keeps_white_white() -> None:
    for seed in range(10):
        reference = make_reference(make_figure(), 96, 96, 16, np.random.default_rng(seed))
        outside = reference.content.reshape(6, 6).repeat(16, 0).repeat(16, 1) == 0
        assert (reference.pixels[outside] == 255).all()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
def test_int8_targets_turn_by_less_than_a_thousandth(scale: float) -> None:
    tokens = torch.randn(3, 50, 1024, generator=torch.Generator().manual_seed(0)) * scale
    tokens[0, 0, 0] = 40 * scale  # one dominant channel, as vision transformers have
    stored = pack_tokens("target_tokens", tokens, "int8")
    assert stored["target_tokens"].dtype == torch.int8 and set(stored) == {"target_tokens", "target_tokens_scale"}
    back = unpack_tokens(stored, "target_tokens")
    assert back.dtype == torch.float32 and torch.equal(unpack_tokens(stored, "target_tokens", [2, 0]), back[[2, 0]])
    cosine = torch.cosine_similarity(back, tokens, dim=-1)
    assert (1 - cosine).mean() < 1e-4 and (1 - cosine).max() < 1e-2
    halves = unpack_tokens(pack_tokens("target_tokens", tokens, "float16"), "target_tokens", [1])
    torch.testing.assert_close(halves, tokens[[1]], rtol=1e-3, atol=1e-3 * scale)


def test_int8_keeps_the_toy_encoders_own_tokens() -> None:
    from refalign.models.dinov3 import VisionEncoder
    from refalign.toy import WEIGHTS_FOLDER
    from refalign.toy.drawing import Pose
    from refalign.toy.rendering import render_references

    encoder = VisionEncoder.from_pretrained(str(WEIGHTS_FOLDER / "dinov3"))
    tokens = encoder.encode(render_references((1, 2000, 50_000), [Pose("standing")] * 3))
    back = unpack_tokens(pack_tokens("target_tokens", tokens, "int8"), "target_tokens")
    assert (1 - torch.cosine_similarity(back, tokens, dim=-1)).max() < 1e-4
