"""WebDataset shards: plain tars whose bytes depend on their samples alone, with the byte range of every member."""

from __future__ import annotations

import io
import tarfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

_BLOCK_BYTES = 512


def write_tar(path: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> dict[str, dict[str, list[int]]]:
    """Writes samples, each a key and its members by extension, sorted within the sample.

    Returns:
        Per key and extension: [offset_bytes, size_bytes, CRC-32] of the member's data, for reading without parsing the tar.
    """
    offsets: dict[str, dict[str, list[int]]] = {}
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, members in samples:
            assert "." not in key and key not in offsets, f"key {key!r} has a dot or comes twice"
            offsets[key] = {}
            for extension, data in sorted(members.items()):
                entry = tarfile.TarInfo(f"{key}.{extension}")
                entry.size = len(data)
                entry.mode = 0o644
                offsets[key][extension] = [tar.offset + _BLOCK_BYTES, len(data), zlib.crc32(data)]
                tar.addfile(entry, io.BytesIO(data))
    return offsets
