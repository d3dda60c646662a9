"""Time, picture, damage and streams as files have them: what becomes of the frames, kind by kind."""

import itertools
from collections import Counter
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from refalign.config import CurationConfig
from refalign.config.presets import toy
from refalign.curation.shots import iter_annotated_window, iter_windows
from refalign.curation.sources import Annotation
from refalign.errors import DataError
from refalign.io.video import ClipSpec, iter_frames, iter_grid, probe_duration_s, read_clips
from tests.shown.making import HEIGHT, WIDTH, draw, joined, to_frame, with_cover, write

CONFIG = CurationConfig()
TOY = toy()
LENGTH, FPS = TOY.video.num_frames, TOY.video.fps


def windows_of(path):
    """The windows of a video, and what is unusual of it."""
    unusual = Counter()
    duration_s = probe_duration_s(path, TOY.curation)
    return list(iter_windows(path, TOY, duration_s=duration_s, unusual=unusual)), unusual


def show_all(path):
    return np.stack([frame.to_rgb() for frame in iter_frames(path, CONFIG)])


def psnr(left, right):
    return 10 * np.log10(255**2 / max(np.mean((left.astype(float) - right) ** 2), 1e-9))


def check_clips(path, windows):
    """Reads the clips again, as the shards step does: no frame of them is lacking, and the sampled ones are the same."""
    specs = [ClipSpec(w.start_s(FPS), (0, 0, w.frame_size_px[1], w.frame_size_px[0])) for w in windows]
    video = TOY.video.model_copy(update={"height_px": HEIGHT, "width_px": WIDTH})
    for window, clip in zip(windows, read_clips(path, specs, video, CONFIG), strict=True):
        assert len(clip) == LENGTH
        for pixels, index in zip(window.frames, window.frame_indices, strict=True):
            if pixels.shape == (HEIGHT, WIDTH, 3):
                assert (clip[index - window.start_index] == pixels).all()


# Kind 5: time.


