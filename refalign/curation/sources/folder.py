"""A folder of videos, one video, or a pattern, local or remote, with sidecars.

A video may have a sidecar of the same name: ``clip.txt`` (the caption) or ``clip.json`` with any of ``caption``, ``license``,
``consent``, ``source_group`` (videos that may show the same subjects: a channel, an owner, a long recording) and ``shots`` (a
list of ``start_s``, ``end_s``, ``caption``, where the caption changes within the video).
"""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from refalign import storage
from refalign.config import InputConfig
from refalign.curation.sources.source_video import VIDEO_SUFFIXES, SourceVideo, make_source, refuse
from refalign.errors import ConfigError, DataError
from refalign.outcomes import Outcome
from refalign.texts import parse_json

_MAX_SIDECAR_BYTES = 16 * 2**20
_READERS = 16
"""Sidecars read at a time: object stores answer slowly and in parallel."""


def is_video(name: str) -> bool:
    """Whether the name has a video's suffix."""
    return PurePosixPath(name).suffix.lower() in VIDEO_SUFFIXES


def iter_folder(listing: Iterable[str | DataError], folder: str, config: InputConfig) -> Iterator[SourceVideo | Outcome]:
    """Every video of a folder's listing; what is no video or cannot be used stands as an outcome in its place."""
    names = []
    for entry in listing:
        if isinstance(entry, DataError):
            yield refuse(str(entry).partition(":")[0], entry)
        elif not PurePosixPath(entry).name.startswith("."):
            names.append(entry)
    there = set(names)
    sidecars = {str(PurePosixPath(name).with_suffix(suffix)) for name in names if is_video(name) for suffix in (".json", ".txt")}

    def make(name: str) -> SourceVideo | Outcome:
        if not is_video(name):
            return refuse(name, DataError("NOT_A_VIDEO", "not a video by its suffix"))
        beside = [sidecar for sidecar in _sidecars(name) if sidecar in there]
        return describe_video(storage.join(folder, name), name, config, sidecar=beside[0] if beside else None)

    with ThreadPoolExecutor(_READERS) as pool:
        yield from pool.map(make, [name for name in names if name not in sidecars])


def iter_pattern(pattern: str, config: InputConfig) -> Iterator[SourceVideo | Outcome]:
    """Every local file that a shell pattern (``*``, ``?``, ``[...]``, ``**``) names, called by its path below the fixed part.

    Raises:
        ConfigError: no valid pattern.
    """
    parts = Path(pattern).parts
    fixed = next(position for position, part in enumerate(parts) if glob.has_magic(part))
    folder = Path(*parts[:fixed])
    try:
        found = sorted(path for path in folder.glob("/".join(parts[fixed:])) if not path.is_dir() and path.name[0] != ".")
    except ValueError as error:
        raise ConfigError(f"--input {pattern}: {error}; '**' stands alone between slashes, as in 'videos/**/*.mp4'.") from error
    for path in found:
        yield describe_video(str(path), path.relative_to(folder).as_posix(), config, sidecar=find_sidecar(str(path)))


def describe_video(path: str, name: str, config: InputConfig, *, sidecar: str | None) -> SourceVideo | Outcome:
    """The source of one video, described by the sidecar of that name (beside the video) where there is one."""
    try:
        storage.resolve(path)
        said = _read_sidecar(storage.join(storage.parent(path), PurePosixPath(sidecar).name)) if sidecar else {}
        return make_source(path, name, said, config)
    except DataError as error:
        return refuse(name, error)


def find_sidecar(path: str) -> str | None:
    """The sidecar that lies beside a video, looked for one by one."""
    return next((sidecar for sidecar in _sidecars(path) if _is_file(sidecar)), None)


def _sidecars(name: str) -> tuple[str, str]:
    stem = name[: len(name) - len(PurePosixPath(name).suffix)]
    return f"{stem}.json", f"{stem}.txt"


def _is_file(location: str) -> bool:
    try:
        return storage.kind_of(location) == "file"
    except DataError:
        return False


def read_description(location: str) -> bytes:
    """The bytes of a sidecar.

    Raises:
        DataError: BAD_SIDECAR: it is far too large for one; or as `storage.open_file`.
    """
    if storage.size_of(location) > _MAX_SIDECAR_BYTES:
        name = PurePosixPath(location).name
        raise DataError("BAD_SIDECAR", f"{name} is larger than {_MAX_SIDECAR_BYTES} bytes, expected a description")
    return storage.read_bytes(location)


def _read_sidecar(location: str) -> dict[str, Any]:
    name = PurePosixPath(location).name
    data = read_description(location)
    try:
        if location.endswith(".txt"):
            return {"caption": data.decode("utf-8-sig").strip()}
        said = parse_json(data)
    except ValueError as error:
        raise DataError("BAD_SIDECAR", f"{name} cannot be read: {type(error).__name__} {error}") from error
    if not isinstance(said, dict):
        raise DataError("BAD_SIDECAR", f"{name} holds a {type(said).__name__}, expected an object")
    return said
