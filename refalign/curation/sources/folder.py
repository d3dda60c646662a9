"""A folder of videos, or a pattern, local or remote, with sidecars.

A file is a video by its suffix. One with another suffix is a video if its pictures can be decoded (local files only).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import compress
from pathlib import Path, PurePosixPath

from refalign.config import CurationConfig
from refalign.curation.sources.listing import find_run, split_pattern
from refalign.curation.sources.rows import SourceRow, name_sidecars
from refalign.errors import ConfigError, DataError
from refalign.io import storage
from refalign.io.video import iter_frames

VIDEO_SUFFIXES = frozenset(
    (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".ogv", ".3gp")
    + (".mts", ".m2ts", ".m2t", ".vob", ".mxf", ".divx", ".f4v", ".asf", ".ogm", ".3g2", ".mpe", ".m2v")
)
"""A file with one of these suffixes that cannot be opened is a fault; other files are only not videos."""
TABLE_SUFFIXES = (".parquet", ".csv", ".jsonl", ".ndjson")
_UNFINISHED_SUFFIXES = (".part", ".partial", ".crdownload", ".download", ".tmp", ".aria2", ".!qb", ".!ut")


def is_video(name: str) -> bool:
    """Whether the name has a video's suffix."""
    return PurePosixPath(name).suffix.lower() in VIDEO_SUFFIXES


def is_hidden(name: str) -> bool:
    """Whether a file's own name begins with a dot."""
    return PurePosixPath(name).name.startswith(".")


def opens_as_video(location: str) -> bool:
    """Whether a local file without a video's suffix has pictures that can be decoded, and is no unfinished download."""
    suffix = PurePosixPath(location).suffix.lower()
    if storage.is_remote(location) or suffix in (".json", ".txt", *TABLE_SUFFIXES, *_UNFINISHED_SUFFIXES):
        return False
    try:
        if storage.kind_of(storage.resolve(location)) != "file":
            return False
        return next(iter_frames(Path(location), CurationConfig()), None) is not None
    except Exception:  # a decoder may raise anything on a file that is no video
        return False


def iter_files(
    names: Sequence[str], folder: str, beside: Collection[str], faults: Mapping[str, DataError] | None = None
) -> Iterator[SourceRow]:
    """A row for each name below a folder that is no sidecar of a video.

    Args:
        beside: what lies there: these names, and others that may be sidecars or tell of unfinished downloads.
        faults: of names that are no files to be used.
    """
    faults = faults or {}
    videos = {name for name in beside if is_video(name) and not is_hidden(name)}
    sidecars = {sidecar for name in videos for sidecar in name_sidecars(name)}
    known = {*videos, *sidecars, *faults}
    odd = [name for name in names if not is_hidden(name) and name not in known]
    found = set(compress(odd, storage.in_parallel(lambda name: opens_as_video(storage.join(folder, name)), odd)))
    videos |= found
    sidecars |= {sidecar for name in found for sidecar in name_sidecars(name)}
    for name in names:
        fault = None
        if is_hidden(name):
            fault = DataError("HIDDEN", "hidden by its name, which begins with a dot")
        elif name in faults:
            fault = faults[name]
        elif name not in videos:
            if name in sidecars:
                continue
            fault = DataError("NOT_A_VIDEO", _describe_other(name))
        elif f"{name}.aria2" in beside:
            fault = DataError("INCOMPLETE", f"its download has not ended ({PurePosixPath(name).name}.aria2)")
        own = tuple(storage.join(folder, sidecar) for sidecar in name_sidecars(name) if sidecar in beside)
        yield SourceRow(name, storage.join(folder, name), sidecars=own, fault=fault)


def iter_pattern(pattern: str) -> Iterator[SourceRow]:
    """Every local file that a shell pattern (``*``, ``?``, ``[...]``, ``**``) names, called by its path below the fixed part.

    A folder that matches, and below which nothing does, is refused.

    Raises:
        ConfigError: no valid pattern.
    """
    folder, rest = split_pattern(pattern)
    try:
        found = set(folder.glob(rest))
    except ValueError as error:
        raise ConfigError(f"--input {pattern}: {error}; '**' stands alone between slashes, as in 'videos/**/*.mp4'.") from error
    if "**" in rest:  # which follows no links
        found |= {path for path in folder.rglob("*") if path.is_symlink() and path.is_dir()}
    files = {path for path in found if not path.is_dir()}
    found -= {parent for path in files for parent in path.parents}
    faults: dict[str, DataError] = {}
    for path in found:
        if path not in files:
            fault = DataError("NOT_A_VIDEO", "a folder that this pattern does not go into; give it as --input")
            faults[path.relative_to(folder).as_posix()] = fault
        elif run := find_run(path, folder):
            fault = DataError("OWN_OUTPUT", f"lies in {run}, the output folder of a run")
            faults[path.relative_to(folder).as_posix()] = fault
    beside = {path for parent in {path.parent for path in files} for path in parent.glob("*")}
    names = [path.relative_to(folder).as_posix() for path in sorted(found)]
    yield from iter_files(names, str(folder), {path.relative_to(folder).as_posix() for path in beside}, faults)


def _describe_other(name: str) -> str:
    suffix = PurePosixPath(name).suffix.lower()
    if suffix in _UNFINISHED_SUFFIXES:
        return "a download that has not ended"
    if suffix in TABLE_SUFFIXES:
        return "a table; give it as --input to use the videos and captions that it names"
    return "neither a video's suffix nor pictures that can be decoded"
