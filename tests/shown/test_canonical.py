"""Kind 9: frames are what a player shows, compared with FFmpeg's filters, with the ffmpeg program and with what was drawn."""

import shutil
import subprocess
from fractions import Fraction

import av
import numpy as np
import pytest
from av.filter import Graph

from refalign.config import CurationConfig
from refalign.errors import DataError
from refalign.io.video import iter_frames
from refalign.pipeline.outcomes import Outcome
from tests.shown.making import HEIGHT, SDR, WIDTH, draw, pack_fields, write
from tests.shown.patches import CANONICAL, KINDS, read_patches, write_patches
from tests.shown.test_kinds import psnr, show_all

CONFIG = CurationConfig()
ONE = 1 << 16
MATRICES = {
    "as stored": ((ONE, 0, 0, ONE), "null", 0, False),
    "mirrored": ((-ONE, 0, 0, ONE), "hflip", 0, True),
    "upside down": ((-ONE, 0, 0, -ONE), "hflip,vflip", 180, False),
    "mirrored upside down": ((ONE, 0, 0, -ONE), "vflip", 180, True),
    "clockwise": ((0, ONE, -ONE, 0), "transpose=clock", 270, False),
    "counter-clockwise": ((0, -ONE, ONE, 0), "transpose=cclock", 90, False),
    "transposed": ((0, ONE, ONE, 0), "transpose=cclock_flip", 90, True),
    "transposed the other way": ((0, -ONE, -ONE, 0), "transpose=clock_flip", 270, True),
    "twice as large": ((0, 2 * ONE, -2 * ONE, 0), "transpose=clock", 270, False),
    "half a degree off": ((ONE, 500, -500, ONE), "null", 0, False),
    "nothing": ((0, 0, 0, 0), "null", 0, False),
}
"""Upper left of the display matrix, FFmpeg's filters, degrees counter-clockwise, whether mirrored."""


def write_turned(path, frames, corner, **options):
    a, b, c, d = corner
    return write(path, frames, matrix=[a, b, 0, c, d, 0, 0, 0, 1 << 30], **options)


def run_filters(path, filters, aspect=1):
    """uint8 [F, H, W, 3] of FFmpeg's own filters over the frames as they are stored."""
    made = []
    with av.open(str(path)) as file:
        graph = Graph()
        frames = list(file.decode(video=0))
        first = frames[0]
        nodes = [
            graph.add("buffer", video_size=f"{first.width}x{first.height}", pix_fmt=first.format.name, time_base="1/1000",
                      pixel_aspect=str(Fraction(aspect)).replace("/", ":"), colorspace=str(first.colorspace),
                      range=str(first.color_range))
        ]  # fmt: skip
        for spec in filters.split(","):
            name, _, arguments = spec.partition("=")
            nodes.append(graph.add(name, arguments or None))
        graph.link_nodes(*nodes, graph.add("buffersink")).configure()
        for number, frame in enumerate([*frames, None]):
            if frame is not None:
                frame.pts, frame.time_base = number, Fraction(1, 1000)
            graph.push(frame)
            while True:
                try:
                    made.append(graph.pull().to_ndarray(format="rgb24"))
                except (av.error.BlockingIOError, av.error.EOFError):
                    break
    return np.stack(made)


@pytest.mark.parametrize("name", MATRICES)
def test_9_display_matrices_turn_and_mirror(tmp_path, name):
    corner, filters, rotation_deg, mirrored = MATRICES[name]
    path = write_turned(tmp_path / "a.mp4", draw(5), corner)
    frames = list(iter_frames(path, CONFIG))
    shown, wanted = np.stack([frame.to_rgb() for frame in frames]), run_filters(path, filters)
    assert shown.shape == wanted.shape and frames[0].size_px == wanted.shape[1:3]
    assert psnr(shown, wanted) >= 35
    assert (frames[0].look.rotation_deg, frames[0].look.mirrored) == (rotation_deg, mirrored)


@pytest.mark.parametrize("corner", [(46341, 46341, -46341, 46341), (ONE, 5000, -5000, ONE)])
def test_9_a_tilted_picture_is_filtered_by_name(tmp_path, corner):
    path = write_turned(tmp_path / "a.mp4", draw(5), corner)
    with pytest.raises(DataError, match="is shown turned by -?[0-9]+ degrees; only quarter turns") as caught:
        list(iter_frames(path, CONFIG))
    assert Outcome("video", "a", caught.value.reason).status == "filtered"


@pytest.mark.parametrize(
    ("aspect", "size"),
    [("2/1", (64, 192)), ("4/3", (64, 128)), ("1/2", (64, 48)), ("2/3", (64, 64)), ("1281/1280", (64, 96)), ("1/1", (64, 96))],
)
def test_9_pixels_become_square(tmp_path, aspect, size):
    path = write(tmp_path / "a.mp4", draw(5), aspect=aspect)
    shown = show_all(path)
    assert shown.shape[1:3] == size
    if size != (HEIGHT, WIDTH):
        assert psnr(shown, run_filters(path, "scale=iw*sar:ih", aspect)) >= 35
    assert psnr(shown, draw(5, height=size[0], width=size[1])) > 25, "a wide lens was drawn, and nothing is squeezed"


