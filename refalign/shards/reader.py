"""Reading shard samples by byte offset, in an order that is a function of (seed, samples consumed) alone.

The position of a run is one number: samples consumed. Epoch and place follow from it, the number of ranks does not enter,
and stopping anywhere repeats and skips nothing.
"""

from __future__ import annotations

import contextlib
import math
import os
import queue
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from refalign.errors import ArtifactError, DataError
from refalign.io.storage import find_size, find_system, in_parallel, is_remote, join, load_json, read_bytes, translated_errors
from refalign.io.untrusted import parse_json_object
from refalign.pipeline.steps import Step
from refalign.shards.sample import Sample, check_sample
from refalign.shards.writer import NULL_PROMPT_NAME

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


@dataclass(frozen=True)
class Entry:
    """What the index knows of a sample without reading it."""

    key: str
    shard: str  # location
    shape: tuple[int, int, int, int]  # Z T h w
    subjects: int
    members: dict[str, tuple[int, int, int | None]]  # suffix -> offset and size in bytes, CRC-32 (None in older indices)
    source_group: str | None = None  # None in indices that were written before it stood there


@dataclass(frozen=True)
class ShardIndex:
    """All committed samples of one split, in the order of the plan."""

    folder: Path
    split: str
    digest: str
    entries: tuple[Entry, ...]

    @classmethod
    def open(cls, folder: Path, split: str) -> ShardIndex:
        """Reads the commits of ``split``; a split without samples gives an index of length 0.

        Args:
            folder: a finished shards step.
            split: "train" or "validation".

        Raises:
            ArtifactError: the step is unfinished, or a shard is missing, damaged or of another size than was committed.
        """
        manifest = _load_json(str(Path(folder) / "manifest.json"), "the shards step has not finished; run it again")
        step = Step.open(Path(folder))
        names = sorted(part for part in manifest["parts"] if part.startswith(f"{split}-"))
        entries = in_parallel(lambda name: _load_entries(step, name), names)
        return cls(Path(folder), split, manifest["digest"], tuple(entry for of_shard in entries for entry in of_shard))

    def __len__(self) -> int:
        return len(self.entries)

    def read(self, index: int) -> Sample:
        """Sample ``index`` of the plan's order.

        Raises:
            ArtifactError: the bytes at the committed offset are not this sample.
            SchemaError: a tensor is missing, or the JSON does not describe the references.
        """
        entry = self.entries[index]
        try:
            data, text = _read_members(entry, ("safetensors", "json"))
            tensors, info = view_tensors(data), parse_json_object(text.tobytes())
        except (DataError, OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"{entry.shard}: sample {entry.key} is damaged ({error}); {_WAY_OUT}.") from error
        where = f"{entry.shard}: sample {entry.key}"
        check_sample(tensors, info, where=where, shape=entry.shape, num_subjects=entry.subjects)
        return Sample(entry.key, tensors, info)

    def read_many(self, indices: Sequence[int]) -> list[Sample]:
        """Samples in the given order, several read at once: one reader alone leaves most of a disk or network idle.

        Raises:
            ArtifactError: see `read`.
            SchemaError: see `read`.
        """
        return in_parallel(self.read, indices)

    def load_null_prompt(self) -> Tensor | None:
        """Embedding of the empty prompt, ``[L, D]``, which is what a dropped text becomes; None where none was written.

        Raises:
            ArtifactError: the file is damaged.
        """
        location = join(Step.open(self.folder).location, NULL_PROMPT_NAME)
        if find_size(location) is None:
            return None
        try:
            data = read_bytes(location)
            expected = _load_json(str(self.folder / "manifest.json"), _AGAIN).get("null_prompt_crc32")
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

    def iter_positions(self, position: int, size: int) -> Iterator[list[tuple[int, int]]]:
        """Global batches from ``position`` on, without end."""
        while True:
            yield self.global_batch(position, size)
            position += size


@dataclass(frozen=True)
class _Fault:
    error: BaseException


