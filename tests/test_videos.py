import numpy as np
import psutil
import pytest

from refalign.config import CurationConfig, VideoConfig
from refalign.config.presets import toy
from refalign.curation.shots import choose_detection_offsets, iter_windows
from refalign.errors import DataError
from refalign.io.images import write_mp4
from refalign.io.video import ClipSpec, iter_frames, iter_grid, make_center_crop, read_clips

CONFIG = CurationConfig()


def make_frames(count, *, height=48, width=64, seed=0):
    """A smooth picture whose brightness tells the frame's number, 8 grey levels apart."""
    gradient = np.linspace(0, 40, width)[None, :, None] + np.zeros((height, 1, 3)) + seed
    return np.stack([np.clip(gradient + 8 * number, 0, 255) for number in range(count)]).astype(np.uint8)


def levels_of(frames):
    return [round((float(frame.mean()) - 20) / 8) for frame in frames]


def test_the_grid_shows_what_a_player_shows(tmp_path):
    write_mp4(tmp_path / "a.mp4", make_frames(20), fps=20)
    grid = [(round(frame.time_s * 20), indices) for frame, indices in iter_grid(iter_frames(tmp_path / "a.mp4", CONFIG), 8.0)]
    shown = {index: number for number, indices in grid for index in indices}
    assert shown == {index: int(index / 8 * 20 + 1e-6) for index in range(8)}


def test_a_slow_video_repeats_frames_on_a_fast_grid(tmp_path):
    write_mp4(tmp_path / "a.mp4", make_frames(4), fps=5)
    indices = [indices for _, indices in iter_grid(iter_frames(tmp_path / "a.mp4", CONFIG), 15.0)]
    assert indices == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]


@pytest.mark.parametrize(("share", "more"), [("1", 0), ("3", 3), ("3,2", 3)])
def test_decoding_starts_as_many_threads_as_the_actor_has_cores(tmp_path, monkeypatch, share, more):
    write_mp4(tmp_path / "a.mp4", make_frames(20), fps=20)
    monkeypatch.setenv("OMP_NUM_THREADS", share)
    before, frames = psutil.Process().num_threads(), iter_frames(tmp_path / "a.mp4", CONFIG)
    next(frames).to_rgb()
    assert psutil.Process().num_threads() - before == more
    frames.close()


def test_read_clips_gives_several_clips_in_one_pass(tmp_path):
    write_mp4(tmp_path / "a.mp4", make_frames(20), fps=8)
    video = VideoConfig(height_px=48, width_px=64, num_frames=5, fps=8.0)
    whole = (0, 0, 64, 48)
    first, second = read_clips(tmp_path / "a.mp4", [ClipSpec(0.0, whole), ClipSpec(0.5, whole)], video, CONFIG)
    assert first.shape == second.shape == (5, 48, 64, 3)
    assert levels_of(first) == [0, 1, 2, 3, 4]
    assert levels_of(second) == [4, 5, 6, 7, 8]


def test_a_clip_beyond_the_end_is_a_fault(tmp_path):
    write_mp4(tmp_path / "a.mp4", make_frames(6), fps=8)
    video = VideoConfig(height_px=48, width_px=64, num_frames=5, fps=8.0)
    with pytest.raises(DataError) as caught:
        read_clips(tmp_path / "a.mp4", [ClipSpec(0.5, (0, 0, 64, 48))], video, CONFIG)
    assert caught.value.reason == "TOO_SHORT" and "2 of 5" in str(caught.value)


def test_no_window_crosses_a_cut(tmp_path):
    rng = np.random.default_rng(0)
    scenes = [np.repeat(rng.integers(0, 255, (1, 96, 96, 3), dtype=np.uint8), 12, axis=0) for _ in range(3)]
    config = toy()
    write_mp4(tmp_path / "a.mp4", np.concatenate(scenes), fps=config.video.fps)
    starts = [window.start_index for window in iter_windows(tmp_path / "a.mp4", config, duration_s=None)]
    assert starts == [0, 12, 24]


def test_windows_are_limited_and_spread_over_the_video(tmp_path):
    config = toy()
    write_mp4(tmp_path / "a.mp4", np.repeat(make_frames(1), 200, axis=0), fps=config.video.fps)
    starts = [window.start_index for window in iter_windows(tmp_path / "a.mp4", config, duration_s=200 / config.video.fps)]
    assert starts == [0, 50, 100, 150]
    window = next(iter_windows(tmp_path / "a.mp4", config, duration_s=200 / config.video.fps))
    assert window.frame_indices == [0, 2, 4, 6, 8] and len(window.frames) == 5


def test_detection_frames_are_spread_and_never_more_than_there_are():
    assert choose_detection_offsets(9, 5) == [0, 2, 4, 6, 8]
    assert choose_detection_offsets(3, 5) == [0, 1, 2]
    assert choose_detection_offsets(81, 1) == [0]


def test_center_crop_has_the_aspect_of_the_clip():
    wide = VideoConfig(height_px=480, width_px=832, num_frames=81, fps=25.0)
    assert make_center_crop((0, 0, 832, 480), wide) == (0, 0, 832, 480)
    left, top, right, bottom = make_center_crop((100, 0, 580, 480), wide)
    assert (right - left, left) == (480, 100) and abs((bottom - top) - 277) <= 1 and abs(top - (480 - bottom)) <= 1


@pytest.mark.parametrize(("content", "reason"), [(b"", "EMPTY_FILE"), (b"no video at all" * 50, "UNREADABLE"), (None, "MISSING")])
def test_files_that_are_no_video_are_named(tmp_path, content, reason):
    path = tmp_path / "a.mp4"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(iter_frames(path, CONFIG))
    assert caught.value.reason == reason


def test_limits_on_bytes_and_pixels(tmp_path):
    write_mp4(tmp_path / "a.mp4", make_frames(3), fps=8)
    with pytest.raises(DataError) as caught:
        list(iter_frames(tmp_path / "a.mp4", CurationConfig(max_video_bytes=100)))
    assert caught.value.reason == "TOO_LARGE"
    with pytest.raises(DataError) as caught:
        list(iter_frames(tmp_path / "a.mp4", CurationConfig(max_frame_px=100)))
    assert caught.value.reason == "TOO_MANY_PIXELS"


ODD = {
    "av1_video.mkv": (360, 640, 125),
    "decord_unordered.mov": (50, 50, 4),
    "decord_video_90.mov": (568, 320, 3),
    "discard_first_keyframe.mp4": (64, 64, 25),
    "h265_10bits.mp4": (200, 200, 30),
    "nasa_13013_rotated.mp4": (480, 270, 17),
    "test_non_zero_start.mp4": (112, 200, 12),
    "testsrc2_odd_height_and_width_444.mp4": (241, 321, 25),
    "testsrc2_odd_width_vp9.mp4": (240, 321, 25),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_real_files_decode_upright_and_from_zero(real_data, name):
    frames = list(iter_frames(real_data / "odd" / name, CONFIG))
    height, width, count = ODD[name]
    assert len(frames) == count
    assert frames[0].time_s == 0 and frames[0].size_px == (height, width)
    assert frames[0].to_rgb().shape == (height, width, 3)
    assert all(a.time_s <= b.time_s for a, b in zip(frames, frames[1:], strict=False))


def test_a_truncated_real_file_is_named_with_its_frames(real_data):
    with pytest.raises(DataError) as caught:
        list(iter_frames(real_data / "odd" / "decord_corrupted.mp4", CONFIG))
    assert caught.value.reason == "TRUNCATED" and "after 28 frames" in str(caught.value)