def test_9_pixels_become_square_under_rotation(tmp_path):
    path = write_turned(tmp_path / "a.mp4", draw(5), MATRICES["clockwise"][0], aspect="2/1")
    shown, wanted = show_all(path), run_filters(path, "transpose=clock,scale=iw*sar:ih", "2/1")
    assert shown.shape[1:3] == wanted.shape[1:3] == (96, 32)
    assert psnr(shown, wanted) >= 35


@pytest.mark.parametrize("aspect", ["9/1", "1/9", "20/1"])
def test_9_an_absurd_pixel_aspect_is_filtered_by_name(tmp_path, aspect):
    path = write(tmp_path / "a.mkv", draw(3), aspect=aspect)
    with pytest.raises(DataError, match="at most 8 to 1 is believed") as caught:
        list(iter_frames(path, CONFIG))
    assert caught.value.reason == "UNSUPPORTED_PICTURE"


def test_9_square_pixels_count_against_the_limit(tmp_path):
    path = write(tmp_path / "a.mp4", draw(3), aspect="2/1")
    with pytest.raises(DataError, match="frames of 192 x 64 px") as caught:
        list(iter_frames(path, CurationConfig(max_frame_px=WIDTH * HEIGHT)))
    assert caught.value.reason == "TOO_MANY_PIXELS"


@pytest.mark.parametrize("codec", ["libx264", "mpeg2video"])
def test_9_fields_of_two_moments_are_taken_apart(tmp_path, codec):
    pictures = np.stack([np.roll(draw(1)[0], 3 * number, axis=1) for number in range(32)])
    options = {"x264-params": "bff=1"} if codec == "libx264" else {"flags": "+ilme+ildct", "field_order": "bb"}
    rate = 16 if codec == "libx264" else 25
    path = write(tmp_path / "a.mkv", pack_fields(pictures), codec=codec, options=options, rate=rate)
    with av.open(str(path)) as file:
        combed = list(file.decode(video=0))
    frames = list(iter_frames(path, CONFIG))
    shown = np.stack([frame.to_rgb() for frame in frames])
    assert len(frames) == 16 and all(frame.look.interlaced for frame in frames)
    assert psnr(shown, run_filters(path, "yadif")) >= 35
    stored = np.stack([frame.to_ndarray(format="rgb24") for frame in combed])
    assert psnr(shown, pictures[::2]) > psnr(stored, pictures[::2]) + 1.5, "one moment is seen, not two"
    assert [round(frame.time_s * rate) for frame in frames] == list(range(16))


def test_9_one_interlaced_frame_alone_is_shown(tmp_path):
    path = write(tmp_path / "a.mp4", pack_fields(draw(2)), options={"x264-params": "bff=1"})
    assert len(list(iter_frames(path, CONFIG))) == 1


