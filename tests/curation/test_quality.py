"""Scores without models, limits on them, and near-duplicates found without comparing all with all."""

import math

import cv2
import numpy as np
import pytest

from refalign.config import QualityConfig
from refalign.curation.quality import (
    SCORE_COLUMNS,
    choose_reasons,
    find_close_hashes,
    find_near_duplicates,
    find_similar,
    hash_picture,
    measure_clip,
)


def make_picture(seed=0, height=96, width=160):
    noise = np.random.default_rng(seed).integers(0, 255, (6, 10, 3), dtype=np.uint8)
    return cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)


def test_sharpness_falls_with_blur_and_exposure_with_darkness():
    picture = make_picture() // 2 + np.random.default_rng(0).integers(0, 99, (96, 160, 3), dtype=np.uint8)
    sharp, blurred, dark, white = (
        measure_clip([frame], [0]) for frame in (picture, cv2.blur(picture, (9, 9)), picture // 8, np.full_like(picture, 255))
    )
    assert sharp.sharpness > 2 * blurred.sharpness
    assert sharp.exposure > 5 * dark.exposure and 0.3 < sharp.exposure < 0.7
    assert white.exposure == 1 and white.clipped_fraction == 1 and sharp.clipped_fraction < 0.1


@pytest.mark.parametrize(("gap", "height", "width"), [(1, 96, 160), (4, 96, 160), (1, 160, 96), (2, 270, 480)])
def test_motion_is_the_share_of_the_long_side_moved_per_frame(gap, height, width):
    scene = make_picture(1, 2 * height, 2 * width)
    step_px = 4 * max(height, width) // 160
    frames = [scene[20 : 20 + height, 20 + n * step_px : 20 + n * step_px + width] for n in range(3)]
    motion = measure_clip(frames, [0, gap, 2 * gap]).motion
    assert motion == pytest.approx(step_px / max(height, width) / gap, rel=0.15)


def test_motion_does_not_depend_on_the_number_of_threads():
    scene = make_picture(4, 700, 1200)
    frames = [scene[10:490, 10 + 7 * n : 842 + 7 * n] for n in range(4)]
    before, motions = cv2.getNumThreads(), []
    try:
        for threads in (1, 2, 8):
            cv2.setNumThreads(threads)
            motions.append(measure_clip(frames, [0, 2, 4, 6]).motion)
            assert cv2.getNumThreads() == threads
    finally:
        cv2.setNumThreads(before)
    assert len(set(motions)) == 1


def test_a_still_clip_does_not_move_and_one_frame_has_no_motion():
    assert measure_clip([make_picture()] * 3, [0, 4, 8]).motion < 1e-4
    assert math.isnan(measure_clip([make_picture()], [0]).motion)


def test_the_hash_survives_scale_compression_and_light_but_not_another_picture():
    picture = make_picture(2, 240, 400)
    original = hash_picture(picture)
    _, jpeg = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 40])
    changed = [
        cv2.resize(picture, (200, 120), interpolation=cv2.INTER_AREA),
        cv2.imdecode(jpeg, cv2.IMREAD_COLOR),
        (picture * 0.8).astype(np.uint8),
    ]
    near = [distance(original, hash_picture(other)) for other in changed]
    far = [distance(original, hash_picture(make_picture(seed, 240, 400))) for seed in range(10, 40)]
    assert max(near) <= 6 < 12 < min(far), (near, far)
    assert -(2**63) <= original < 2**63 and hash_picture(picture) == original


def distance(left, right):
    return ((left ^ right) & (2**64 - 1)).bit_count()


def make_columns(**changes):
    columns = {name: np.full(2, 0.5, np.float32) for name in SCORE_COLUMNS} | {"phash": np.zeros(2, np.int64)}
    return columns | {name: np.asarray(values) for name, values in changes.items()}


@pytest.mark.parametrize(
    ("setting", "column", "bad", "reason"),
    [
        ({"min_sharpness": 50.0}, "sharpness", 49.0, "TOO_BLURRED"),
        ({"min_exposure": 0.2}, "exposure", 0.1, "TOO_DARK"),
        ({"max_clipped_fraction": 0.6}, "clipped_fraction", 0.7, "CLIPPED"),
        ({"min_motion": 0.01}, "motion", 0.0, "NO_MOTION"),
        ({"max_motion": 0.6}, "motion", 0.7, "TOO_MUCH_MOTION"),
        ({"min_text_image": 0.2}, "text_image_score", 0.1, "POOR_CAPTION_MATCH"),
        ({"min_aesthetic": 4.5}, "aesthetic_score", 4.4, "NOT_AESTHETIC"),
    ],
)
def test_each_limit_has_its_reason(setting, column, bad, reason):
    config = QualityConfig(**setting)
    limit = next(iter(setting.values()))
    assert choose_reasons(make_columns(**{column: [bad, limit]}), config).tolist() == [reason, ""]
    assert choose_reasons(make_columns(**{column: [math.nan, limit]}), config).tolist() == ["", ""], "not computed: passes"
    assert choose_reasons(make_columns(**{column: [bad, bad]}), QualityConfig()).tolist() == ["", ""], "off by default"


def find_near_duplicates_slowly(clip_ids, hashes, max_distance):
    kept, gone = [], set()
    for index in sorted(range(len(clip_ids)), key=lambda index: clip_ids[index]):
        if any(distance(int(hashes[index]), int(hashes[other])) <= max_distance for other in kept):
            gone.add(index)
        else:
            kept.append(index)
    return [index in gone for index in range(len(clip_ids))]


@pytest.mark.parametrize("max_distance", [0, 1, 3, 4, 7, 8, 11, 16])
def test_near_duplicates_equal_loops(max_distance):
    rng = np.random.default_rng(max_distance)
    centres = rng.integers(-(2**63), 2**63 - 1, 60, dtype=np.int64)
    hashes = centres[rng.integers(0, 60, 300)]
    for _ in range(max_distance + 2):
        flips = np.int64(1) << rng.integers(0, 63, 300)
        hashes = np.where(rng.random(300) < 0.5, hashes ^ flips, hashes)
    clip_ids = [f"clip-{number:04d}" for number in rng.permutation(300)]
    found = find_near_duplicates(clip_ids, hashes, max_distance)
    assert found.tolist() == find_near_duplicates_slowly(clip_ids, hashes, max_distance)
    assert 0 < found.sum() < 300


def test_the_first_by_id_stays_in_whatever_order_clips_come():
    hashes = np.array([7, 7, 7], np.int64)
    assert find_near_duplicates(["c", "a", "b"], hashes, 0).tolist() == [True, False, True]
    assert find_near_duplicates([], np.zeros(0, np.int64), 4).tolist() == []


def test_a_chain_keeps_what_is_far_from_all_that_stays():
    """a - b - c, each 4 bits on: b repeats a; c repeats only b, which is gone."""
    hashes = np.array([0, 0b1111, 0b11111111], np.int64)
    assert find_near_duplicates(["a", "b", "c"], hashes, 4).tolist() == [False, True, False]


def test_evaluation_pictures_are_recognised_by_hash_and_by_embedding():
    assert find_close_hashes(np.array([0, 3, 255]), np.array([1]), 2).tolist() == [True, True, False]
    embeddings = np.eye(3, dtype=np.float32)
    assert find_similar(embeddings, embeddings[[2]], 0.9).tolist() == [False, False, True]
