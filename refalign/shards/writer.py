"""WebDataset shards: plain tars whose bytes depend on their samples alone, and the index that their commits hold."""

from __future__ import annotations

import io
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

from refalign.io.storage import open_file
from refalign.pipeline.outcomes import Outcome
from refalign.pipeline.steps import Step

SHEET_PX, SHEET_FRAMES = 96, 5
"""Height of the pictures on a sample's contact sheet, and how many frames of the clip are shown above the references."""
NULL_PROMPT_NAME = "null_prompt.safetensors"
"""The empty prompt's embedding, beside the parts."""


class Member(NamedTuple):
    """Where a member's data lie in the tar, for reading without parsing it."""

    offset: int
    size: int  # bytes
    crc32: int | None = None  # older indices have none


@dataclass(frozen=True, kw_only=True)
class Totals:
    """What is counted of a sample, of a shard and of all shards. Older commits lack the last two."""

    references: int = 0
    cross_references: int = 0
    cut_prompts: int = 0  # captions longer than ``models.max_text_tokens``
    prompts_with_unknown_words: int = 0


@dataclass(frozen=True, kw_only=True)
class IndexedSample(Totals):
    """What a commit says of one sample."""

    key: str
    clip_id: str
    source_group: str
    shape: list[int]  # Z T h w of the latents
    subjects: int
    reference_clips: list[str]  # the other clips that its references are from
    members: dict[str, Member] = field(default_factory=dict)  # by extension


@dataclass(frozen=True, kw_only=True)
class ShardRecord(Totals):
    """What the maker of a shard says of it."""

    split: str
    work: list[str]
    samples: list[IndexedSample]
    outcomes: list[Outcome]


@dataclass(frozen=True, kw_only=True)
class ShardCommit(ShardRecord):
    """The same with what the commit adds."""

    size_bytes: int
    sha256: str


def add_up(parts: Sequence[Totals]) -> Totals:
    """The totals of several samples or shards."""
    return Totals(**{each.name: sum(getattr(part, each.name) for part in parts) for each in fields(Totals)})


def write_tar(path: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> dict[str, dict[str, Member]]:
    """Writes samples, each a key and its members by extension; returns where each member is, in the same form."""
    with open_tar(path) as tar:
        return {key: add_sample(tar, key, members) for key, members in samples}


def open_tar(path: Path) -> tarfile.TarFile:
    """A new tar, to be closed by the caller."""
    return tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)


def add_sample(tar: tarfile.TarFile, key: str, members: Mapping[str, bytes]) -> dict[str, Member]:
    """Appends one sample, its members sorted by extension, and returns where each of them is."""
    assert "." not in key, f"key {key!r} has a dot"
    found = {}
    for extension, data in sorted(members.items()):
        entry = tarfile.TarInfo(f"{key}.{extension}")
        entry.size = len(data)
        entry.mode = 0o644
        found[extension] = Member(tar.offset + tarfile.BLOCKSIZE, len(data), zlib.crc32(data))
        tar.addfile(entry, io.BytesIO(data))
    return found


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