@pytest.mark.parametrize(
    ("codec", "pix_fmt", "kind"),
    [
        ("libvpx-vp9", "yuva420p", "webm"), ("libvpx", "yuva420p", "webm"), ("prores_ks", "yuva444p10le", "mov"),
        ("qtrle", "argb", "mov"), ("png", "rgba", "mov"), ("ffv1", "bgra", "matroska"),
    ],
)  # fmt: skip
def test_9_what_is_transparent_becomes_white(tmp_path, codec, pix_fmt, kind):
    pictures = draw(4)
    alpha = np.zeros((*pictures.shape[:3], 1), np.uint8)
    alpha[:, :, : WIDTH // 3] = 255
    alpha[:, :, WIDTH // 3 : 2 * WIDTH // 3] = 128
    fine = {"libvpx-vp9": {"crf": "4", "b": "0"}, "libvpx": {"crf": "4", "b": "4M", "auto-alt-ref": "0"}}
    options = fine.get(codec, {"profile": "4"} if codec == "prores_ks" else None)
    path = write(
        tmp_path / "a", np.concatenate([pictures, alpha], axis=3), codec=codec, pix_fmt=pix_fmt, kind=kind, options=options
    )
    frames = list(iter_frames(path, CONFIG))
    shown = np.stack([frame.to_rgb() for frame in frames]).astype(float)
    assert all(frame.look.alpha for frame in frames)
    assert (shown[:, :, -20:] > 250).all(), "the hidden colours are not shown"
    half = (pictures[..., 36:60, :] + 255.0) / 2
    assert np.abs(shown[:, :, :28] - pictures[:, :, :28]).mean() < 5 and np.abs(shown[:, :, 36:60] - half).mean() < 5


def test_9_an_empty_alpha_channel_hides_nothing(tmp_path):
    """Screen recorders store 32 bits a pixel, the last eight of them zero."""
    pictures = draw(3)
    unseen = np.concatenate([pictures, np.zeros((*pictures.shape[:3], 1), np.uint8)], axis=3)
    path = write(tmp_path / "a.avi", unseen, codec="rawvideo", pix_fmt="bgra")
    assert (show_all(path) == pictures).all()


COLOUR = (0x20, 0xC0, 0x40)


@pytest.mark.parametrize(
    ("height", "width", "tags", "matrix"),
    [
        (720, 1280, SDR, "ITU709"), (720, 1280, None, "ITU709"), (608, 1080, None, "ITU709"), (576, 720, None, "ITU601"),
        (480, 854, None, "ITU601"), (480, 854, SDR, "ITU709"), (720, 1280, {"colorspace": 6}, "ITU601"),
    ],
)  # fmt: skip
def test_9_colours_of_standard_range_are_what_they_were(tmp_path, height, width, tags, matrix):
    frames = np.full((3, height, width, 3), COLOUR, np.uint8)
    path = write(tmp_path / "a.mp4", frames, tags=tags, colorspace=matrix)
    assert np.abs(show_all(path).astype(float).mean(axis=(0, 1, 2)) - COLOUR).max() < 3


@pytest.mark.parametrize("kind", KINDS)
def test_9_high_range_and_wide_colours_become_bt709(tmp_path, kind):
    path = write_patches(tmp_path / "a.mp4", kind)
    frames = list(iter_frames(path, CONFIG))
    off = np.abs(read_patches(frames[0].to_rgb()) - CANONICAL[kind]).max()
    assert off < (12 if kind in ("pq", "hlg") else 3), off
    look = frames[0].look
    assert (look.transfer, look.primaries) == {"pq": ("pq", "bt2020"), "hlg": ("hlg", "bt2020")}.get(kind, ("sdr", kind))
    small = frames[0].to_rgb(96)
    assert small.shape[1] == 96 and abs(small.mean() - frames[0].to_rgb().mean()) < 3, "what finds cuts sees the same colours"


@pytest.mark.parametrize(("matrix", "name"), [(8, "YCgCo"), (14, "ICtCp"), (10, "constant luminance")])
def test_9_colours_that_cannot_be_shown_are_filtered_by_name(tmp_path, matrix, name):
    path = write(tmp_path / "a.mp4", draw(3), tags={**SDR, "colorspace": matrix})
    with pytest.raises(DataError, match=name) as caught:
        list(iter_frames(path, CONFIG))
    assert caught.value.reason == "UNSUPPORTED_PICTURE"


def test_9_dolby_vision_without_a_base_layer_is_filtered_by_name(tmp_path):
    path = write(tmp_path / "a.mp4", draw(3), codec="libx265", pix_fmt="yuv420p10le")
    path.write_bytes(path.read_bytes().replace(b"hev1", b"dvhe").replace(b"hvc1", b"dvh1"))
    with pytest.raises(DataError, match="Dolby Vision without a standard base layer") as caught:
        list(iter_frames(path, CONFIG))
    assert caught.value.reason == "UNSUPPORTED_PICTURE"


def test_9_an_ordinary_video_is_converted_as_ever(tmp_path):
    """Constant rate, square pixels, standard range: libswscale's own pixels, to the byte."""
    path = write(tmp_path / "a.mp4", draw(20))
    with av.open(str(path)) as file:
        plain = np.stack([frame.reformat(format="rgb24", threads=1).to_ndarray() for frame in file.decode(video=0)])
    assert (show_all(path) == plain).all()


PROGRAM = {
    "mirrored": (lambda path: write_turned(path, draw(5), MATRICES["mirrored"][0]), "null", 35),
    "clockwise": (lambda path: write_turned(path, draw(5), MATRICES["clockwise"][0]), "null", 35),
    "transposed": (lambda path: write_turned(path, draw(5), MATRICES["transposed"][0]), "null", 35),
    "wide pixels": (lambda path: write(path, draw(5), aspect="2/1"), "scale=iw*sar:ih", 35),
    "turned wide pixels": (
        lambda path: write_turned(path, draw(5), MATRICES["clockwise"][0], aspect="2/1"), "scale=iw*sar:ih", 35,
    ),
    "fields": (lambda path: write(path, pack_fields(draw(32)), options={"x264-params": "bff=1"}), "yadif", 35),
}  # fmt: skip


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="the ffmpeg program is not installed")
@pytest.mark.parametrize("name", PROGRAM)
def test_9_frames_are_those_of_the_ffmpeg_program(tmp_path, name):
    make, filters, least = PROGRAM[name]
    path = make(tmp_path / "a.mp4")
    shown = show_all(path)
    command = ["ffmpeg", "-v", "error", "-autorotate", "1", "-i", str(path), "-vf", filters]
    command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    wanted = np.frombuffer(subprocess.run(command, capture_output=True, check=True).stdout, np.uint8)
    assert wanted.size == shown.size and psnr(shown, wanted.reshape(shown.shape)) >= least