class Prefetcher(Generic[Item]):
    """Makes items ahead in one thread, at most ``depth`` of them, and measures how long the consumer waited."""

    def __init__(self, make: Callable[[int], Item], first: int, last: int, *, depth: int = 2) -> None:
        """Starts making ``make(first) ... make(last)``, both included, in order."""
        self.wait_s = 0.0
        self._queue: queue.Queue[Item | _Fault] = queue.Queue(maxsize=depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(make, first, last), name="prefetch", daemon=True)
        self._thread.start()

    def next(self) -> Item:
        """The next item; ``wait_s`` then holds the seconds this call waited.

        Raises:
            BaseException: whatever ``make`` raised for this item.
        """
        start_s = time.perf_counter()
        item = self._queue.get()
        self.wait_s = time.perf_counter() - start_s
        if isinstance(item, _Fault):
            raise item.error
        return item

    def close(self) -> None:
        """Ends the thread; items made ahead are dropped."""
        self._closed.set()
        while self._thread.is_alive():
            with contextlib.suppress(queue.Empty):
                self._queue.get_nowait()  # it may wait for room
            self._thread.join(0.001)

    def _work(self, make: Callable[[int], Item], first: int, last: int) -> None:
        for number in range(first, last + 1):
            if self._closed.is_set():
                return
            try:
                self._queue.put(make(number))
            except BaseException as error:  # noqa: BLE001 - handed to the consumer, which raises it
                self._queue.put(_Fault(error))
                return


def random_words(seed: int, purpose: str, number: int, count: int) -> np.ndarray:
    """``count`` uniform 64-bit words that depend on the arguments alone: the source of every draw of training.

    Raw words, because numpy promises that they never change; what `numpy.random.Generator` makes of them may.
    """
    key = [seed, int.from_bytes(purpose.encode()[:8])]
    return np.random.Philox(key=key, counter=[0, 0, 0, number]).random_raw(count)


@lru_cache(maxsize=16)
def permute(size: int, seed: int, epoch: int, purpose: str = "order") -> np.ndarray:
    """A permutation of ``size`` samples that depends on the arguments alone."""
    return np.argsort(random_words(seed, purpose, epoch, size), kind="stable")


def view_tensors(data: UInt8[np.ndarray, "N"]) -> dict[str, Tensor]:
    """Tensors over the bytes of a safetensors file, which are not copied: they live as long as one of them does.

    The library's own reader of bytes copies every tensor, which costs a third of the rate of a disk.

    Raises:
        ValueError, KeyError, TypeError: the bytes are no safetensors file.

    Source: the format's description, https://github.com/huggingface/safetensors#format.
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
    commit = _load_json(commit_path, _WAY_OUT)
    shard = step.locate(name, commit)
    try:
        _check_size(shard, commit["size_bytes"])
        return [_make_entry(shard, sample, commit["size_bytes"]) for sample in commit["samples"]]
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise ArtifactError(f"{commit_path}: not a shard commit ({error!r}); {_WAY_OUT}.") from error


def _make_entry(shard: str, sample: dict[str, Any], size_bytes: int) -> Entry:
    members = {
        suffix: (int(offset), int(size), int(checksum[0]) if checksum else None)
        for suffix, (offset, size, *checksum) in sample["members"].items()
    }
    if not all(0 <= offset <= offset + size <= size_bytes for offset, size, _ in members.values()):
        raise ValueError(f"members {members} of {size_bytes} bytes")
    channels, frames, height, width = sample["shape"]
    shape = (channels, frames, height, width)
    return Entry(sample["key"], shard, shape, int(sample["subjects"]), members, sample.get("source_group"))


def _check_size(shard: str, size_bytes: int) -> None:
    found = find_size(shard)
    if found is None:
        raise ArtifactError(f"{shard}: this shard is missing; {_WAY_OUT}.")
    if found != size_bytes:
        raise ArtifactError(f"{shard}: {found} bytes, {size_bytes} were committed; {_WAY_OUT}.")


def _load_json(location: str, way_out: str) -> dict[str, Any]:
    found = load_json(location)
    if found is None:
        raise ArtifactError(f"{location}: not found; {way_out}.")
    return found
