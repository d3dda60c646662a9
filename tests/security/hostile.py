"""Makes hostile files: pickles with a canary, pictures and YAML that unpack to gigabytes, headers that lie."""

import io
import json
import os
import struct
import tarfile
import zipfile
import zlib

import numpy as np
import torch

DEEP = "[" * 10**6 + "]" * 10**6


class Canary:
    """An object whose pickle runs a command wherever it is opened carelessly."""

    def __init__(self, path):
        self.command = f"echo ran >> {path}"

    def __reduce__(self):
        return os.system, (self.command,)


def save_pickle(path, canary, **beside):
    """A file of ``torch.save`` with a canary in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({**beside, "weight": Canary(canary)}, path)
    return path


def write(path, content):
    """Bytes or text into a file whose folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def lie(header, content=b"\0" * 64):
    """A safetensors file with any header: a dict, or JSON text."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text)) + text + content


def tensor(shape, start, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


LIES = {
    "length beyond the file": struct.pack("<Q", 2**62) + b"{}",
    "length of a terabyte": struct.pack("<Q", 2**40) + b"{}",
    "offsets beyond the file": lie({"a": tensor([4], 0, 2**40)}),
    "offsets backwards": lie({"a": tensor([4], 32, 16)}),
    "offsets below zero": lie({"a": tensor([4], -16, 0)}),
    "a shape of petabytes": lie({"a": tensor([2**50], 0, 64)}),
    "a shape that overflows to its size": lie({"a": tensor([2**62, 2**62, 16], 0, 64)}),
    "a shape below zero": lie({"a": tensor([-4, -4], 0, 64)}),
    "an empty tensor of any length": lie({"a": tensor([0, 2**62], 0, 0)}),
    "a name twice": lie('{"a": %s, "a": %s}' % ((json.dumps(tensor([16], 0, 64)),) * 2)),
    "an unknown type": lie({"a": tensor([4], 0, 16, "OBJECT")}),
    "a header that is a list": lie("[]"),
    "a header that is a number": lie("7"),
    "a header a million deep": lie(DEEP),
    "a pickle": b"\x80\x04cos\nsystem\n(S'true'\ntR.",
    "nothing": b"",
}
"""What a safetensors file may claim."""


def png(width, height, *chunks):
    """A PNG whose header promises any size, over next to no data."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunk(*each) for each in chunks) + chunk(b"IDAT", zlib.compress(b"\0" * 999))


def zeros_png(width, height):
    """A whole PNG that is one bit a pixel, all of them zero: megapixels in kilobytes."""
    packer = zlib.compressobj(9)
    row = b"\0" * (1 + -(-width // 8))
    data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def jpeg(width, height):
    """A JPEG of any promised size, without data."""
    frame = b"\x08" + struct.pack(">HH", height, width) + b"\x03\x01\x11\x00\x02\x11\x00\x03\x11\x00"
    return (
        b"\xff\xd8\xff\xc0"
        + struct.pack(">H", 2 + len(frame))
        + frame
        + b"\xff\xda\x00\x0c\x03\x01\x00\x02\x00\x03\x00\x00\x3f\x00"
    )


def webp(width, height):
    """An extended WebP of any promised canvas."""
    canvas = b"\x10\0\0\0" + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", len(canvas)) + canvas
    return b"RIFF" + struct.pack("<I", len(body)) + body


def gif(width, height):
    return (
        b"GIF89a"
        + struct.pack("<HH", width, height)
        + b"\x80\0\0"
        + b"\0" * 6
        + b",\0\0\0\0"
        + b"\xff\xff\xff\xff\0\x02\x02L\x01\0;"
    )


def tiff(width, height):
    """A TIFF of any promised size, without data."""
    entries = [(256, width), (257, height), (258, 8), (259, 1), (262, 1), (273, 8), (278, height), (279, 1)]
    body = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    return b"II*\0\x08\0\0\0" + body + b"\0\0\0\0"


def postscript(canary):
    """A program: opened by Ghostscript, it would run the canary's command."""
    return f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%echo ran >> {canary}) (w) file\nshowpage\n".encode()


PICTURES = {
    "png of a terapixel": png(10**6, 10**6),
    "png of 400 megapixels in 50 kB": zeros_png(20_000, 20_000),
    "png of 100 megapixels in 12 kB": zeros_png(10_000, 10_000),
    "png with a text that unpacks to a gigabyte": png(9, 9, (b"zTXt", b"k\0\0" + zlib.compress(b"\0" * 2**28))),
    "png with a colour profile that unpacks": png(9, 9, (b"iCCP", b"k\0\0" + zlib.compress(b"\0" * 2**28))),
    "png with a broken chunk": png(9, 9)[:43] + b"\xff" * 40,
    "jpeg of 4 gigapixels": jpeg(65_500, 65_500),
    "webp of 16 terapixels": webp(2**24, 2**20),
    "webp of 268 megapixels": webp(16_383, 16_383),
    "gif of 4 gigapixels": gif(65_535, 65_535),
    "tiff of 4 terapixels": tiff(2**21, 2**21),
}
"""Pictures that promise more than they hold, or unpack to more than anybody wants."""


def yaml_bomb():
    """A kilobyte that is ten billion values."""
    lines = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]" for old, new in zip("abcdefghi", "bcdefghij", strict=True)]
    return "\n".join([*lines, "head: [[0, 1, *j]]", "names: *j"])


def write_object_npz(path, canary):
    """An .npz whose arrays are pickled objects."""
    objects = io.BytesIO()
    np.save(objects, np.array([Canary(canary)], dtype=object), allow_pickle=True)
    with zipfile.ZipFile(path, "w") as file:
        for name in ("names", "embeddings"):
            file.writestr(f"{name}.npy", objects.getvalue())
    return path


def write_hostile_tar(path, canary):
    """A tar of everything that must not be unpacked, padded so that offsets of an honest one lie inside."""
    import pickle

    data = pickle.dumps(Canary(canary))
    size = path.stat().st_size
    with tarfile.open(path, "w") as tar:
        for name in ("../escaped.pyd", "/tmp/refalign-escaped.pickle", "train0000.pyd", "train0000.pickle", "train0000.json"):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            entry = tarfile.TarInfo(f"train0000.{kind.decode()}")
            entry.type, entry.linkname = kind, "/etc/passwd"
            tar.addfile(entry)
    content = path.read_bytes()
    path.write_bytes((content + b"\0" * max(0, size - len(content)))[:size])


def write_extension_parquet(path, canary):
    """A parquet whose schema says that a column's type is to be unpickled."""
    import pickle

    import pyarrow as pa
    import pyarrow.parquet as pq

    said = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": pickle.dumps(Canary(canary), 0)}
    field = pa.field("path", pa.list_(pa.string()), metadata=said)
    pq.write_table(pa.table([pa.array([["a.mp4"]])], pa.schema([field])), path)
    return path


def write_latin_parquet(path, canary):
    """A parquet whose text column is no UTF-8."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    bad = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(struct.pack("<ii", 0, 4)), pa.py_buffer(b"\xff\xfe\xfd.")])
    pq.write_table(pa.table({"path": bad}), path)
    return path


def write_doubled_parquet(path, canary):
    """A parquet with two columns of one name."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_arrays([pa.array(["a.mp4"]), pa.array(["b.mp4"])], names=["path", "path"]), path)
    return path
