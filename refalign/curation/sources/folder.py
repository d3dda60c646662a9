"""A folder of videos, one video, or a pattern, local or remote, with sidecars.

A video may have sidecars of the same name: ``clip.txt`` (the caption) and ``clip.json`` with any of ``caption``, ``license``,
``consent``, ``source_group`` (videos that may show the same subjects: a channel, an owner, a long recording) and ``shots`` (a
list of ``start_s``, ``end_s``, ``caption``, where the caption changes within the video). Both are read; the JSON's caption holds
where both have one.

A file is a video by its suffix. One with another suffix is a video if its pictures can be decoded (local files only).
"""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from refalign.config import CurationConfig, InputConfig
from refalign.curation.sources.listing import find_run, split_pattern
from refalign.curation.sources.source_video import SourceVideo, make_source, read_caption, refuse
from refalign.errors import ConfigError, DataError
from refalign.io import storage
from refalign.io.untrusted import parse_json
from refalign.io.video import iter_frames
from refalign.pipeline.outcomes import Outcome
from refalign.pipeline.places import is_there

VIDEO_SUFFIXES = frozenset(
    (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".ogv", ".3gp")
    + (".mts", ".m2ts", ".m2t", ".vob", ".mxf", ".divx", ".f4v", ".asf", ".ogm", ".3g2", ".mpe", ".m2v")
)
"""Names that promise a video: where it cannot be opened, that is a fault."""
TABLE_SUFFIXES = (".parquet", ".csv", ".jsonl", ".ndjson")
_SIDECAR_SUFFIXES = (".json", ".txt")
_UNFINISHED_SUFFIXES = (".part", ".partial", ".crdownload", ".download", ".tmp", ".aria2", ".!qb", ".!ut")
_MAX_SIDECAR_BYTES = 16 * 2**20


def is_video(name: str) -> bool:
    """Whether the name has a video's suffix."""
    return PurePosixPath(name).suffix.lower() in VIDEO_SUFFIXES


def opens_as_video(location: str) -> bool:
    """Whether a local file without a video's suffix has pictures that can be decoded, and is no unfinished download."""
    suffix = PurePosixPath(location).suffix.lower()
    if storage.is_remote(location) or suffix in (*_SIDECAR_SUFFIXES, *TABLE_SUFFIXES, *_UNFINISHED_SUFFIXES):
        return False
    try:
        if storage.kind_of(storage.resolve(location)) != "file":
            return False
        return next(iter_frames(Path(location), CurationConfig()), None) is not None
    except Exception:  # whatever a decoder makes of a file that nobody calls a video
        return False


def iter_folder(names: Iterable[str], folder: str, config: InputConfig) -> Iterator[SourceVideo | Outcome]:
    """Every video among a folder's files; what is no video or cannot be used stands as an outcome in its place."""
    names = list(names)
    shown = [name for name in names if not is_hidden(name)]
    videos = {name for name in shown if is_video(name)}
    sidecars = {sidecar for name in videos for sidecar in _sidecars(name)}
    odd = [name for name in shown if name not in videos and name not in sidecars]
    there = set(names)

    def make(name: str) -> SourceVideo | Outcome:
        if is_hidden(name):
            return refuse(name, DataError("HIDDEN", "hidden by its name, which begins with a dot"))
        if name not in videos:
            return refuse(name, DataError("NOT_A_VIDEO", _describe_other(name)))
        if f"{name}.aria2" in there:
            return refuse(name, DataError("INCOMPLETE", f"its download has not ended ({PurePosixPath(name).name}.aria2)"))
        beside = [sidecar for sidecar in _sidecars(name) if sidecar in there]
        return describe_video(storage.join(folder, name), name, config, sidecars=beside)

    opened = storage.in_parallel(lambda name: opens_as_video(storage.join(folder, name)), odd)
    found = {name for name, is_one in zip(odd, opened, strict=True) if is_one}
    videos |= found
    sidecars |= {sidecar for name in found for sidecar in _sidecars(name)}
    yield from storage.in_parallel(make, [name for name in names if name in videos or name not in sidecars])


def iter_pattern(pattern: str, config: InputConfig) -> Iterator[SourceVideo | Outcome]:
    """Every local file that a shell pattern (``*``, ``?``, ``[...]``, ``**``) names, called by its path below the fixed part.

    Sidecars of videos are no videos; a folder that matches, and below which nothing does, is an outcome.

    Raises:
        ConfigError: no valid pattern.
    """
    folder, rest = split_pattern(pattern)
    try:
        found = sorted(folder.glob(rest))
    except ValueError as error:
        raise ConfigError(f"--input {pattern}: {error}; '**' stands alone between slashes, as in 'videos/**/*.mp4'.") from error
    if "**" in rest:  # which follows no links
        found = sorted({*found, *(path for path in folder.rglob("*") if path.is_symlink() and path.is_dir())})
    files = [path for path in found if not path.is_dir()]
    entered = {parent for path in files for parent in path.parents}
    for path in found:
        name = path.relative_to(folder).as_posix()
        if path in entered or (path.suffix in _SIDECAR_SUFFIXES and _describes_video(path)):
            continue
        if is_hidden(name):
            yield refuse(name, DataError("HIDDEN", "hidden by its name, which begins with a dot"))
        elif path.is_dir():
            yield refuse(name, DataError("NOT_A_VIDEO", "a folder that this pattern does not go into; give it as --input"))
        elif run := find_run(path, folder):
            yield refuse(name, DataError("OWN_OUTPUT", f"lies in {run}, the output folder of a run"))
        elif not is_video(name) and not opens_as_video(str(path)):
            yield refuse(name, DataError("NOT_A_VIDEO", _describe_other(name)))
        else:
            yield describe_video(str(path), name, config, sidecars=find_sidecars(str(path)))


def is_hidden(name: str) -> bool:
    """Whether a file's own name begins with a dot."""
    return PurePosixPath(name).name.startswith(".")


def describe_video(path: str, name: str, config: InputConfig, *, sidecars: Sequence[str]) -> SourceVideo | Outcome:
    """The source of one video, described by the sidecars of these names (beside the video)."""
    try:
        storage.resolve(path)
        said: dict[str, Any] = {}
        for sidecar in sidecars:  # the JSON first
            if not read_caption(said)[1]:
                said |= _read_sidecar(storage.join(storage.parent(path), PurePosixPath(sidecar).name))
        return make_source(path, name, said, config)
    except DataError as error:
        return refuse(name, error)


def find_sidecars(path: str) -> list[str]:
    """The sidecars that lie beside a video, looked for one by one."""
    return [sidecar for sidecar in _sidecars(path) if is_there(sidecar)]


def _sidecars(name: str) -> tuple[str, str]:
    stem = name[: len(name) - len(PurePosixPath(name).suffix)]
    return f"{stem}.json", f"{stem}.txt"


def _describes_video(sidecar: Path) -> bool:
    return any(is_video(beside.name) for beside in sidecar.parent.glob(f"{glob.escape(sidecar.stem)}.*"))


def _describe_other(name: str) -> str:
    suffix = PurePosixPath(name).suffix.lower()
    if suffix in _UNFINISHED_SUFFIXES:
        return "a download that has not ended"
    if suffix in TABLE_SUFFIXES:
        return "a table; give it as --input to use the videos and captions that it names"
    return "neither a video's suffix nor pictures that can be decoded"


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
