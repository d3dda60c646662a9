"""Reading shard samples by byte offset, in an order that is a function of (seed, samples consumed) alone.

The position of a run is one number: samples consumed. Epoch and place follow from it. The number of ranks does not enter, so
that stopping anywhere repeats and skips nothing.
"""

from __future__ import annotations

import math
import os
import time
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from jaxtyping import UInt8
from pydantic import BaseModel, TypeAdapter, ValidationError
from torch import Tensor

from refalign.config import describe_problems
from refalign.errors import ArtifactError, DataError
from refalign.io.storage import find_size, find_system, in_parallel, is_remote, join, load_json, read_bytes, translated_errors
from refalign.io.untrusted import parse_json_object
from refalign.pipeline.steps import Step
from refalign.shards.sample import Sample, check_sample
from refalign.shards.writer import NULL_PROMPT_NAME, Member

_AGAIN = "run the shards step again"
_WAY_OUT = f"delete that file and its .json, then {_AGAIN}"

_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I8": torch.int8,
    "U8": torch.uint8,
}
"""Those that samples are made of, by their names in a safetensors header."""

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Entry:
    """What training needs of `refalign.shards.writer.IndexedSample`, and where the shard is."""

    shard: str  # location
    key: str
    shape: tuple[int, int, int, int]  # Z T h w
    subjects: int
    members: dict[str, Member]
    source_group: str | None = None  # older indices have none


class _Manifest(BaseModel):
    parts: list[str]
    digest: str
    null_prompt_crc32: int | None = None


class _Commit(BaseModel):
    size_bytes: int
    samples: list[dict[str, object]]


_ENTRIES = TypeAdapter(list[Entry])


@dataclass(frozen=True)
class ShardIndex:
    """All committed samples of one split, in the order of the plan."""

    folder: Path
    split: str
    digest: str
    entries: tuple[Entry, ...]

    @classmethod
    def open(cls, folder: Path, split: str) -> ShardIndex:
        """Reads the commits of ``split`` in a finished shards step; a split without samples gives an index of length 0.

        Raises:
            ArtifactError: the step is unfinished, or a shard is missing, damaged or of another size than was committed.
        """
        manifest, step = _load_manifest(folder), Step.open(folder)
        names = sorted(part for part in manifest.parts if part.startswith(f"{split}-"))
        entries = in_parallel(lambda name: _load_entries(step, name), names)
        return cls(folder, split, manifest.digest, tuple(entry for of_shard in entries for entry in of_shard))

    def __len__(self) -> int:
        return len(self.entries)

    def read(self, index: int) -> Sample:
        """Sample ``index`` of the plan's order.

        Raises:
            ArtifactError: the bytes at the committed offset are not this sample.
            SchemaError: a tensor is missing, or the JSON does not describe the references.
        """
        entry = self.entries[index]
        where = f"{entry.shard}: sample {entry.key}"
        try:
            data, text = _read_members(entry, ("safetensors", "json"))
            tensors, info = view_tensors(data), parse_json_object(text.tobytes())
        except (DataError, OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"{where} is damaged ({error}); {_WAY_OUT}.") from error
        checked = check_sample(tensors, info, where=where, shape=entry.shape, num_subjects=entry.subjects)
        return Sample(entry.key, tensors, checked)

    def read_many(self, indices: Sequence[int]) -> list[Sample]:
        """As `read`, several at once: one reader alone leaves most of a disk or network idle."""
        return in_parallel(self.read, indices)

    def load_null_prompt(self) -> Tensor | None:
        """Embedding of the empty prompt, ``[L, D]``, which replaces a dropped text; None if none was written."""
        location = join(Step.open(self.folder).location, NULL_PROMPT_NAME)
        if find_size(location) is None:
            return None
        expected = _load_manifest(self.folder).null_prompt_crc32
        try:
            data = read_bytes(location)
            if expected is not None and zlib.crc32(data) != expected:
                raise ValueError("its bytes are not those that were written")
            return view_tensors(np.frombuffer(bytearray(data), np.uint8))["prompt_embeds"]
        except (ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"{location}: not the empty prompt's embedding ({error}); delete it and {_AGAIN}.") from error


@dataclass(frozen=True)
class SampleOrder:
    """Which sample stands at which position: one permutation after the other, one per epoch."""

    size: int
    seed: int

    def index_at(self, position: int) -> int:
        """Index of the sample at ``position`` (samples consumed before it)."""
        epoch, place = divmod(position, self.size)
        return int(permute(self.size, self.seed, epoch)[place])

    def global_batch(self, position: int, size: int) -> list[tuple[int, int]]:
        """(position, index) of the ``size`` samples from ``position`` on; a batch may span two epochs."""
        return [(p, self.index_at(p)) for p in range(position, position + size)]


class Prefetcher(Generic[Item]):
    """Makes ``make(first) ... make(last)`` ahead in one thread, in order, and measures how long the consumer waited.

    At most ``depth`` items wait while one more is being made.
    """

    def __init__(self, make: Callable[[int], Item], first: int, last: int, *, depth: int = 2) -> None:
        self.wait_s = 0.0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._todo = (self._thread.submit(make, number) for number in range(first, last + 1))
        self._made: deque[Future[Item]] = deque(islice(self._todo, depth + 1))

    def next(self) -> Item:
        """The next item, or whatever ``make`` raised for it; ``wait_s`` then holds the seconds this call waited."""
        start_s = time.perf_counter()
        item = self._made.popleft().result()
        self.wait_s = time.perf_counter() - start_s
        self._made.extend(islice(self._todo, 1))
        return item

    def close(self) -> None:
        """Ends the thread after the item that it is making."""
        self._thread.shutdown(cancel_futures=True)


