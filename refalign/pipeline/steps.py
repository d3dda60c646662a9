"""A step's folder: named by its fingerprint, filled part by part, done when its manifest exists.

    <output>/<step>-<fingerprint>/
        lease               held while a process works here
        parts/<name>        one file per planned part, complete or absent
        parts/<name>.json   its commit: size, sha256 and what the part recorded
        attempts/<name>/<n> what a worker on it was at; gone with the commit
        manifest.json       written last; its presence means done
        store               only where parts lie in an object store: its location

A part is written aside, brought to its place at once, and only then committed. A resumed step skips the parts whose commit and
size agree.

``parts`` and ``attempts`` may lie in an object store instead, below ``storage.parts`` and the same folder name; lease and
manifest stay in the output folder, which on a cluster is a small shared folder. The commit is the only pointer to a part:
data without a commit does not exist, and `Step.locate` says where the data of a commit lie.
"""

from __future__ import annotations

import fcntl
import os
import re
import socket
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refalign.config import make_fingerprint
from refalign.errors import BackendUnavailable
from refalign.io.storage import find_size, in_parallel, iter_files, join, kind_of, load_json, read_bytes, sha256_of
from refalign.io.writing import delete_file, delete_folder, open_aside, write_bytes, write_json
from refalign.pipeline.outcomes import count_tries

_STORE_NAME = "store"
CODE_SCHEMA = 3
"""Raised by hand when the same settings would give other bytes: it is part of every fingerprint."""


