"""Likeness of two pictures of a creature by colour and by edges: no network, so nothing shares a model's blind spots."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8

from refalign.toy.drawing import POSES, render_reference
from refalign.toy.identities import sample_identity
from refalign.toy.rendering import boxes_of

SEED = 60
COLOUR_BINS = 5
ORIENTATIONS = 8
CELLS = 3
"""Rows and columns that a creature's box is divided into for its edges."""

Picture = UInt8[np.ndarray, "H W 3"]
Mask = Bool[np.ndarray, "H W"]


def colour_likeness(first: Picture, first_mask: Mask, second: Picture, second_mask: Mask) -> float:
    """Intersection of the two colour histograms over the masks, in [0, 1]."""
    return float(np.minimum(_colours(first, first_mask), _colours(second, second_mask)).sum())


def edge_likeness(first: Picture, first_mask: Mask, second: Picture, second_mask: Mask) -> float:
    """Cosine of the two histograms of edge orientations, cell by cell within the masks' boxes, in [0, 1]."""
    one, other = _edges(first, first_mask), _edges(second, second_mask)
    return float(one @ other / max(1e-9, np.linalg.norm(one) * np.linalg.norm(other)))


def _colours(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Share of the masked pixels in each of the cube's cells; each pixel counts in the cells around it, by nearness."""
    scaled = picture[mask] / 255 * (COLOUR_BINS - 1)
    low = np.minimum(scaled.astype(int), COLOUR_BINS - 2)
    near = scaled - low
    counts = np.zeros((COLOUR_BINS,) * 3)
    for corner in np.ndindex(2, 2, 2):
        share = np.where(corner, near, 1 - near).prod(1)
        np.add.at(counts, tuple((low + corner).T), share)
    return counts / max(1, len(scaled))


def _edges(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Gradient magnitude by cell and orientation (without sign) of the grey picture, outside of the mask none."""
    grey = np.where(mask, picture.mean(2), 255.0)
    down, right = np.gradient(grey)
    strength = np.hypot(down, right)
    turn = (np.arctan2(down, right) / np.pi % 1 * ORIENTATIONS).astype(int) % ORIENTATIONS
    x0, y0, x1, y1 = boxes_of(mask)
    rows, columns = np.nonzero(strength[y0:y1, x0:x1])
    cell = rows * CELLS // max(1, y1 - y0), columns * CELLS // max(1, x1 - x0)
    counts = np.zeros((CELLS, CELLS, ORIENTATIONS))
    inside = rows + y0, columns + x0
    np.add.at(counts, (*cell, turn[inside]), strength[inside])
    return counts.ravel()


def evaluate(num_identities: int) -> dict[str, float]:
    """Probability that two poses of one held-out identity are more alike than pictures of two identities (chance .5)."""
    rng = np.random.default_rng(SEED)
    identities = [sample_identity(rng, "heldout") for _ in range(num_identities)]
    views: list[list[tuple[Any, Any]]] = []
    for poses in (POSES[:3], POSES[3:]):
        drawn = []
        for identity in identities:
            pose = poses[int(rng.integers(len(poses)))]
            picture = render_reference(identity, pose, phase=float(rng.uniform()), yaw=float(rng.uniform(-1, 1)))
            drawn.append((picture, (picture < 250).any(2)))
        views.append(drawn)
    figures = {}
    for name, likeness in (("colour_auc", colour_likeness), ("edge_auc", edge_likeness)):
        same = np.array([likeness(*a, *b) for a, b in zip(*views, strict=True)])
        other = np.array([likeness(*a, *b) for a, b in zip(views[0], [*views[1][1:], views[1][0]], strict=True)])
        figures[name] = float((same[:, None] > other[None]).mean())
    return figures
