"""WebDataset shards: plain tars whose bytes depend on their samples alone, with the byte range of every member."""

from __future__ import annotations

import io
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from refalign.io.storage import open_file
from refalign.pipeline.steps import Step

_BLOCK_BYTES = 512
SHEET_PX, SHEET_FRAMES = 96, 5
"""Height of the pictures on a sample's contact sheet, and how many frames of the clip are shown above the references."""
NULL_PROMPT_NAME = "null_prompt.safetensors"
"""The empty prompt's embedding, beside the parts."""


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


def iter_contact_sheets(step: Step, parts: Iterable[str], limit: int) -> Iterator[tuple[str, bytes]]:
    """Up to ``limit`` sample pictures (key, JPEG bytes) of a shards stage, read by byte offset."""
    for part in parts:
        commit = step.load_part(part)
        if limit == 0 or commit is None:
            return
        with open_file(step.locate(part, commit)) as tar:
            for sample in commit["samples"][:limit]:
                offset, size, *_ = sample["members"]["jpg"]
                tar.seek(offset)
                limit -= 1
                yield sample["key"], tar.read(size)