@dataclass(frozen=True)
class Step:
    """One step of one run: its name, its fingerprint and its folder.

    Attributes:
        folder: local; holds lease and manifest, and the parts where ``store`` is None.
        store: location below which folders like this one hold the parts.
        recipe: fingerprint of the code's schema and of the settings without the input: what versions of one step have in common.
    """

    name: str
    fingerprint: str
    folder: Path
    store: str | None = None
    recipe: str = ""

    @classmethod
    def make(cls, output: Path, name: str, *settings: Any, store: str | None = None, recipe: Sequence[Any] = ()) -> Step:
        """The step whose output is determined by ``settings``: config sections, plain values, input fingerprints.

        Args:
            store: location for the parts; a step that has begun keeps the one that it has.
            recipe: those of ``settings`` that are not the input.
        """
        fingerprint = make_fingerprint(name, CODE_SCHEMA, *settings)
        folder = Path(output).resolve() / f"{name}-{fingerprint}"
        return cls(
            name, fingerprint, folder, _choose_store(folder, store), make_fingerprint(CODE_SCHEMA, *recipe) if recipe else ""
        )

    @classmethod
    def open(cls, folder: Path) -> Step:
        """The step that a folder holds, begun or finished."""
        name, _, fingerprint = Path(folder).name.partition("-")
        return cls(name, fingerprint, Path(folder), _choose_store(Path(folder), None))

    @property
    def root(self) -> str:
        """The location that holds this step's folder of parts, and those of other steps beside it."""
        return self.store or str(self.folder.parent)

    @property
    def location(self) -> str:
        """Where the parts' folder lies, and what belongs to all parts beside it."""
        return join(self.root, self.folder.name)

    @property
    def parts_folder(self) -> Path:
        """Of a step whose parts are never in a store."""
        return self.folder / "parts"

    def load_manifest(self) -> dict[str, Any] | None:
        """What the finished step recorded, or None while it is unfinished.

        Raises:
            ArtifactError: the manifest is damaged.
        """
        return load_json(str(self.folder / "manifest.json"))

    def commit(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """Marks the step done. Returns what a later `load_manifest` gives."""
        self._note_store()
        self._drop_unfinished()
        recipe = {"recipe": self.recipe} if self.recipe else {}
        full = {"step": self.name, "fingerprint": self.fingerprint, **recipe, **manifest}
        write_json(self.folder / "manifest.json", full)
        return full

    def discard_manifest(self) -> None:
        """Makes a finished step unfinished: what it stands for is gone. Committed parts stay."""
        (self.folder / "manifest.json").unlink(missing_ok=True)

    def locate(self, name: str, commit: dict[str, Any] | None = None) -> str:
        """Location of a part's data.

        Args:
            commit: the part's commit, where the caller has it; it is read otherwise.
        """
        commit = commit if commit is not None else self.load_commit(name)
        return join(self.root, (commit or {}).get("location") or f"{self.folder.name}/parts/{name}")

    def locate_commit(self, name: str) -> str:
        """Location of a part's commit."""
        return join(self.location, f"parts/{name}.json")

    def load_commit(self, name: str) -> dict[str, Any] | None:
        """The commit of part ``name``, whether or not its data are there."""
        return load_json(self.locate_commit(name))

    def load_part(self, name: str) -> dict[str, Any] | None:
        """The commit of part ``name``, or None when the part must be (re)done."""
        record = self.load_commit(name)
        is_done = record and not record.get("again") and find_size(self.locate(name, record)) == record["size_bytes"]
        return record if is_done else None

    def load_parts(self, names: Iterable[str]) -> dict[str, dict[str, Any]]:
        """The commits of those parts that need not be done."""
        names = list(names)
        return {name: record for name, record in zip(names, in_parallel(self.load_part, names), strict=True) if record}

    def write_part(self, name: str, write: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """Calls ``write(path)`` on a temporary path, moves the file into place and commits it with what ``write`` returned."""
        with open_aside(join(self.location, f"parts/{name}")) as aside:
            record = write(aside)
            record = {"part": name, "size_bytes": aside.stat().st_size, "sha256": sha256_of(aside), **record}
        record |= count_tries(record, lambda: self.load_commit(name))
        write_json(self.locate_commit(name), record)
        return record

    def reopen(self, names: Iterable[str], *, forget_tries: bool = False) -> None:
        """Lets finished parts be made again: the step is not done any more, and their commits say so."""
        self.discard_manifest()
        for name in names:
            commit = self.load_commit(name) or {}
            if forget_tries:
                commit.pop("tries", None)
            write_json(self.locate_commit(name), {**commit, "again": True})

    def list_commits(self) -> list[str]:
        """Names of all parts that have a commit, planned or not."""
        folder = join(self.location, "parts")
        names = iter_files(folder) if kind_of(folder) == "folder" else ()
        return [name.removesuffix(".json") for name in names if isinstance(name, str) and name.endswith(".json")]

    def open_journal(self, name: str) -> Journal:
        """Notes of what the workers of part ``name`` were at; for the worker that begins the part now."""
        return Journal(join(self.location, f"attempts/{name}"))

    @contextmanager
    def lease(self) -> Iterator[None]:
        """Holds the folder for this process; a second holder is refused. The lease ends with the process.

        Raises:
            BackendUnavailable: another live process works in this folder.
        """
        self._note_store()
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
            self._drop_unfinished()
            yield

    def _drop_unfinished(self) -> None:
        """Deletes what killed workers were writing."""
        for left_over in self.parts_folder.glob(".*.tmp"):
            left_over.unlink(missing_ok=True)

    def _note_store(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.store:
            write_bytes(self.folder / _STORE_NAME, self.store.encode())


def _choose_store(folder: Path, wanted: str | None) -> str | None:
    """Where the parts of a step that has begun are, or where those of a new one are to be."""
    noted = folder / _STORE_NAME
    if noted.is_file():
        return noted.read_text()
    has_begun = (folder / "parts").is_dir() or (folder / "manifest.json").is_file()
    return None if has_begun or not wanted else wanted.rstrip("/")


class Journal:
    """Finds out the item that kills its workers: each attempt at a part notes what it is at, and the note outlives it.

    A video that crashes its decoder would otherwise be started again for ever.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        earlier = sorted(name for name in iter_files(folder) if isinstance(name, str)) if kind_of(folder) == "folder" else []
        self._deaths = Counter(read_bytes(join(folder, name)).decode() for name in earlier)
        self._note = join(folder, f"{len(earlier):04d}")

    def begin(self, item: str) -> int:
        """Notes that ``item`` is worked on; returns how many workers died while they were at it."""
        write_bytes(self._note, item.encode())
        return self._deaths[item]

    def close(self) -> None:
        """The part is committed: no note is needed any more."""
        delete_folder(self._folder)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """An error that stops the run is nobody's death: its note goes, and those of earlier attempts stay."""
        if kind is None:
            self.close()
        elif find_size(self._note) is not None:
            delete_file(self._note)


def iter_step_folders(output: Path) -> Iterator[Path]:
    """Every step folder below ``output``, finished or not."""
    for folder in sorted(Path(output).glob("*")):
        if folder.is_dir() and re.fullmatch(r"[a-z]+-[0-9a-f]{12}", folder.name):
            yield folder
