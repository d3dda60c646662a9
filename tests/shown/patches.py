"""Patches of known colours in each transfer, and what the ffmpeg program (5.1, with zimg) makes of them, written down once.

    ffmpeg -i FILE -vf "zscale=t=linear:npl=100,format=gbrpf32le,zscale=p=bt709,tonemap=mobius:param=0.5:desat=0,\
zscale=t=bt709:m=bt709:r=full,format=gbrp,format=rgb24" -f rawvideo -

for high dynamic range, and ``zscale=p=bt709:r=full,format=gbrp`` for wide colours of standard range.
"""

import numpy as np

from tests.shown.making import SDR, WIDE, encode_pq, write

SIZE_PX = 32
NITS = (
    (1, 1, 1), (10, 10, 10), (50, 50, 50), (100, 100, 100), (203, 203, 203), (1000, 1000, 1000),
    (80, 20, 20), (20, 80, 20), (20, 20, 80), (300, 150, 60), (0, 0, 0), (60, 50, 30),
)  # fmt: skip
SIGNALS = (
    (0.1,) * 3, (0.25,) * 3, (0.38,) * 3, (0.5,) * 3, (0.75,) * 3, (1.0,) * 3,
    (0.6, 0.3, 0.3), (0.3, 0.6, 0.3), (0.3, 0.3, 0.6), (0.8, 0.7, 0.5), (0.0,) * 3, (0.45, 0.4, 0.35),
)  # fmt: skip
KINDS = {
    "pq": (encode_pq(NITS), {**WIDE, "color_trc": 16}, "BT2020"),
    "hlg": (np.rint(np.array(SIGNALS) * 65535).astype(np.uint16), {**WIDE, "color_trc": 18}, "BT2020"),
    "bt2020": (np.rint(np.array(SIGNALS) * 65535).astype(np.uint16), {**WIDE, "color_trc": 1}, "BT2020"),
    "p3": (np.rint(np.array(SIGNALS) * 65535).astype(np.uint16), {**SDR, "color_primaries": 12}, "ITU709"),
}


CANONICAL = {
    "pq": (
        (38, 38, 38), (99, 99, 99), (192, 192, 192), (228, 228, 228), (244, 244, 244), (255, 255, 255),
        (233, 91, 108), (0, 223, 103), (108, 120, 223), (251, 157, 102), (0, 0, 0), (213, 184, 144),
    ),
    "hlg": (
        (39, 39, 39), (97, 97, 97), (146, 146, 146), (193, 193, 193), (244, 244, 244), (255, 255, 255),
        (235, 65, 91), (0, 225, 80), (87, 103, 225), (250, 165, 95), (0, 0, 0), (186, 152, 132),
    ),
    "bt2020": (
        (26, 26, 26), (64, 64, 64), (97, 97, 97), (128, 128, 128), (192, 192, 192), (255, 255, 255),
        (184, 56, 74), (0, 160, 61), (65, 76, 159), (222, 176, 119), (0, 0, 0), (123, 101, 88),
    ),
    "p3": (
        (26, 26, 26), (64, 64, 64), (97, 97, 97), (128, 128, 128), (192, 192, 192), (255, 255, 255),
        (165, 71, 74), (18, 156, 65), (77, 77, 159), (210, 178, 121), (0, 0, 0), (118, 102, 88),
    ),
}  # fmt: skip


def write_patches(path, kind):
    """Four frames of 12 patches in a row, ten bits, nearly without loss."""
    signal, tags, matrix = KINDS[kind]
    picture = np.repeat(np.repeat(signal[None], SIZE_PX, axis=0), SIZE_PX, axis=1)
    frames = np.repeat(picture[None], 4, axis=0)
    return write(path, frames, codec="libx265", pix_fmt="yuv420p10le", tags=tags, colorspace=matrix, crf=2)


def read_patches(picture):
    """Mean colours [12, 3] of the middles."""
    inside = slice(SIZE_PX // 4, -SIZE_PX // 4)
    columns = picture.reshape(SIZE_PX, -1, SIZE_PX, 3)[inside, :, inside]
    return columns.astype(float).mean(axis=(0, 2))
