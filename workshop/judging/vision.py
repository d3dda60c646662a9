"""What a vision encoder has learned of the toy world, on identities nobody trained on, and beside it what raw pixels can do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refalign.models.dinov3 import VisionEncoder
from refalign.toy.drawing import Action, Pose
from refalign.toy.identities import sample_identity
from refalign.toy.rendering import render_references
from workshop.weights.sampling import sample_frames
from workshop.weights.train_vision_encoder import PATCH_PX

HELDOUT_SEED = 41
_QUERY: tuple[Action, ...] = ("standing", "walking left")
_GALLERY: tuple[Action, ...] = ("jumping", "walking right", "waving")

Embed = Callable[[np.ndarray], np.ndarray]
"""uint8 [N, H, W, 3] -> [N, E]."""


def evaluate(model: Any, num_identities: int) -> dict[str, float]:
    """Both figures for a DINOv3 model."""
    encoder = VisionEncoder(model.float())
    return measure(
        lambda pictures: encoder.embed(pictures).numpy(), lambda pictures: encoder.encode(pictures).numpy(), num_identities
    )


def evaluate_pixels(num_identities: int) -> dict[str, float]:
    """Both figures for the pixels themselves: the whole picture, and each patch, as one vector."""

    def patches(pictures: np.ndarray) -> np.ndarray:
        count, height, width, _ = pictures.shape
        blocks = pictures.reshape(count, height // PATCH_PX, PATCH_PX, width // PATCH_PX, PATCH_PX, 3) / 255
        return blocks.swapaxes(2, 3).reshape(count, -1, PATCH_PX * PATCH_PX * 3)

    return measure(lambda pictures: pictures.reshape(len(pictures), -1) / 255, patches, num_identities)


def measure(embed: Embed, encode: Embed, num_identities: int) -> dict[str, float]:
    """Retrieval between poses, and how well patch similarity tells subjects apart.

    * ``retrieval_top1``: share of held-out identities whose reference in one pose has as its nearest neighbour, among references
      of all of them in other poses, its own. Chance is 1 / ``num_identities``.
    * ``same_subject_auc``: over held-out frames with at least two subjects, the probability that two patches of one subject are
      more alike than two patches of different ones (background counts as one more). Chance is 0.5.

    Features are centred over all pictures first, which is what makes cosines of pixels comparable with those of features.
    """
    return {"retrieval_top1": retrieval(embed, num_identities), "same_subject_auc": same_subject_auc(encode, num_identities)}


def retrieval(embed: Embed, num_identities: int) -> float:
    """See ``measure``."""
    rng = np.random.default_rng([HELDOUT_SEED, 0])
    identities = [sample_identity(rng, "heldout") for _ in range(num_identities)]
    sides = []
    for actions in (_QUERY, _GALLERY):
        poses = [Pose(actions[int(rng.integers(len(actions)))], int(rng.integers(2))) for _ in identities]
        pictures = render_references(identities, poses, rng)
        sides.append(embed(pictures))
    scores = _cosines(*sides)
    return float((scores.argmax(1) == np.arange(num_identities)).mean())


def same_subject_auc(encode: Embed, num_frames: int) -> float:
    """See ``measure``."""
    drawn = sample_frames(HELDOUT_SEED, range(2 * num_frames), "heldout", min_visible=0.5)
    truths = [truth for truth in drawn if len(truth.masks) >= 2][:num_frames]
    tokens = encode(np.stack([truth.frame for truth in truths]))
    tokens = tokens - tokens.mean((0, 1))
    areas = []
    for truth, features in zip(truths, tokens, strict=True):
        labels = _patch_labels(truth.masks)
        clear = labels >= 0
        scores = _cosines(features[clear], features[clear], centre=False)
        upper = np.triu_indices(len(scores), 1)
        same = (labels[clear][:, None] == labels[clear][None])[upper]
        # Two patches of the background are easy, and there are many: only pairs that involve a subject count.
        involved = ((labels[clear][:, None] > 0) | (labels[clear][None] > 0))[upper]
        areas.append(_auc(scores[upper][involved & same], scores[upper][involved & ~same]))
    return float(np.nanmean(areas))


def _patch_labels(masks: np.ndarray) -> np.ndarray:
    """Per patch, row-major: 0 background, n + 1 for subject n, -1 where nothing fills two thirds of it."""
    height, width = masks.shape[1:]
    layers = np.concatenate([~masks.any(0, keepdims=True), masks])
    shares = (
        layers.reshape(len(layers), height // PATCH_PX, PATCH_PX, width // PATCH_PX, PATCH_PX)
        .mean((2, 4))
        .reshape(len(layers), -1)
    )
    return np.where(shares.max(0) >= 2 / 3, shares.argmax(0), -1)


def _cosines(first: np.ndarray, second: np.ndarray, *, centre: bool = True) -> np.ndarray:
    if centre:
        mean = np.concatenate([first, second]).mean(0)
        first, second = first - mean, second - mean
    first = first / np.linalg.norm(first, axis=1, keepdims=True)
    return first @ (second / np.linalg.norm(second, axis=1, keepdims=True)).T


def _auc(positives: np.ndarray, negatives: np.ndarray) -> float:
    """Probability that a positive scores above a negative."""
    if not len(positives) or not len(negatives):
        return float("nan")
    return float((positives[:, None] > negatives[None]).mean())