def random_words(seed: int, purpose: str, number: int, count: int) -> np.ndarray:
    """``count`` uniform 64-bit words that depend on the arguments alone: the source of every draw of training."""
    # numpy promises that raw words never change, which it does not of a Generator's draws.
    key = [seed, int.from_bytes(purpose.encode()[:8])]
    return np.random.Philox(key=key, counter=[0, 0, 0, number]).random_raw(count)


@lru_cache(maxsize=16)
def permute(size: int, seed: int, epoch: int, purpose: str = "order") -> np.ndarray:
    """A permutation of ``size`` samples that depends on the arguments alone."""
    return np.argsort(random_words(seed, purpose, epoch, size), kind="stable")


def view_tensors(data: UInt8[np.ndarray, "N"]) -> dict[str, Tensor]:
    """Tensors over the bytes of a safetensors file (https://github.com/huggingface/safetensors#format), without copying them.

    The library's own reader of bytes copies every tensor, which costs a third of the rate of a disk.

    Raises:
        ValueError, KeyError, TypeError: the bytes are no safetensors file.
    """
    header_end = 8 + int.from_bytes(data[:8].tobytes(), "little")
    if header_end > len(data):
        raise ValueError(f"a header of {header_end} in {len(data)} bytes")
    header = parse_json_object(data[8:header_end].tobytes(), object_pairs_hook=_refuse_doubles)
    header.pop("__metadata__", None)
    content = torch.from_numpy(data)[header_end:]
    return {name: _view_tensor(content, **said) for name, said in header.items()}


def _view_tensor(content: UInt8[Tensor, "N"], dtype: str, shape: list[int], data_offsets: list[int]) -> Tensor:
    start, end = data_offsets
    kind = _DTYPES[dtype]
    # Within the bytes each length is at most theirs; an empty tensor could claim any other length beside its 0.
    if not all(type(length) is int and 0 <= length <= len(content) for length in shape):
        raise ValueError(f"a tensor of {shape}")
    if not 0 <= start <= end <= len(content) or end - start != math.prod(shape) * kind.itemsize:
        raise ValueError(f"bytes {start} to {end} of {len(content)} for a tensor of {shape} {dtype}")
    piece = content[start:end]
    if piece.storage_offset() % kind.itemsize:
        piece = piece.clone()
    return piece.view(kind).view(shape)


def _refuse_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a header that says something twice")
    return found


def _read_members(entry: Entry, suffixes: Sequence[str]) -> list[UInt8[np.ndarray, "N"]]:
    """The bytes of some members of a sample, which lie beside each other, in one read."""
    places = [entry.members[suffix] for suffix in suffixes]
    start, end = min(offset for offset, _, _ in places), max(offset + size for offset, size, _ in places)
    data = _read_range(entry.shard, start, end - start)
    if len(data) != end - start:
        raise ValueError(f"{len(data)} of {end - start} bytes at offset {start}")
    members = [data[offset - start : offset - start + size] for offset, size, _ in places]
    for suffix, member, (_, _, checksum) in zip(suffixes, members, places, strict=True):
        if checksum is not None and zlib.crc32(member.data) != checksum:
            raise ValueError(f"the bytes of its {suffix} are not those that were written")
    return members


def _read_range(location: str, offset: int, size: int) -> UInt8[np.ndarray, "N"]:
    if is_remote(location):
        with translated_errors(location):
            return np.frombuffer(bytearray(_open_remote(location).read_at(size, offset)), np.uint8)
    data = np.empty(size, np.uint8)
    with Path(location).open("rb", buffering=0) as file:
        done = 0
        while count := os.preadv(file.fileno(), [data.data[done:]], offset + done):  # a call reads 2 GiB at most
            done += count
    return data[:done]


@lru_cache(maxsize=256)
def _open_remote(location: str) -> Any:
    """Kept open: opening asks the store for the size each time."""
    system, path = find_system(location)
    return system.open_input_file(path)


def _load_entries(step: Step, name: str) -> list[Entry]:
    commit_path = step.locate_commit(name)
    record = _load_json(commit_path, _WAY_OUT)
    shard = step.locate(name, record)
    try:
        commit = _Commit.model_validate(record)
        entries = _ENTRIES.validate_python([{**sample, "shard": shard} for sample in commit.samples])
    except ValidationError as error:
        raise ArtifactError(f"{commit_path}: not a shard commit ({describe_problems(error)[:200]}); {_WAY_OUT}.") from error
    for entry in entries:
        if not all(0 <= offset <= offset + size <= commit.size_bytes for offset, size, _ in entry.members.values()):
            raise ArtifactError(f"{commit_path}: not a shard commit ({entry.key} lies outside of the file); {_WAY_OUT}.")
    if (found := find_size(shard)) != commit.size_bytes:
        fault = "this shard is missing" if found is None else f"{found} bytes, {commit.size_bytes} were committed"
        raise ArtifactError(f"{shard}: {fault}; {_WAY_OUT}.")
    return entries


def _load_manifest(folder: Path) -> _Manifest:
    path = str(folder / "manifest.json")
    record = _load_json(path, "the shards step has not finished; run it again")
    try:
        return _Manifest.model_validate(record)
    except ValidationError as error:
        raise ArtifactError(f"{path}: not of a shards step ({describe_problems(error)[:200]}); {_AGAIN}.") from error


def _load_json(location: str, way_out: str) -> dict[str, Any]:
    found = load_json(location)
    if found is None:
        raise ArtifactError(f"{location}: not found; {way_out}.")
    return found
