"""What becomes of each real video under ``REFALIGN_REAL_DATA``, with the embedded weights, which know only drawn creatures."""

from collections import Counter

import pytest

from refalign.pipeline.outcomes import Outcome
from refalign.stages.subjects import SubjectsWorker
from tests.curation.curating import curate, make_config

USABLE = "usable"
"""Read to its end; whether a subject is found is the detector's word, and the embedded one has seen no real picture."""
VIDEOS = {"cosmos_30s.mp4": 4, "crush_027.mp4": 4, "nasa_13013.mp4": 4, "pancake.mkv": 4, "vace_test.mp4": 4}
"""Clips of 0.56 s, of which at most four are taken of a video."""
ODD = {
    "av1_video.mkv": (USABLE, 4),
    "decord_corrupted.mp4": ("TRUNCATED", 0),
    "decord_unordered.mov": ("TOO_SHORT", 0),
    "decord_video_90.mov": ("TOO_SHORT", 0),
    "discard_first_keyframe.mp4": (USABLE, 1),
    "h265_10bits.mp4": (USABLE, 1),
    "nasa_13013_rotated.mp4": (USABLE, 1),
    "test_non_zero_start.mp4": ("TOO_SHORT", 0),
    "testsrc2_odd_height_and_width_444.mp4": (USABLE, 1),
    "testsrc2_odd_width_vp9.mp4": (USABLE, 1),
}


@pytest.fixture(scope="module")
def actor():
    return SubjectsWorker(make_config())


def end_of(video):
    """Its reason, or that it was read: written or filtered for what it shows."""
    return USABLE if Outcome("video", "", video.reason).status == "written" or video.reason == "NO_SUBJECT" else video.reason


@pytest.mark.parametrize(
    ("folder", "expected"), [("videos", {name: (USABLE, clips) for name, clips in VIDEOS.items()}), ("odd", ODD)]
)
def test_every_real_file_ends_as_the_table_says(actor, real_data, tmp_path, folder, expected):
    outcomes, _ = curate(actor, real_data / folder, tmp_path, level=None)
    videos = {outcome.item: outcome for outcome in outcomes if outcome.level == "video"}
    clips = Counter(outcome.item.partition("-")[0] for outcome in outcomes if outcome.level == "clip")
    assert {name: end_of(video) for name, video in videos.items()} == {name: end for name, (end, _) in expected.items()}
    assert sorted(clips.values()) == sorted(count for _, count in expected.values() if count)


def test_a_pattern_a_list_and_a_single_file_name_the_same_videos(actor, real_data, tmp_path):
    names = ["discard_first_keyframe.mp4", "h265_10bits.mp4"]
    (tmp_path / "list.txt").write_text("\n".join(str(real_data / "odd" / name) for name in names))
    listed, _ = curate(actor, tmp_path / "list.txt", tmp_path / "out")
    matched, _ = curate(actor, real_data / "odd" / "[dh]*key*.mp4", tmp_path / "out")
    (single,), _ = curate(actor, real_data / "odd" / names[0], tmp_path / "out")
    assert [end_of(video) for video in [*listed, *matched, single]] == [USABLE] * 4
    assert single.item == matched[0].item == names[0]


def test_the_real_annotation_gives_its_clip(actor, real_data, tmp_path):
    videos, rows = curate(actor, real_data / "opens2v", tmp_path)
    reasons = Counter(video.reason for video in videos)
    assert reasons == {"": 1, "DUPLICATE": 2, "NOT_A_VIDEO": 2}, "one clip, told three times, and two JSON files of other kinds"
    (row,) = rows
    assert row["license"] == "Apache-2.0 (annotation)" and [subject["class_name"] for subject in row["subjects"]]