@pytest.mark.parametrize(("kind", "codec"), [("mpegts", "libx264"), ("mpeg", "mpeg2video"), ("mpegts", "libx265")])
def test_5_joined_recordings_give_clips_of_every_part(tmp_path, kind, codec):
    parts = [draw(27, seed=seed) for seed in range(3)]
    rate = 25 if kind == "mpeg" else 16
    path = joined(tmp_path / "a", parts, kind=kind, codec=codec, rate=rate)
    frames = list(iter_frames(path, CONFIG))
    assert len(frames) == 81 and [frame.begins for frame in frames].count("step back") == 2
    times = [frame.time_s for frame in frames]
    assert all(0 < later - earlier < 0.2 for earlier, later in itertools.pairwise(times)), "the parts follow one another"
    windows, unusual = windows_of(path)
    assert unusual["step back"] == 2
    shown = {int(np.argmax([psnr(part[4], window.frames[2]) for part in parts])) for window in windows}
    assert shown == {0, 1, 2}
    per_part = 27 / rate * FPS
    assert all(w.start_index // per_part == (w.start_index + LENGTH - 1) // per_part for w in windows), "none spans a step"
    check_clips(path, windows)


@pytest.mark.parametrize(("kind", "codec"), [("flv", "libx264"), ("avi", "mpeg4")])
def test_5_where_ffmpeg_stops_before_the_end_of_joined_files_it_is_said(tmp_path, kind, codec):
    parts = [draw(27, seed=seed) for seed in range(3)]
    whole = tmp_path / f"whole.{kind}"
    write(whole, parts[0], kind=kind, codec=codec, b_frames=0)
    path = joined(tmp_path / f"a.{kind}", parts, kind=kind, codec=codec, b_frames=0)
    told = [Counter(), Counter()]
    counts = [sum(1 for _ in iter_frames(file, CONFIG, unusual)) for file, unusual in zip((whole, path), told, strict=True)]
    assert counts[0] == 27 and not told[0]
    assert counts[1] == 81 or told[1]["the end is not read"] == 1, (counts, told)


def test_5_recordings_joined_with_a_later_clock_are_divided_by_a_gap(tmp_path):
    """A second part that begins four hours later: beyond the longest gap that is believed of one recording."""
    late = np.arange(27) + 4 * 3600 * 16
    data = write(tmp_path / "a", draw(27), kind="mpegts").read_bytes()
    data += write(tmp_path / "b", draw(27, seed=1), kind="mpegts", pts=late).read_bytes()
    (tmp_path / "a").write_bytes(data)
    windows, unusual = windows_of(tmp_path / "a")
    assert unusual["gap"] == 1 and {window.start_index > 10_000 for window in windows} == {False, True}
    check_clips(tmp_path / "a", windows)


def test_5_no_clip_lies_in_a_gap(tmp_path):
    frames = draw(54)
    path = write(tmp_path / "a.mkv", frames, pts=[*range(27), *range(4827, 4854)])
    windows, unusual = windows_of(path)
    assert unusual == {"gap": 1}
    assert [window.start_index < 27 for window in windows] == [True, True, False, False], "the gap uses up no clip"
    assert all(w.start_index + LENGTH <= 28 or w.start_index >= 4827 for w in windows)
    for window in windows:
        assert len({pixels.tobytes() for pixels in window.frames}) == len(window.frames), "no picture stands still"
    check_clips(path, windows)


def test_5_slow_pictures_are_no_gaps(tmp_path):
    """One picture in two seconds, as time lapse has it: the usual pace of the file."""
    path = write(tmp_path / "a.mkv", draw(6), rate=1, pts=[0, 2, 4, 6, 8, 10])
    frames = list(iter_frames(path, CONFIG))
    assert not any(frame.begins for frame in frames)
    assert [len(indices) for _, indices in iter_grid(iter(frames), 4.0)] == [8] * 6


def test_5_frames_out_of_order_by_little_belong_to_one_recording(tmp_path):
    """As of recorders whose clock is not that of their sensor."""
    times_ms = [40 * number - 60 * (number % 7 == 6) for number in range(30)]
    with av.open(str(tmp_path / "a.mkv"), "w") as file:
        stream = file.add_stream("mjpeg", rate=25)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuvj420p"
        packets = [packet for pixels in draw(30) for packet in stream.encode(to_frame(pixels, "yuvj420p"))]
        for number, (packet, time_ms) in enumerate(zip(packets, times_ms, strict=True)):
            packet.time_base = Fraction(1, 1000)
            packet.pts, packet.dts = time_ms, 40 * number - 200
            file.mux(packet)
    frames = list(iter_frames(tmp_path / "a.mkv", CONFIG))
    assert [round(1000 * frame.time_s) for frame in frames] == times_ms, "what the file says"
    assert not any(frame.begins for frame in frames)
    indices = [index for _, shown in iter_grid(iter(frames), 16.0) for index in shown]
    assert indices == list(range(len(indices)))


# Kind 6: the picture changes on the way.


@pytest.mark.parametrize(("kind", "codec"), [("mpegts", "libx264"), ("mpeg", "mpeg2video"), ("mpegts", "libx265")])
def test_6_another_size_begins_a_shot(tmp_path, kind, codec):
    rate = 25 if codec == "mpeg2video" else 16
    data = write(tmp_path / "a", draw(27), kind=kind, codec=codec, rate=rate).read_bytes()
    data += write(tmp_path / "b", draw(27, width=160), kind=kind, codec=codec, rate=rate).read_bytes()
    (tmp_path / "a").write_bytes(data)
    windows, unusual = windows_of(tmp_path / "a")
    assert unusual["step back"] == 1
    assert {window.frame_size_px for window in windows} == {(HEIGHT, WIDTH), (HEIGHT, 160)}
    for window in windows:
        assert {pixels.shape[:2] for pixels in window.frames} == {window.frame_size_px}
    check_clips(tmp_path / "a", windows)


def test_6_a_size_that_changes_without_a_step_in_time_begins_a_shot(tmp_path):
    """As WebRTC and HLS do it: the times go on."""
    data = write(tmp_path / "a", draw(27), kind="mpegts").read_bytes()
    data += write(tmp_path / "b", draw(27, width=160), kind="mpegts", pts=np.arange(27, 54)).read_bytes()
    (tmp_path / "a").write_bytes(data)
    windows, unusual = windows_of(tmp_path / "a")
    assert unusual["new picture"] == 1
    assert {window.frame_size_px for window in windows} == {(HEIGHT, WIDTH), (HEIGHT, 160)}
    check_clips(tmp_path / "a", windows)


def test_6_another_pixel_aspect_begins_a_shot(tmp_path):
    """Broadcasts switch between 4:3 and 16:9 at one stored size."""
    data = write(tmp_path / "a", draw(27), kind="mpegts", aspect="1/1").read_bytes()
    data += write(tmp_path / "b", draw(27), kind="mpegts", aspect="4/3", pts=np.arange(27, 54)).read_bytes()
    (tmp_path / "a").write_bytes(data)
    windows, unusual = windows_of(tmp_path / "a")
    assert unusual["new picture"] == 1
    assert {window.frame_size_px for window in windows} == {(HEIGHT, WIDTH), (HEIGHT, 128)}


# Kind 7: intact files called broken, broken frames used.


def test_7_dropped_frames_of_avi_are_no_fault(tmp_path):
    frames = draw(43)
    kept = [number for number in range(53) if number % 5 != 3][:43]
    path = write(tmp_path / "a.avi", frames, codec="mpeg4", rate=32, pts=2 * np.array(kept))
    with av.open(str(path)) as file:
        assert file.streams.video[0].frames > 43, "the header counts the dropped ones"
    shown = list(iter_frames(path, CONFIG))
    assert len(shown) == 43
    assert np.allclose(np.diff([frame.time_s for frame in shown]), np.diff(kept) / 16, atol=1e-3)


def test_7_duplicates_of_theora_are_no_fault():
    """``duplicates.ogv``: 24 packets, 8 of them empty, which say that the picture stays."""
    path = Path(__file__).with_name("duplicates.ogv")
    frames = list(iter_frames(path, CONFIG))
    assert len(frames) == 16
    indices = [index for _, shown in iter_grid(iter(frames), 16.0) for index in shown]
    assert indices == list(range(len(indices))) and len(indices) >= 23, "the picture stays for the duplicates"


def test_7_a_trimmed_phone_video_is_whole(tmp_path):
    """An edit list shows less than the file holds: packets before it are decoded and not shown."""
    path = write(tmp_path / "a.mp4", draw(48), gop=12)
    with av.open(str(path)) as source, av.open(str(tmp_path / "b.mp4"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.pts, packet.dts, packet.stream = packet.pts - 8 * 1024, packet.dts - 8 * 1024, stream
                target.mux(packet)
    with av.open(str(tmp_path / "b.mp4")) as file:
        num_shown = sum(1 for _ in file.decode(video=0))
    assert num_shown < 48 and len(list(iter_frames(tmp_path / "b.mp4", CONFIG))) == num_shown


def damage(path, share=0.4, count=40):
    """Overwrites bytes in the middle of the pictures, where libav notices it and goes on."""
    data = bytearray(path.read_bytes())
    at = int(share * len(data))
    data[at : at + count] = bytes(255 - value for value in data[at : at + count])
    path.write_bytes(data)


def lose(path, packets=3):
    """A transport stream that lost some of its packets of 188 bytes."""
    data = path.read_bytes()
    middle = len(data) // 188 // 2 * 188
    path.write_bytes(data[:middle] + data[middle + 188 * packets :])


@pytest.mark.parametrize("codec", ["libx264", "libx265", "mpeg2video", "mpeg4"])
def test_7_no_clip_holds_a_broken_frame_or_one_that_depends_on_it(tmp_path, codec):
    frames = draw(75)
    extra = {"libx264": {"x264-params": "scenecut=0"}, "libx265": {"x265-params": "log-level=none:keyint=15:scenecut=0"}}
    path = write(
        tmp_path / "a.ts", frames, kind="mpegts", codec=codec, rate=25, gop=15, b_frames=None if codec == "libx265" else 2,
        options=extra.get(codec),
    )  # fmt: skip
    whole = {round(25 * frame.time_s): frame.to_rgb() for frame in iter_frames(path, CONFIG)}
    lose(path)
    shown = list(iter_frames(path, CONFIG))
    broken = {round(25 * frame.time_s) for frame in shown if frame.is_broken}
    differ = {
        number
        for number, pixels in ((round(25 * frame.time_s), frame.to_rgb()) for frame in shown)
        if np.abs(pixels.astype(int) - whole[number]).mean() > 0.3
    }
    assert broken and differ <= broken, "what differs from the whole file is known to be broken"
    assert max(broken) < 75 - 15, "the next key frame ends it"
    windows, unusual = windows_of(path)
    assert unusual["broken frames"] == len(broken)
    missing = set(range(75)) - {round(25 * frame.time_s) for frame in shown}
    for window in windows:
        first, last = window.start_index / FPS * 25, (window.start_index + LENGTH - 1) / FPS * 25
        assert not [number for number in broken | missing if first - 1e-6 <= number <= last], "no clip holds one"
    assert any(window.start_index / FPS * 25 > max(broken) for window in windows), "what follows is used"
    check_clips(path, windows)


def test_7_frames_shown_before_a_broken_one_but_decoded_after_it_are_broken_too(tmp_path):
    path = write(tmp_path / "a.mp4", draw(60), gop=60, b_frames=3, options={"x264-params": "scenecut=0:b-adapt=0"})
    damage(path)
    with av.open(str(path)) as file:
        flagged = [number for number, frame in enumerate(file.decode(video=0)) if frame.is_corrupt]
    shown = [frame.is_broken for frame in iter_frames(path, CONFIG)]
    assert flagged and shown.index(True) < flagged[0], "the frames between two that others depend on"
    assert all(shown[flagged[0] :]), "no key frame follows"
    windows, _ = windows_of(path)
    assert windows and all(window.start_index + LENGTH <= shown.index(True) for window in windows)


# Kind 8: the wrong stream.


@pytest.mark.parametrize("disposition", [0, av.stream.Disposition.attached_pic])
@pytest.mark.parametrize("video_first", [False, True])
def test_8_the_video_is_taken_not_its_cover(tmp_path, disposition, video_first):
    frames, cover = draw(27), draw(1, height=128, width=128, seed=5)[0]
    path = with_cover(tmp_path / "a.mp4", frames, cover, disposition=disposition, video_first=video_first)
    shown = show_all(path)
    assert shown.shape == frames.shape and psnr(shown, frames) > 30
    windows, _ = windows_of(path)
    assert len(windows) == 3


def test_8_sound_with_a_cover_is_no_video(tmp_path):
    cover = av.stream.Disposition.attached_pic
    path = with_cover(tmp_path / "a.mp4", draw(1), draw(1)[0], disposition=cover, sound_only=True)
    with pytest.raises(DataError, match="only a cover picture") as caught:
        list(iter_frames(path, CONFIG))
    assert caught.value.reason == "NO_VIDEO"


def test_8_of_two_videos_the_default_one_is_taken(tmp_path):
    small, large = draw(27, height=32, width=48, seed=1), draw(27)
    with av.open(str(tmp_path / "a.mkv"), "w") as file:
        streams = [file.add_stream("libx264", rate=16, options={"threads": "1"}) for _ in range(2)]
        for stream, frames, disposition in zip(streams, (small, large), (0, av.stream.Disposition.default), strict=True):
            stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
            stream.disposition = av.stream.Disposition(disposition)
        for pictures in zip(small, large, strict=True):
            for stream, pixels in zip(streams, pictures, strict=True):
                file.mux(stream.encode(to_frame(pixels, "yuv420p")))
        for stream in streams:
            file.mux(stream.encode())
    frames = list(iter_frames(tmp_path / "a.mkv", CONFIG))
    assert frames[0].size_px == (HEIGHT, WIDTH) and frames[0].look.stream == 1
    assert windows_of(tmp_path / "a.mkv")[1]["not the first stream"] == 27


def test_9_annotations_of_pixels_as_stored_are_refused_for_others(tmp_path):
    """Boxes and masks of an annotation would lie beside what they are about."""
    path = write(tmp_path / "a.mp4", draw(12), aspect="2/1")
    annotation = Annotation(cut=(0, 12), frame=0, crop=(0, 80, 0, 48))
    with pytest.raises(DataError, match="with pixels of 2 to 1") as caught:
        list(iter_annotated_window(path, annotation, TOY))
    assert caught.value.reason == "BAD_ANNOTATION"


def test_5_an_annotated_cut_over_a_gap_is_left_out(tmp_path):
    path = write(tmp_path / "a.mkv", draw(30), pts=[*range(5), *range(4827, 4852)])
    annotation = Annotation(cut=(0, 30), frame=0, crop=(0, 80, 0, 48))
    assert not list(iter_annotated_window(path, annotation, TOY))
    (window,) = iter_annotated_window(path, annotation.model_copy(update={"cut": (5, 30)}), TOY)
    assert window.start_index >= 4827
