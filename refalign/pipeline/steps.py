"""A step's folder: named by its fingerprint, filled part by part, done when its manifest exists.

    <output>/<step>-<fingerprint>/
        lease               held while a process works here
        parts/<name>        one file per planned part, complete or absent
        parts/<name>.json   its commit: size, sha256 and what the part recorded
        attempts/<name>/<n> which item a worker was on; deleted after the commit
        manifest.json       written last; its presence means done
        store               the object store that holds ``parts`` and ``attempts`` instead, if there is one

A part is written aside, renamed, and only then committed. A resumed step skips the parts whose commit and size agree. Data
without a commit do not count, and `Step.locate` says where the data of a commit lie.
"""

from __future__ import annotations

import fcntl
import os
import re
import socket
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from refalign.config import make_fingerprint
from refalign.errors import BackendUnavailable
from refalign.io.storage import find_size, in_parallel, iter_files, join, kind_of, load_json, read_bytes, sha256_of
from refalign.io.writing import delete_file, delete_folder, open_aside, write_bytes, write_json
from refalign.pipeline.outcomes import Commit

M = TypeVar("M", bound=BaseModel)
_STORE_NAME = "store"
CODE_SCHEMA = 3
"""Part of every fingerprint. Raise it by hand when the same settings would give other bytes."""


