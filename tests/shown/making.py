"""Makes videos as phones, cameras, recorders and careless hands make them: small, without the ffmpeg program."""

from fractions import Fraction

import av
import numpy as np
from av.stream import Disposition

WIDTH, HEIGHT = 96, 64
SDR = {"colorspace": 1, "color_primaries": 1, "color_trc": 1, "color_range": 1}
WIDE = {"colorspace": 9, "color_primaries": 9, "color_range": 1}


def draw(count, *, height=HEIGHT, width=WIDTH, seed=0):
    """uint8 [count, height, width, 3]: soft blobs that drift over a gradient, with a bright mark in the upper left corner."""
    rng = np.random.default_rng(seed)
    blobs = rng.uniform([0.2, 0.2, 0.06, 30, 30, 30], [0.8, 0.8, 0.2, 220, 220, 220], (4, 6))
    drift = rng.uniform(-0.012, 0.012, (4, 2))
    y, x = np.mgrid[0:height, 0:width] / np.array([height, width]).reshape(2, 1, 1)
    frames = []
    for number in range(count):
        picture = np.stack([60 + 80 * x, 90 + 60 * y, 120 + 0 * x], axis=2)
        for (cx, cy, radius, *colour), step in zip(blobs, drift, strict=True):
            cx, cy = np.array([cx, cy]) + number * step
            weight = np.exp(-(((x - cx) ** 2 + (y - cy) ** 2) / radius**2))[..., None]
            picture = picture * (1 - weight) + weight * np.array(colour)
        picture[: height // 8, : width // 8] = (250, 240, 60)
        frames.append(picture)
    return np.clip(np.stack(frames), 0, 255).astype(np.uint8)


def write(
    path, frames, *, kind=None, codec="libx264", pix_fmt="yuv420p", rate=16, pts=None, tags=None, aspect=None, matrix=None,
    options=None, gop=None, metadata=None, b_frames=None, crf=12, colorspace="ITU601",
):  # fmt: skip
    """Encodes uint8 or uint16 [F, H, W, 3 or 4] frames.

    Args:
        pts: time of each frame in units of 1 / rate; its number where nothing is given.
        tags: colour tags of the codec context.
        aspect: of a pixel.
        matrix: display matrix, nine integers.
        colorspace: matrix that the frames are converted by.
    """
    chosen = {"crf": str(crf)} if codec in ("libx264", "libx265") else {}
    chosen |= {"x265-params": "log-level=none"} if codec == "libx265" else {}
    with av.open(str(path), "w", format=kind) as file:
        stream = file.add_stream(codec, rate=rate, options={"threads": "1", **chosen, **(options or {})})
        _set_up(stream, frames, pix_fmt, tags, aspect, gop, b_frames)
        stream.metadata.update(metadata or {})
        if matrix is not None:
            stream.set_display_matrix(matrix)
        for number, pixels in enumerate(frames):
            frame = to_frame(pixels, pix_fmt, colorspace)
            frame.pts, frame.time_base = int(pts[number]) if pts is not None else number, Fraction(1, rate)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def _set_up(stream, frames, pix_fmt, tags, aspect, gop, b_frames):
    context = stream.codec_context
    stream.height, stream.width = frames.shape[1:3]
    stream.pix_fmt = pix_fmt
    for name, value in (tags or {}).items():
        setattr(context, name, value)
    if aspect is not None:
        context.sample_aspect_ratio = Fraction(aspect)
    if gop is not None:
        context.gop_size = gop
    if b_frames is not None:
        context.max_b_frames = b_frames


def to_frame(pixels, pix_fmt, colorspace="ITU601"):
    """A frame of RGB or RGBA pixels, converted by a matrix to limited range."""
    kinds = {(np.dtype(np.uint8), 3): "rgb24", (np.dtype(np.uint8), 4): "rgba", (np.dtype(np.uint16), 3): "rgb48le"}
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format=kinds[pixels.dtype, pixels.shape[2]])
    if pix_fmt in ("rgba", "argb", "bgra", "rgb24"):
        return frame.reformat(format=pix_fmt)
    return frame.reformat(format=pix_fmt, dst_colorspace=colorspace, dst_color_range="MPEG")


def joined(path, parts, **options):
    """One file of several recordings, as `cat` makes it."""
    whole = b""
    for frames in parts:
        whole += write(path, frames, **options).read_bytes()
    path.write_bytes(whole)
    return path


def with_cover(path, frames, cover, *, disposition=0, video_first=False, sound_only=False):
    """A cover picture beside the video, as shops and taggers put it."""
    with av.open(str(path), "w", format="mp4") as file:

        def add_cover():
            stream = file.add_stream("mjpeg", rate=25)
            stream.height, stream.width = cover.shape[:2]
            stream.pix_fmt = "yuvj420p"
            stream.disposition = Disposition(disposition)
            return stream

        def add_video():
            stream = file.add_stream("libx264", rate=16, options={"threads": "1"})
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = "yuv420p"
            stream.disposition = Disposition.default
            return stream

        if sound_only:
            sound, still = file.add_stream("aac", rate=16000, layout="mono"), add_cover()
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
            silence.sample_rate = 16000
            packets = [*sound.encode(silence), *sound.encode()]
        else:
            video, still = (add_video(), add_cover()) if video_first else reversed((add_cover(), add_video()))
            packets = [packet for pixels in frames for packet in video.encode(to_frame(pixels, "yuv420p"))] + video.encode()
        file.mux([*still.encode(to_frame(cover, "yuvj420p")), *still.encode()])
        file.mux(packets)
    return path


def pack_fields(frames):
    """Interlaced frames, lower field first: each holds the odd lines of one picture and the even lines of the next."""
    woven = frames[::2].copy()
    woven[:, ::2] = frames[1::2, ::2]
    return woven


def encode_pq(nits):
    """uint16 signal of SMPTE ST 2084 of light in cd/m2, by the equation that the decoder turns round."""
    share = (np.asarray(nits) / 10000.0) ** (2610 / 16384)
    signal = ((107 / 128 + 2413 / 128 * share) / (1 + 2392 / 128 * share)) ** (2523 / 32)
    return np.rint(signal * 65535).astype(np.uint16)
