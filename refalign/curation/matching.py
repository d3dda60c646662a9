"""Which subjects of one source group are the same: mutual nearest neighbours among the embeddings of their crops."""

from __future__ import annotations

import numpy as np

from refalign.config import PairsConfig

_BLOCK = 2048
Matches = tuple[np.ndarray, np.ndarray, np.ndarray]


def match_subjects(embeddings: np.ndarray, clips: np.ndarray, config: PairsConfig) -> Matches:
    """Matches within one group: subjects [M], their references in other clips [M], cosines [M].

    Two subjects match if each is the other's nearest neighbour in the other's clip, with a cosine of at least
    ``min_similarity`` and at most ``max_similarity``. Sorted by subject, the most similar reference first.

    Clips are taken in blocks: whether two subjects match is decided by the products of their two blocks alone, so memory does
    not grow with the group.

    Args:
        embeddings: float32 [N, E], L2-normalised.
        clips: int [N], the clip of each subject; equal numbers adjacent and ascending from 0.
    """
    blocks = _split_blocks(clips)
    found: list[Matches] = [(np.zeros(0, int), np.zeros(0, int), np.zeros(0, np.float32))]
    for rows in blocks:
        of_block = [_match_blocks(embeddings, clips, rows, columns, config) for columns in blocks]
        found.append(_keep_best(*(np.concatenate(parts) for parts in zip(*of_block)), config.max_references_per_subject))
    subjects, references, values = map(np.concatenate, zip(*found))
    return subjects, references, values


def _split_blocks(clips: np.ndarray) -> list[slice]:
    """Ranges of about ``_BLOCK`` subjects that begin and end with a clip."""
    starts = np.flatnonzero(np.diff(clips, prepend=-1)) if len(clips) else np.zeros(0, int)
    chosen: list[int] = []
    for start in starts.tolist():
        if not chosen or start - chosen[-1] >= _BLOCK:
            chosen.append(start)
    return [slice(*ends) for ends in zip(chosen, [*chosen[1:], len(clips)])]


def _match_blocks(embeddings: np.ndarray, clips: np.ndarray, rows: slice, columns: slice, config: PairsConfig) -> Matches:
    """The mutual nearest neighbours of two blocks within the limits, in no particular order."""
    similarity = embeddings[rows] @ embeddings[columns].T
    there, value = _nearest_per_clip(np.ascontiguousarray(similarity.T), clips[columns])  # [clips of columns, rows]
    here, _ = _nearest_per_clip(similarity, clips[rows])  # [clips of rows, columns]
    good = (value >= config.min_similarity) & (value <= config.max_similarity)
    clip, subject = np.nonzero(good)
    reference, value = there[clip, subject], value[clip, subject]
    own_clip = clips[rows] - clips[rows.start]
    mutual = here[own_clip[subject], reference] == subject
    mutual &= clips[rows][subject] != clips[columns][reference]
    return subject[mutual] + rows.start, reference[mutual] + columns.start, value[mutual]


def _nearest_per_clip(similarity: np.ndarray, clips: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per clip and column the row of the clip with the largest value, the first of equals, and that value; both [clips, M].

    Clips hold few subjects, so this goes through their first, second, third subject ... of all clips at once.
    """
    first = np.flatnonzero(np.diff(clips, prepend=clips[0] - 1))
    sizes = np.diff(first, append=len(clips))
    value = similarity[first]
    nearest = np.repeat(first[:, None], similarity.shape[1], axis=1)
    for position in range(1, sizes.max()):
        has = np.flatnonzero(sizes > position)
        rows = first[has] + position
        candidate = similarity[rows]
        is_better = candidate > value[has]
        value[has] = np.where(is_better, candidate, value[has])
        nearest[has] = np.where(is_better, rows[:, None], nearest[has])
    return nearest, value


def _keep_best(subjects: np.ndarray, references: np.ndarray, values: np.ndarray, limit: int) -> Matches:
    """The ``limit`` largest values of each subject; of equal ones the reference that comes first, as they come in."""
    order = np.lexsort((-values, subjects))  # which keeps the order of equals
    subjects = subjects[order]
    rank = np.arange(len(subjects)) - np.searchsorted(subjects, subjects)
    kept = order[rank < limit]
    return subjects[rank < limit], references[kept], values[kept]
