"""Makes the files of `test_bad_input`: one good video, and what becomes of it in careless or hostile hands."""

import io
import os
import struct
from fractions import Fraction

import av
import numpy as np
from PIL import Image


def read_frames(path):
    """uint8 [F, H, W, 3]."""
    with av.open(str(path)) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


def encode(path, frames, *, fps=16, codec="libx264", pix_fmt="yuv420p", kind="mp4", times_ms=None, options=None):
    """Encodes frames, at equal times or at the given ones."""
    with av.open(str(path), "w", format=kind, options=options or {}) as file:
        stream = file.add_stream(codec, rate=Fraction(fps), options={"threads": "1"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt
        if times_ms is not None:
            stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            if times_ms is not None:
                frame.pts, frame.time_base = int(times_ms[number]), Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())


def encode_bytes(path, frames, **options):
    """What `encode` writes; the file is left to be written by the caller."""
    encode(path, frames, options=options)
    return path.read_bytes()


def write_sound(path):
    """An mp4 without pictures."""
    with av.open(str(path), "w", format="mp4") as file:
        stream = file.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        for packet in [*stream.encode(frame), *stream.encode()]:
            file.mux(packet)


def patch(data, box, offset, form, *values):
    """The mp4 with other numbers in the first box of a type, ``offset`` bytes behind its name."""
    at = data.index(box) + 4 + offset
    new = struct.pack(form, *values)
    return data[:at] + new + data[at + len(new) :]


def vary(data, text):
    """The same mp4 with another content: a comment box at its end."""
    payload = text.encode("utf-8", "surrogateescape")
    return data + struct.pack(">I4s", 8 + len(payload), b"free") + payload


def garble(data, seed=0):
    """The mp4 with noise for pictures."""
    start = data.index(b"mdat") + 4
    size = struct.unpack(">I", data[start - 8 : start - 4])[0] - 8
    noise = np.random.default_rng(seed).integers(0, 255, size, dtype=np.uint8).tobytes()
    return data[:start] + noise + data[start + size :]


def picture(kind):
    """Bytes of a picture, or of a moving one (GIF)."""
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (96, 96), (shade, 90, 200)) for shade in range(0, 240, 12)]
    frames[0].save(buffer, kind, **({"save_all": True, "append_images": frames[1:], "duration": 60} if kind == "GIF" else {}))
    return buffer.getvalue()


ROTATED = (">9i", 0, 65536, 0, -65536, 0, 0, 0, 0, 0x40000000)
HTML = b"<!DOCTYPE html><html><body>404 Not Found</body></html>" * 40
PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\ngood-0.mp4\n#EXT-X-ENDLIST\n"
SCRIPT = b"ffconcat version 1.0\nfile good-0.mp4\n"


