"""How good a clip is, in numbers; which clips are good enough; and which show what is already there.

Scores are columns of the clip rows, written once with the one decode pass. Limits (`refalign.config.QualityConfig`) are applied
to those columns by the pairs stage.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np

from refalign.config import ModelsConfig, QualityConfig

if TYPE_CHECKING:
    from refalign.models.scores import TextImageScorer

_FLOW_LONG_SIDE_PX = 160
_HASH_PX = 32
_HASH_SIDE = 8
_DARKEST, _BRIGHTEST = 4, 251
_NUM_BANDS, _BAND_BITS = 4, 16
_PROBES_AT_ONCE = 1 << 22


@dataclass(kw_only=True)
class Scores:
    """Columns of a clip row (`refalign.io.tables.CLIP_SCHEMA`). NaN: not computed."""

    sharpness: float
    exposure: float
    clipped_fraction: float
    motion: float
    text_image_score: float = math.nan
    aesthetic_score: float = math.nan
    phash: int


SCORE_COLUMNS = tuple(field.name for field in fields(Scores))


def measure_clip(frames: Sequence[np.ndarray], frame_indices: Sequence[int]) -> Scores:
    """The scores that need no model.

    Args:
        frames: uint8 [H, W, 3], cropped and scaled as they are trained on.
        frame_indices: position of each in the clip.
    """
    grey = [_to_grey(frame) for frame in frames]
    return Scores(
        sharpness=float(np.mean([measure_sharpness(frame) for frame in grey])),
        exposure=float(np.mean([frame.mean() for frame in grey])) / 255,
        clipped_fraction=float(np.mean([((frame <= _DARKEST) | (frame >= _BRIGHTEST)).mean() for frame in grey])),
        motion=measure_motion(grey, frame_indices),
        phash=hash_picture(grey[len(grey) // 2]),
    )


def match_caption(frames: Sequence[np.ndarray], caption: str, scorer: TextImageScorer | None) -> tuple[float, float]:
    """Text-image and aesthetic score, means over the frames; NaN without a model, the first also without a caption."""
    if scorer is None:
        return math.nan, math.nan
    embeddings = scorer.embed_images(np.stack(frames))
    match = float((embeddings @ scorer.embed_text(caption)).mean()) if caption else math.nan
    return match, float(scorer.head(embeddings).mean()) if scorer.head is not None else math.nan


def load_scorer(models: ModelsConfig, device: str) -> TextImageScorer | None:
    """The scorer that the settings name, or None."""
    if models.text_image is None:
        return None
    from refalign.models.scores import TextImageScorer, load_aesthetic_head

    scorer = TextImageScorer.from_pretrained(models.text_image, revision=models.text_image_revision, device=device)
    if models.aesthetic is not None:
        scorer.head = load_aesthetic_head(Path(models.aesthetic).expanduser(), scorer.width).to(device)
    return scorer


def measure_motion(grey: Sequence[np.ndarray], frame_indices: Sequence[int]) -> float:
    """Mean length of the optical flow between frames, per frame of the clip and as a share of the long side.

    NaN for fewer than two frames. The flow is by dense inverse search: of a smooth scene that moves by 4.0 px it measures 3.9 px,
    and Farneback's method 0.6 px.
    """
    if len(grey) < 2:
        return math.nan
    small = [_shrink(frame) for frame in grey]
    search = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
    lengths = []
    for before, after, first, second in zip(small, small[1:], frame_indices, frame_indices[1:]):
        flow = search.calc(before, after, np.zeros((*before.shape, 2), np.float32))
        lengths.append(float(np.linalg.norm(flow, axis=2).mean()) / max(before.shape) / max(1, second - first))
    return float(np.mean(lengths))


def measure_sharpness(picture: np.ndarray) -> float:
    """Variance of the Laplacian of uint8 [H, W] or [H, W, 3], RGB: low where it is blurred."""
    return float(cv2.Laplacian(_to_grey(picture), cv2.CV_64F).var())


def _to_grey(picture: np.ndarray) -> np.ndarray:
    return picture if picture.ndim == 2 else cv2.cvtColor(np.ascontiguousarray(picture), cv2.COLOR_RGB2GRAY)


def hash_picture(picture: np.ndarray) -> int:
    """Perceptual hash of a picture, as a signed 64-bit number: which of its 8 x 8 lowest frequencies lie above their median.

    Pictures that differ by scale, compression or brightness differ in few bits.

    Args:
        picture: uint8 [H, W] or [H, W, 3], RGB.
    """
    small = cv2.resize(_to_grey(picture), (_HASH_PX, _HASH_PX), interpolation=cv2.INTER_AREA).astype(np.float32)
    low = cv2.dct(small)[:_HASH_SIDE, :_HASH_SIDE].ravel()
    # The first coefficient is the mean brightness: it would only shift the median.
    return int(np.packbits(low > np.median(low[1:])).view(">i8")[0])


class Limit(NamedTuple):
    """A limit that is set, and the reason of clips beyond it."""

    reason: str
    column: str
    value: float
    is_minimum: bool


def list_limits(config: QualityConfig) -> list[Limit]:
    """The limits that are set, in the order in which they are applied."""
    limits = (
        ("TOO_BLURRED", "sharpness", config.min_sharpness, True),
        ("TOO_DARK", "exposure", config.min_exposure, True),
        ("CLIPPED", "clipped_fraction", config.max_clipped_fraction, False),
        ("NO_MOTION", "motion", config.min_motion, True),
        ("TOO_MUCH_MOTION", "motion", config.max_motion, False),
        ("POOR_CAPTION_MATCH", "text_image_score", config.min_text_image, True),
        ("NOT_AESTHETIC", "aesthetic_score", config.min_aesthetic, True),
    )
    return [Limit(reason, column, value, is_minimum) for reason, column, value, is_minimum in limits if value is not None]


def choose_reasons(columns: Mapping[str, np.ndarray], config: QualityConfig) -> np.ndarray:
    """Why each clip is not wanted, the first reason that holds; an empty text where none does. NaN passes every test.

    Args:
        columns: the score columns [N] of the clip rows.
    """
    reasons = np.full(len(columns["phash"]), "", dtype=object)
    for limit in list_limits(config):
        values, bound = np.asarray(columns[limit.column], np.float32), np.float32(limit.value)
        fails = values < bound if limit.is_minimum else values > bound
        reasons[fails & (reasons == "")] = limit.reason
    return reasons


def find_near_duplicates(clip_ids: Sequence[str], hashes: np.ndarray, max_distance: int) -> np.ndarray:
    """bool [N]: which clips repeat an earlier one, by the order of their ids, that does not itself repeat another.

    Args:
        hashes: int64 [N].
        max_distance: bits of 64 in which a repeated clip may differ, at most 16.
    """
    order = np.argsort(np.asarray(clip_ids, dtype=object), kind="stable")
    unique, first = np.unique(np.asarray(hashes, np.int64)[order], return_index=True)
    repeats = np.ones(len(order), bool)
    repeats[first] = False  # of equal hashes the first id; what follows compares different hashes only
    position = np.argsort(first)
    unique, first = unique[position], first[position]
    gone = np.zeros(len(unique), bool)
    for earlier, later in _iter_close_pairs(unique.view(np.uint64), max_distance):
        gone[later] |= not gone[earlier]
    # A clip with the hash of one that repeats another repeats that one too.
    repeats[first[gone]] = True
    answer = np.empty(len(order), bool)
    answer[order] = repeats
    return answer


def find_close_hashes(hashes: np.ndarray, others: np.ndarray, max_distance: int) -> np.ndarray:
    """bool [N]: which hashes are within ``max_distance`` bits of one of a few ``others``."""
    close = np.zeros(len(hashes), bool)
    for other in np.asarray(others, np.int64):
        close |= np.bitwise_count((np.asarray(hashes, np.int64) ^ other).view(np.uint64)) <= max_distance
    return close


def find_similar(embeddings: np.ndarray, others: np.ndarray, min_similarity: float) -> np.ndarray:
    """bool [N]: which embeddings have a cosine of at least ``min_similarity`` with one of ``others``; all L2-normalised."""
    return (embeddings @ others.T).max(axis=1, initial=-1.0) >= min_similarity


def _iter_close_pairs(hashes: np.ndarray, max_distance: int) -> Iterator[tuple[int, int]]:
    """Pairs (earlier, later) of different hashes at most ``max_distance`` bits apart, by later and then by earlier.

    Multi-index hashing: of four bands of 16 bits at least one differs in at most ``max_distance // 4`` bits, so looking up every
    such neighbour of every band finds all pairs without comparing all with all.

    Source: Norouzi, Punjani, Fleet, "Fast search in Hamming space with multi-index hashing", CVPR 2012.
    """
    found = []
    for band in range(_NUM_BANDS):
        keys = ((hashes >> np.uint64(band * _BAND_BITS)) & np.uint64(2**_BAND_BITS - 1)).astype(np.int64)
        order = np.argsort(keys, kind="stable")
        bounds = np.searchsorted(keys[order], np.arange(2**_BAND_BITS + 1))
        for flipped in _make_flips(max_distance // _NUM_BANDS):
            probed = keys ^ flipped
            found += _verify(hashes, order, bounds[probed], bounds[probed + 1], max_distance)
    if not found:
        return
    pairs = np.unique(np.concatenate(found), axis=0)
    for later, earlier in pairs.tolist():
        yield earlier, later


def _verify(
    hashes: np.ndarray, order: np.ndarray, starts: np.ndarray, ends: np.ndarray, max_distance: int
) -> Iterator[np.ndarray]:
    """Of the candidates ``order[starts[i] : ends[i]]`` of every hash i, the pairs [P, 2] (later, earlier) that are close."""
    counts = ends - starts
    total = np.concatenate([[0], np.cumsum(counts)])
    low = 0
    while low < len(hashes):
        high = max(low + 1, int(np.searchsorted(total, total[low] + _PROBES_AT_ONCE, side="right")) - 1)
        left = np.repeat(np.arange(low, high), counts[low:high])
        within = np.arange(total[low], total[high]) - np.repeat(total[low:high], counts[low:high])
        right = order[np.repeat(starts[low:high], counts[low:high]) + within]
        is_close = (right < left) & (np.bitwise_count(hashes[left] ^ hashes[right]) <= max_distance)
        yield np.stack([left[is_close], right[is_close]], axis=1)
        low = high


def _make_flips(radius: int) -> list[int]:
    """All numbers of 16 bits with at most ``radius`` bits set."""
    return [sum(1 << bit for bit in bits) for count in range(radius + 1) for bits in combinations(range(_BAND_BITS), count)]


def _shrink(grey: np.ndarray) -> np.ndarray:
    scale = _FLOW_LONG_SIDE_PX / max(grey.shape)
    if scale >= 1:
        return grey
    width, height = (max(16, round(side * scale)) for side in (grey.shape[1], grey.shape[0]))
    return cv2.resize(grey, (width, height), interpolation=cv2.INTER_AREA)
