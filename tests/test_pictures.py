"""Pictures and videos as bytes: readable everywhere, equal for equal input."""

import av
import numpy as np
import pytest

from refalign.errors import DataError
from refalign.pictures import (
    decode_image,
    encode_jpeg,
    encode_png,
    make_contact_sheet,
    on_white,
    read_image,
    write_mp4,
    write_png,
)


def make_frames(frames=9, height_px=96, width_px=64):
    """A red bar that moves over grey."""
    video = np.full((frames, height_px, width_px, 3), 90, np.uint8)
    for number in range(frames):
        video[number, :, 4 * number : 4 * number + 16] = (200, 30, 30)
    return video


def test_mp4_plays_in_browsers_and_keeps_the_frames(tmp_path):
    frames = make_frames()
    write_mp4(tmp_path / ".aside.tmp", frames, 8.0)
    with av.open(str(tmp_path / ".aside.tmp")) as file:
        stream = file.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 8)
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])
    assert decoded.shape == frames.shape
    assert np.abs(decoded.astype(float) - frames).mean() < 6
    data = (tmp_path / ".aside.tmp").read_bytes()
    assert 0 < data.find(b"moov") < data.find(b"mdat"), "a player needs the header before the data"


def test_equal_frames_give_equal_bytes(tmp_path):
    for name in "ab":
        write_mp4(tmp_path / name, make_frames(), 16.0)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert encode_jpeg(make_frames()[0]) == encode_jpeg(make_frames()[0])


def test_odd_sizes_gain_one_row_and_column(tmp_path):
    write_mp4(tmp_path / "odd.mp4", make_frames(height_px=33, width_px=47), 8.0)
    with av.open(str(tmp_path / "odd.mp4")) as file:
        assert (file.streams.video[0].height, file.streams.video[0].width) == (34, 48)


def test_transparency_becomes_white():
    image = np.zeros((4, 4, 4), np.uint8)
    image[:2, :, 3] = 255
    assert (on_white(image)[:2] == 0).all() and (on_white(image)[2:] == 255).all()
    assert (decode_image(encode_png(image)) == on_white(image)).all()


def test_png_keeps_every_pixel_under_any_file_name(tmp_path):
    image = make_frames()[3]
    write_png(tmp_path / ".picture.tmp", image)
    assert (read_image(tmp_path / ".picture.tmp") == image).all()


@pytest.mark.parametrize("data", [b"", b"no picture", encode_png(make_frames()[0])[:60]])
def test_what_is_no_picture_is_named(data):
    with pytest.raises(DataError, match="s1: not a readable picture") as caught:
        decode_image(data, "s1")
    assert caught.value.reason == "UNREADABLE"


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_image(tmp_path / "absent.png")


def test_contact_sheet_has_a_row_per_sequence_at_one_height():
    wide, tall = make_frames(height_px=40, width_px=80)[0], make_frames(height_px=80, width_px=40)[0]
    sheet = make_contact_sheet([[wide, tall], [tall]], 40, gap_px=4)
    assert sheet.shape == (2 * 44 + 4, 80 + 20 + 3 * 4, 3)
    assert (sheet[:4] == 255).all() and (sheet[48:88, 28:] == 255).all()
    assert (sheet[4:44, 4:84] == wide).all()


def test_contact_sheet_of_nothing_is_white():
    assert (make_contact_sheet([], 16) == 255).all()


def test_what_is_no_picture_is_named_beside_ultralytics_too():
    """It replaces PIL's opener for the whole process."""
    from refalign.models.yolo import prepare_ultralytics

    prepare_ultralytics()
    import ultralytics.utils  # noqa: F401

    with pytest.raises(DataError, match="not a readable picture"):
        decode_image(b"no picture")