def make_files(good, frames):
    """Name to (maker of the file at a path, the reason it ends with: empty where its clips are written)."""
    long = np.concatenate([frames, frames[::-1]] * 3)
    data = good.read_bytes()

    def put(change):
        return lambda path: path.write_bytes(vary(change(data), path.name))

    def raw(content):
        return lambda path: path.write_bytes(content)

    def made(*args, **kwargs):
        return lambda path: encode(path, *args, **kwargs)

    def cut(share):
        return lambda path: path.write_bytes(
            (whole := encode_bytes(path, np.tile(long, (4, 1, 1, 1)), movflags="+faststart"))[: int(share * len(whole))]
        )

    def rotated(path):
        """Stored lying on its side, to be turned upright when shown."""
        encode(path, np.rot90(frames, axes=(1, 2)))
        path.write_bytes(patch(path.read_bytes(), b"tkhd", 40, *ROTATED))

    def huge(path):
        encode(path, frames, codec="rawvideo", kind="avi")
        path.write_bytes(patch(path.read_bytes(), b"strf", 8, "<ii", 16384, 8640))

    return {
        "cut-10.mp4": (raw(data[:10]), "UNREADABLE"),
        "cut-200.mp4": (raw(data[:200]), "NO_VIDEO"),
        "cut-header.mp4": (raw(data[: data.index(b"mdat") + 4]), "TRUNCATED"),
        "cut-first.mp4": (raw(data[: len(data) // 2]), "UNREADABLE"),
        "cut-half.mp4": (cut(0.5), "TRUNCATED"),
        "cut-end.mp4": (cut(0.95), "TRUNCATED"),
        "no-index.mp4": (lambda path: path.write_bytes(encode_bytes(path, frames)[:-2000]), "UNREADABLE"),
        "empty.mp4": (raw(b""), "EMPTY_FILE"),
        "page.mp4": (raw(HTML), "UNREADABLE"),
        "playlist.mp4": (raw(PLAYLIST), "UNREADABLE"),
        "script.mp4": (raw(SCRIPT), "UNREADABLE"),
        "words.ts": (raw(b"hello " * 4000), "UNREADABLE"),
        "sound.mp4": (write_sound, "NO_VIDEO"),
        "one.mp4": (made(frames[:1]), "TOO_SHORT"),
        "short.mp4": (made(frames[:4]), "TOO_SHORT"),
        "huge.avi": (huge, "TOO_MANY_PIXELS"),
        "large.mp4": (lambda path: (path.touch(), os.truncate(path, 2**31)), "TOO_LARGE"),
        "fast.mp4": (put(lambda d: patch(d, b"mdhd", 12, ">I", 0x7FFFFFFF)), "TOO_SHORT"),
        "slow.mkv": (made(frames, kind="matroska", times_ms=np.arange(9) * 4_000_000), "BAD_TIMES"),
        "noise.mp4": (put(garble), "UNREADABLE"),
        "encrypted.mp4": (put(lambda d: d.replace(b"avc1", b"encv").replace(b"avcC", b"sinf")), "UNREADABLE"),
        "moving.gif": (raw(picture("GIF")), "NOT_A_VIDEO"),
        "moving-gif.mp4": (raw(picture("GIF")), "UNREADABLE"),
        "still-png.mp4": (raw(picture("PNG")), "UNREADABLE"),
        "still-jpeg.mov": (raw(picture("JPEG")), "UNREADABLE"),
        "video.docx": (put(bytes), ""),  # by its pictures; a name says less
        "notes.md": (raw(b"hello"), "NOT_A_VIDEO"),
        "same.mp4": (raw(data), "DUPLICATE"),
        "loop.mp4": (lambda path: path.symlink_to(path), "NOT_A_FILE"),
        "dangling.mp4": (lambda path: path.symlink_to(path.with_name("gone")), "NOT_A_FILE"),
        "pipe.mp4": (lambda path: os.mkfifo(path), "NOT_A_FILE"),
        os.fsdecode(b"latin-\xe9.mp4"): (put(bytes), "BAD_NAME"),
        # What only looks odd is used.
        "mkv-inside.mp4": (made(frames, kind="matroska"), ""),
        "longer-than-said.mp4": (put(lambda d: patch(patch(d, b"mvhd", 16, ">I", 9), b"mdhd", 16, ">I", 9)), ""),
        "larger-than-said.mp4": (put(lambda d: patch(d, b"avc1", 24, ">HH", 16, 16)), ""),
        "endless-box.mp4": (put(lambda d: patch(d, b"mdat", -8, ">I", 0x7FFFFFFF)), ""),
        "shorter-than-said.mp4": (put(lambda d: patch(patch(d, b"mvhd", 16, ">I", 2**31 - 1), b"mdhd", 16, ">I", 2**31 - 1)), ""),
        "rotated.mp4": (rotated, ""),
        "ten-bit.mkv": (made(frames, kind="matroska", pix_fmt="yuv420p10le"), ""),
        "full-colour.mp4": (made(frames, pix_fmt="yuv444p"), ""),
        "variable.mkv": (made(long, kind="matroska", times_ms=np.cumsum(np.tile([20, 90, 50], len(long) // 3))), ""),
        "late-start.mkv": (made(frames, kind="matroska", times_ms=5000 + np.arange(9) * 62.5), ""),
        "sub.mp4/inside.mp4": (put(bytes), ""),
        "-rf.mp4": (put(bytes), ""),
        "dots..and spaces .mp4": (put(bytes), ""),
        "new\nline.mp4": (put(bytes), ""),
        "a:b.mp4": (put(bytes), ""),
        "ünïcode 映画.MP4": (put(bytes), ""),
        f"{'long' * 60}.mp4": (put(bytes), ""),
        "link.mp4": (lambda path: (path.with_name(".kept").write_bytes(vary(data, "kept")), path.symlink_to(".kept")), ""),
    }


DEEP = b'{"caption":' * 10**6
SIDECARS = {
    "broken.json": b"{",
    "deep.json": DEEP,
    "deep-list.json": b"[" * 10**6 + b"]" * 10**6,
    "list.json": b"[]",
    "number.json": b'{"caption": 7}',
    "object.json": b'{"license": {"a": 1}}',
    "shots.json": b'{"shots": "none"}',
    "shot.json": b'{"shots": [{"start_s": 0}]}',
    "shot-time.json": b'{"shots": [{"start_s": NaN, "end_s": 2, "caption": "a"}]}',
    "surrogate.json": b'{"caption": "\\ud800"}',
    "latin.txt": b"caf\xe9",
}
"""Sidecars that cannot be read, each of which takes its video with it."""


def make_entries(entry):
    """Clip name to (an OpenS2V entry, the reason it ends with), around a good entry."""

    def change(path, value):
        new = _copy(entry)
        target = new
        for key in path[:-1]:
            target = target[key]
        if value is DELETE:
            del target[path[-1]]
        else:
            target[path[-1]] = value
        return new

    boxes = ("annotation", "ann_frame_data", "annotations", 0, "bbox")
    mask = ("annotation", "mask_annotation", "0", "1")
    return {
        "fine": (entry, ""),
        "outside": (change(("metadata", "path"), "../secret.mp4"), "OUTSIDE"),
        "absolute": (change(("metadata", "path"), "/etc/passwd"), "OUTSIDE"),
        "elsewhere": (change(("metadata", "path"), "s3://films/a.mp4"), "OUTSIDE"),
        "linked": (change(("metadata", "path"), "out.mp4"), "OUTSIDE"),
        "gone": (change(("metadata", "path"), "not-there.mp4"), "MISSING"),
        "path-type": (change(("metadata", "path"), 7), "BAD_ANNOTATION"),
        "no-cut": (change(("metadata", "cut"), DELETE), "BAD_ANNOTATION"),
        "cut-reversed": (change(("metadata", "cut"), [9, 0]), "BAD_ANNOTATION"),
        "cut-text": (change(("metadata", "cut"), ["a", "b"]), "BAD_ANNOTATION"),
        "cut-beyond": (change(("metadata", "cut"), [500, 600]), "TOO_SHORT"),
        "cut-short": (change(("metadata", "cut"), [0, 4]), "TOO_SHORT"),
        "crop-outside": (change(("metadata", "crop"), [0, 960, 0, 960]), "BAD_MASK"),
        "crop-negative": (change(("metadata", "crop"), [-5, 80, 0, 48]), "BAD_ANNOTATION"),
        "crop-empty": (change(("metadata", "crop"), [50, 50, 0, 48]), "BAD_ANNOTATION"),
        "box-outside": (change(boxes, [200.0, 200.0, 300.0, 300.0]), "NO_SUBJECT"),
        "box-reversed": (change(boxes, [60.0, 60.0, 20.0, 20.0]), "BAD_ANNOTATION"),
        "box-no-number": (change(boxes, ["NaN", 10, 60, 60]), "BAD_ANNOTATION"),
        "box-endless": (change(boxes, [10, 10, 1e999, 60]), "BAD_ANNOTATION"),
        "box-short": (change(boxes, [10, 10]), "BAD_ANNOTATION"),
        "class-type": (change((*boxes[:-1], "class_name"), ["cat"]), "BAD_ANNOTATION"),
        "mask-gone": (change(mask, DELETE), "BAD_ANNOTATION"),
        "mask-rle": (change((*mask, "counts"), "04"), "BAD_MASK"),
        "mask-text": (change((*mask, "counts"), 12), "BAD_ANNOTATION"),
        "mask-size": (change((*mask, "size"), [24, 24]), "BAD_MASK"),
        "mask-huge": (change((*mask, "size"), [10**9, 10**9]), "BAD_MASK"),
        "frame-outside": (change(("annotation", "ann_frame_data", "ann_frame_idx"), 70), "BAD_ANNOTATION"),
        "no-annotation": (change(("annotation",), DELETE), "BAD_ANNOTATION"),
        "list": ([], "BAD_ANNOTATION"),
        "null": (None, "BAD_ANNOTATION"),
    }


DELETE = object()


def _copy(value):
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value
