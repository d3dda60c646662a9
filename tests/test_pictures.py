"""Pictures and videos as bytes: readable everywhere, equal for equal input."""

import io
import struct

import av
import numpy as np
import pytest
from PIL import Image, ImageCms

from refalign.errors import DataError
from refalign.io.images import (
    ADVICE,
    decode_image,
    encode_jpeg,
    encode_png,
    make_contact_sheet,
    on_white,
    read_image,
    write_mp4,
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
    (tmp_path / ".picture.tmp").write_bytes(encode_png(image))
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


def save(picture, kind, **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def make_corner(height_px=40, width_px=60):
    """Grey, with a red upper left corner."""
    pixels = np.full((height_px, width_px, 3), 90, np.uint8)
    pixels[:16, :24] = (220, 20, 20)
    return pixels


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_phone_photo_stands_upright(kind, orientation):
    """Stored as EXIF's ``orientation`` says, each picture is shown the same."""
    upright = Image.fromarray(make_corner())
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose that stores an upright picture so
    stored = upright.transpose(Image.Transpose(back[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    shown = decode_image(save(stored, kind, exif=exif, **({"quality": 95} if kind in ("JPEG", "WEBP", "AVIF") else {})))
    assert shown.shape == (40, 60, 3)
    assert np.abs(shown.astype(int) - make_corner()).mean() < 4


def test_damaged_exif_costs_no_picture():
    data = save(Image.fromarray(make_corner()), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert decode_image(data).shape == (40, 60, 3)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_grey_of_16_bits_keeps_its_shades(kind):
    grey = (np.arange(64 * 64).reshape(64, 64) * 16).astype(np.uint16)
    shown = decode_image(save(Image.fromarray(grey), kind))
    assert (shown == np.rint(grey / 257)[..., None]).all()


def test_a_photo_in_wide_colours_is_shown_in_srgb():
    """A profile whose red is further out than sRGB's: grey stays, red grows."""
    profile = make_wide_profile()
    picture = Image.fromarray(np.array([[[128, 128, 128], [200, 60, 60]]], np.uint8).repeat(8, 0).repeat(8, 1))
    shown = decode_image(save(picture, "PNG", icc_profile=profile)).astype(int)
    plain = decode_image(save(picture, "PNG")).astype(int)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert (decode_image(save(picture, "PNG", icc_profile=srgb)) == plain).all()
    assert (decode_image(save(picture, "PNG", icc_profile=b"no profile")) == plain).all()
    assert np.abs(shown[0, 0] - 128).max() <= 2
    assert shown[0, 12, 0] - plain[0, 12, 0] > 8 and shown[0, 12, 1] < plain[0, 12, 1]


def make_wide_profile():
    """An ICC profile of version 2 with the primaries of Display P3, adapted to D50, and gamma 2.2."""

    def xyz(*values):
        return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in values))

    gamma = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(2.2 * 256)) + b"\0\0"
    text = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"wide\0" + bytes(78) + b"\0" * 3
    tags = [
        (b"desc", text), (b"wtpt", xyz(0.9642, 1, 0.8249)), (b"rXYZ", xyz(0.5151, 0.2412, -0.0011)),
        (b"gXYZ", xyz(0.2920, 0.6922, 0.0419)), (b"bXYZ", xyz(0.1571, 0.0666, 0.7841)),
        (b"rTRC", gamma), (b"gTRC", gamma), (b"bTRC", gamma),
    ]  # fmt: skip
    body, table, at = b"", struct.pack(">I", len(tags)), 132 + 12 * len(tags)
    for name, data in tags:
        data += bytes(-len(data) % 4)
        table += name + struct.pack(">II", at + len(body), len(data))
        body += data
    head = struct.pack(">I4sI4s4s4s", 132 + len(table) - 4 + len(body), b"lcms", 0x02400000, b"mntr", b"RGB ", b"XYZ ")
    head += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + struct.pack(">3i", 63190, 65536, 54061) + bytes(48)
    return head + table + body


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "AVIF"])
def test_what_cameras_and_the_web_write_is_read(kind):
    shown = decode_image(save(Image.fromarray(make_corner()), kind))
    assert np.abs(shown.astype(int) - make_corner()).mean() < 4


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "AVIF", "TIFF"])
def test_a_moving_picture_is_no_reference(kind):
    frames = [Image.new("RGB", (32, 32), (shade, 0, 0)) for shade in (0, 90, 200)]
    data = save(frames[0], kind, save_all=True, append_images=frames[1:])
    with pytest.raises(DataError, match=f"s1: not a readable picture .{kind} with more than one frame or page.; give a still"):
        decode_image(data, "s1")


def test_the_first_picture_of_a_phone_jpeg_is_meant():
    """MPO: the photo, and what belongs to it (depth, gain for bright displays)."""
    photo, gain = Image.fromarray(make_corner()), Image.new("L", (30, 20), 10).convert("RGB")
    data = save(photo, "MPO", save_all=True, append_images=[gain], quality=95)
    assert np.abs(decode_image(data).astype(int) - make_corner()).mean() < 4


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64), "HEIC, which phones can export as JPEG"),
        (b"\xff\x0a" + bytes(64), "JPEG XL"),
        (b"8BPS" + bytes(64), "a Photoshop file"),
        (b"%!PS-Adobe-3.0\n", "a document"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "a drawing in SVG"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"", "it is empty"),
        (b"no picture", r"its 10 bytes begin with b'no pictu'"),
    ],
)
def test_other_content_is_named_in_one_line(data, said):
    with pytest.raises(DataError) as caught:
        decode_image(data, "s1")
    assert str(caught.value) == f"s1: not a readable picture ({said}); {ADVICE}."


def test_grey_of_32_bits_is_refused():
    with pytest.raises(DataError, match="grey of 32 bits"):
        decode_image(save(Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)), "TIFF"))
