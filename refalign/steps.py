"""A step's folder: named by its fingerprint, filled part by part, done when its manifest exists.

    <output>/<step>-<fingerprint>/
        lease               held while a process works here
        parts/<name>        one file per planned part, complete or absent
        parts/<name>.json   its commit: size, sha256 and what the part recorded
        parts/.<name>.attempt<n>   what a worker on it was at; gone with the commit
        manifest.json       written last; its presence means done

A part is written aside, synced, renamed, and only then committed. A resumed step skips the parts whose commit and size agree.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refalign.config import make_fingerprint
from refalign.errors import ArtifactError, BackendUnavailable

_SAMPLE_BYTES = 1 << 20
CODE_SCHEMA = 1
"""Raised by hand when the same settings would give other bytes: it is part of every fingerprint."""


@dataclass(frozen=True)
class Step:
    """One step of one run: its name, its fingerprint and its folder."""

    name: str
    fingerprint: str
    folder: Path

    @classmethod
    def make(cls, output: Path, name: str, *settings: Any) -> Step:
        """The step whose output is determined by ``settings``: config sections, plain values, input fingerprints."""
        fingerprint = make_fingerprint(name, CODE_SCHEMA, *settings)
        return cls(name, fingerprint, Path(output).resolve() / f"{name}-{fingerprint}")

    @property
    def parts_folder(self) -> Path:
        return self.folder / "parts"

    def load_manifest(self) -> dict[str, Any] | None:
        """What the finished step recorded, or None while it is unfinished.

        Raises:
            ArtifactError: the manifest is damaged.
        """
        return _load_json(self.folder / "manifest.json")

    def commit(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """Marks the step done. Returns what a later `load_manifest` gives."""
        full = {"step": self.name, "fingerprint": self.fingerprint, **manifest}
        write_json(self.folder / "manifest.json", full)
        return full

    def load_part(self, name: str) -> dict[str, Any] | None:
        """The commit of part ``name``, or None when the part must be (re)done."""
        record = _load_json(self.parts_folder / f"{name}.json")
        if record is None:
            return None
        data = self.parts_folder / name
        return record if data.is_file() and data.stat().st_size == record["size_bytes"] else None

    def write_part(self, name: str, write: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """Calls ``write(path)`` on a temporary path, moves the file into place and commits it with what ``write`` returned."""
        self.parts_folder.mkdir(parents=True, exist_ok=True)
        final = self.parts_folder / name
        aside = final.with_name(f".{name}.{socket.gethostname()}-{os.getpid()}.tmp")
        try:
            record = write(aside)
            digest = sha256_of(aside)
            size_bytes = aside.stat().st_size
            _move(aside, final)
        finally:
            aside.unlink(missing_ok=True)
        record = {"part": name, "size_bytes": size_bytes, "sha256": digest, **record}
        write_json(final.with_name(f"{name}.json"), record)
        return record

    def open_journal(self, name: str) -> Journal:
        """Notes of what the workers of part ``name`` were at; for the worker that begins the part now."""
        return Journal(self.parts_folder, name)

    @contextmanager
    def lease(self) -> Iterator[None]:
        """Holds the folder for this process; a second holder is refused. The lease ends with the process.

        Raises:
            BackendUnavailable: another live process works in this folder.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lease").open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                file.seek(0)
                holder = file.read().strip() or "an unknown process"
                raise BackendUnavailable(
                    f"{self.folder}: held by {holder}; wait for it, or end it and run the same command again."
                ) from error
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            for left_over in self.parts_folder.glob(".*.tmp"):
                left_over.unlink()
            yield


class Journal:
    """Finds out the item that kills its workers: each attempt at a part notes what it is at, and the note outlives it.

    A video that crashes its decoder would otherwise be started again for ever.
    """

    def __init__(self, folder: Path, part: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._pattern = f".{part}.attempt*"
        self._folder = folder
        earlier = sorted(folder.glob(self._pattern))
        self._deaths = Counter(path.read_text() for path in earlier)
        self._note = folder / f".{part}.attempt{len(earlier):04d}"

    def begin(self, item: str) -> int:
        """Notes that ``item`` is worked on; returns how many workers died while they were at it."""
        self._note.write_text(item)
        return self._deaths[item]

    def close(self) -> None:
        """The part is committed: no note is needed any more."""
        for path in self._folder.glob(self._pattern):
            path.unlink(missing_ok=True)


def iter_step_folders(output: Path) -> Iterator[Path]:
    """Every step folder below ``output``, finished or not."""
    for folder in sorted(Path(output).glob("*")):
        if folder.is_dir() and re.fullmatch(r"[a-z]+-[0-9a-f]{12}", folder.name):
            yield folder


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` so that readers see the old file or the whole new one."""
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Writes aside, syncs and renames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        aside.write_bytes(data)
        _move(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def digest_sampled(path: Path) -> str:
    """16 hexadecimal digits from the size and the first and last MiB of a file: cheap at any size, same content, same digits."""
    with path.open("rb") as file:
        return digest_stream(file, path.stat().st_size)


def digest_stream(file: Any, size_bytes: int) -> str:
    """`digest_sampled` of an open binary file, which need not be local."""
    digest = hashlib.sha256(str(size_bytes).encode())
    digest.update(file.read(_SAMPLE_BYTES))
    file.seek(min(size_bytes, max(_SAMPLE_BYTES, size_bytes - _SAMPLE_BYTES)))
    digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_disk_space(folder: Path, needed_bytes: int) -> None:
    """Refuses to start what would fill the disk.

    Raises:
        ArtifactError: less than ``needed_bytes`` is free where ``folder`` will be.
    """
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < needed_bytes:
        raise ArtifactError(
            f"{existing}: {free_bytes / 2**30:.1f} GiB free, about {needed_bytes / 2**30:.1f} GiB needed; "
            "free some space, or give another --output."
        )


def _move(aside: Path, final: Path) -> None:
    _sync(aside)
    aside.replace(final)
    _sync(final.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _load_json(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ArtifactError(f"{path}: damaged ({error}); delete it and run again.") from error
