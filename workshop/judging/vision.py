"""What a vision encoder has learned of the toy world, on held-out identities; and what raw pixels can do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score
from sklearn.metrics.pairwise import cosine_similarity

from refalign.models.dinov3 import VisionEncoder
from refalign.toy.drawing import Action, Pose
from refalign.toy.identities import sample_identity
from refalign.toy.rendering import render_references
from workshop.weights.sampling import sample_frames
from workshop.weights.train_vision_encoder import PATCH_PX

HELDOUT_SEED = 41
_QUERY: Sequence[Action] = ("standing", "walking left")
_GALLERY: Sequence[Action] = ("jumping", "walking right", "waving")

Embed = Callable[[np.ndarray], np.ndarray]
"""Pictures uint8 [N, H, W, 3] -> vectors [N, E], or of each patch [N, P, E]."""


def evaluate(model: Any, num_identities: int) -> dict[str, float]:
    """`retrieval` and `same_subject_auc` of a DINOv3 model."""
    encoder = VisionEncoder(model.float())
    return {
        "retrieval_top1": retrieval(lambda pictures: encoder.embed(pictures).numpy(), num_identities),
        "same_subject_auc": same_subject_auc(lambda pictures: encoder.encode(pictures).numpy(), num_identities),
    }


def evaluate_pixels(num_identities: int) -> dict[str, float]:
    """The same of the pixels themselves: the whole picture, and each patch, as one vector."""

    def patches(pictures: np.ndarray) -> np.ndarray:
        count, height, width, _ = pictures.shape
        blocks = pictures.reshape(count, height // PATCH_PX, PATCH_PX, width // PATCH_PX, PATCH_PX, 3) / 255
        return blocks.swapaxes(2, 3).reshape(count, -1, PATCH_PX * PATCH_PX * 3)

    return {
        "retrieval_top1": retrieval(lambda pictures: pictures.reshape(len(pictures), -1) / 255, num_identities),
        "same_subject_auc": same_subject_auc(patches, num_identities),
    }


def retrieval(embed: Embed, num_identities: int) -> float:
    """Share of identities whose reference in one pose is nearest to their own among references of all in other poses.

    Chance is 1 / ``num_identities``. Vectors are centred, without which cosines of pixels are all alike.
    """
    rng = np.random.default_rng([HELDOUT_SEED, 0])
    identities = [sample_identity(rng, "heldout") for _ in range(num_identities)]
    sides = []
    for actions in (_QUERY, _GALLERY):
        poses = [Pose(actions[int(rng.integers(len(actions)))], int(rng.integers(2))) for _ in identities]
        sides.append(embed(render_references(identities, poses, rng)))
    mean = np.concatenate(sides).mean(0)
    scores = cosine_similarity(sides[0] - mean, sides[1] - mean)
    return float((scores.argmax(1) == np.arange(num_identities)).mean())


def same_subject_auc(encode: Embed, num_frames: int) -> float:
    """Probability that two patches of one subject are more alike than two of different ones; chance is 0.5.

    Over frames with at least two subjects; the background counts as one more. Vectors are centred.
    """
    drawn = sample_frames(HELDOUT_SEED, range(2 * num_frames), "heldout", min_visible=0.5)
    truths = [truth for truth in drawn if len(truth.masks) >= 2][:num_frames]
    tokens = encode(np.stack([truth.frame for truth in truths]))
    areas = []
    for truth, features in zip(truths, tokens - tokens.mean((0, 1)), strict=True):
        labels = _patch_labels(truth.masks)
        labels, features = labels[labels >= 0], features[labels >= 0]
        first, second = np.triu_indices(len(labels), 1)
        # Two patches of the background are easy, and there are many: only pairs that involve a subject count.
        involved = (labels[first] > 0) | (labels[second] > 0)
        same = labels[first] == labels[second]
        areas.append(roc_auc_score(same[involved], cosine_similarity(features)[first, second][involved]))
    return float(np.nanmean(areas))


def _patch_labels(masks: np.ndarray) -> np.ndarray:
    """Per patch, row-major: 0 background, n + 1 for subject n, -1 if none of them fills two thirds of it."""
    height, width = masks.shape[1:]
    layers = np.concatenate([~masks.any(0, keepdims=True), masks])
    patches = layers.reshape(len(layers), height // PATCH_PX, PATCH_PX, width // PATCH_PX, PATCH_PX)
    shares = patches.mean((2, 4)).reshape(len(layers), -1)
    return np.where(shares.max(0) >= 2 / 3, shares.argmax(0), -1)