@dataclass(frozen=True)
class Step:
    """One step of one run.

    Attributes:
        folder: local; holds lease and manifest, and the parts if ``store`` is None.
        store: location below which folders of the same name hold the parts.
        recipe: fingerprint of the settings without the input; versions of one step have it in common.
    """

    name: str
    fingerprint: str
    folder: Path
    store: str | None = None
    recipe: str = ""

    @classmethod
    def make(cls, output: Path, name: str, *settings: object, store: str | None = None, recipe: Sequence[object] = ()) -> Step:
        """The step whose output is determined by ``settings``; one that has begun keeps the store that it has."""
        fingerprint = make_fingerprint(name, CODE_SCHEMA, *settings)
        folder = Path(output).resolve() / f"{name}-{fingerprint}"
        has_begun = (folder / "parts").is_dir() or (folder / "manifest.json").is_file()
        wanted = store.rstrip("/") if store and not has_begun else None
        common = make_fingerprint(CODE_SCHEMA, *recipe) if recipe else ""
        return cls(name, fingerprint, folder, _noted_store(folder) or wanted, common)

    @classmethod
    def open(cls, folder: Path) -> Step:
        """The step that a folder holds, begun or finished."""
        name, _, fingerprint = Path(folder).name.partition("-")
        return cls(name, fingerprint, Path(folder), _noted_store(Path(folder)))

    @property
    def root(self) -> str:
        """The location that holds this step's folder of parts, and those of other steps."""
        return self.store or str(self.folder.parent)

    @property
    def location(self) -> str:
        """Where the folder of parts lies, and what belongs to all parts beside it."""
        return join(self.root, self.folder.name)

    @property
    def parts_folder(self) -> Path:
        """Of a step whose parts are never in a store."""
        return self.folder / "parts"

    def load_manifest(self) -> dict[str, Any] | None:
        """What the finished step recorded, or None. Raises `ArtifactError` if the manifest is damaged."""
        return load_json(str(self.folder / "manifest.json"))

    def read_manifest(self, kind: type[M]) -> M | None:
        """The same as a typed manifest."""
        found = self.load_manifest()
        return None if found is None else kind.model_validate(found)

    def commit(self, manifest: Mapping[str, object]) -> dict[str, Any]:
        """Marks the step done. Returns what a later `load_manifest` gives."""
        self._note_store()
        self._drop_unfinished()
        recipe = {"recipe": self.recipe} if self.recipe else {}
        full = {"step": self.name, "fingerprint": self.fingerprint, **recipe, **manifest}
        write_json(self.folder / "manifest.json", full)
        return full

    def discard_manifest(self) -> None:
        """Makes a finished step unfinished. Committed parts stay."""
        (self.folder / "manifest.json").unlink(missing_ok=True)

    def locate(self, name: str, commit: Mapping[str, Any] | None = None) -> str:
        """Location of a part's data; the part's commit is read if it is not given."""
        commit = commit if commit is not None else self.load_commit(name)
        return join(self.root, (commit or {}).get("location") or f"{self.folder.name}/parts/{name}")

    def find_owner(self, commit: Commit) -> str:
        """The folder of another version that holds the data of a commit, or nothing."""
        owner = commit.get("location", "").partition("/")[0]
        return "" if owner == self.folder.name else owner

    def locate_commit(self, name: str) -> str:
        """Location of a part's commit."""
        return join(self.location, f"parts/{name}.json")

    def load_commit(self, name: str) -> Commit | None:
        """The commit of part ``name``, whether or not its data are there."""
        found = load_json(self.locate_commit(name))
        return None if found is None else Commit(found)

    def load_commits(self) -> dict[str, Commit]:
        """All commits, of parts that are planned or not."""
        names = self.list_commits()
        return {name: commit for name, commit in zip(names, in_parallel(self.load_commit, names), strict=True) if commit}

    def load_part(self, name: str) -> Commit | None:
        """The commit of part ``name``, or None if the part must be made (again)."""
        commit = self.load_commit(name)
        is_done = commit and not commit.get("again") and find_size(self.locate(name, commit)) == commit["size_bytes"]
        return commit if is_done else None

    def load_parts(self, names: Iterable[str]) -> dict[str, Commit]:
        """The commits of those parts that need not be made."""
        names = list(names)
        return {name: commit for name, commit in zip(names, in_parallel(self.load_part, names), strict=True) if commit}

    def write_part(self, name: str, write: Callable[[Path], object]) -> Commit:
        """Calls ``write`` with a temporary path, moves the file into place and commits it.

        Args:
            write: returns what to record: a mapping, a pydantic model or a dataclass.
        """
        with open_aside(join(self.location, f"parts/{name}")) as aside:
            recorded = to_jsonable_python(write(aside))
            commit = Commit({"part": name, "size_bytes": aside.stat().st_size, "sha256": sha256_of(aside), **recorded})
        if commit.has_faults_of_the_moment:
            commit["tries"] = (self.load_commit(name) or Commit()).get("tries", 0) + 1
        write_json(self.locate_commit(name), commit)
        return commit

    def reopen(self, names: Iterable[str], *, forget_tries: bool = False) -> None:
        """Lets finished parts be made again; the step is not done any more."""
        self.discard_manifest()
        for name in names:
            commit = self.load_commit(name) or Commit()
            if forget_tries:
                commit.pop("tries", None)
            write_json(self.locate_commit(name), {**commit, "again": True})

    def list_commits(self) -> list[str]:
        """Names of all parts that have a commit, planned or not."""
        return [name.removesuffix(".json") for name in _list_files(join(self.location, "parts")) if name.endswith(".json")]

    def open_journal(self, name: str) -> Journal:
        """Notes of what the workers of part ``name`` were doing, for the worker that begins the part now."""
        return Journal(join(self.location, f"attempts/{name}"))

    @contextmanager
    def lease(self) -> Iterator[None]:
        """Holds the folder for this process. The lease ends with the process.

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


def _noted_store(folder: Path) -> str | None:
    noted = folder / _STORE_NAME
    return noted.read_text() if noted.is_file() else None


def _list_files(folder: str) -> list[str]:
    """Names of the files in a folder that may be missing, without those that cannot be read."""
    return [name for name in iter_files(folder) if isinstance(name, str)] if kind_of(folder) == "folder" else []


class Journal:
    """Finds the item that kills its workers: each attempt at a part notes its current item, and the note survives the worker."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        earlier = sorted(_list_files(folder))
        self._deaths = Counter(read_bytes(join(folder, name)).decode() for name in earlier)
        self._note = join(folder, f"{len(earlier):04d}")

    def begin(self, item: str) -> int:
        """Notes that ``item`` is worked on; returns how many workers died on it."""
        write_bytes(self._note, item.encode())
        return self._deaths[item]

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Deletes the notes of a finished part. After an error no worker has died: only this attempt's note is deleted."""
        if kind is None:
            delete_folder(self._folder)
        else:
            delete_file(self._note)


def iter_step_folders(output: Path) -> Iterator[Path]:
    """Every step folder below ``output``, finished or not."""
    for folder in sorted(Path(output).glob("*")):
        if folder.is_dir() and re.fullmatch(r"[a-z]+-[0-9a-f]{12}", folder.name):
            yield folder
