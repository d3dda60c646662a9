"""Where videos come from. Whatever ``--input`` names, the same `SourceVideo` rows come out, each with licence and consent.

| ``--input`` is | read by |
|---|---|
| a folder of videos, one video, or a pattern | `folder` |
| a list (``.txt``, ``.lst``) or a table (``.parquet``, ``.csv``, ``.jsonl``) of paths or URIs | `tables` |
| an OpenS2V annotation, or a folder with one | `opens2v` |
| a Phantom-Data table, or a folder with one | `phantom` |
| an output folder of cosmos-curate | `cosmos` |

Each may be local or an ``s3://`` or ``gs://`` URI (patterns: local only).
"""

from __future__ import annotations

import glob
import posixpath
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath

from refalign.config import InputConfig
from refalign.curation.sources.cosmos import METAS, iter_cosmos
from refalign.curation.sources.folder import (
    TABLE_SUFFIXES,
    VIDEO_SUFFIXES,
    describe_video,
    find_sidecars,
    is_hidden,
    is_video,
    iter_folder,
    iter_pattern,
    opens_as_video,
)
from refalign.curation.sources.identity import identify_sources
from refalign.curation.sources.listing import check_apart, list_files
from refalign.curation.sources.opens2v import is_opens2v, iter_opens2v, load_annotation
from refalign.curation.sources.phantom import is_phantom, iter_phantom
from refalign.curation.sources.source_video import SourceVideo, refuse
from refalign.curation.sources.tables import LIST_SUFFIXES, iter_list, iter_table, load_column_names
from refalign.errors import ConfigError, DataError
from refalign.io import storage
from refalign.pipeline.outcomes import Outcome

__all__ = ["SourceVideo", "check_apart", "identify_sources", "list_sources", "open_source"]

_KNOWN = (
    f"a folder, a video ({', '.join(sorted(VIDEO_SUFFIXES))}), a pattern such as 'videos/**/*.mp4', a list "
    f"({', '.join(LIST_SUFFIXES)}), a table ({', '.join(TABLE_SUFFIXES)}), an OpenS2V .json, or s3://bucket/prefix/"
)


def list_sources(config: InputConfig, where: str | Path) -> list[SourceVideo | Outcome]:
    """Everything that the input names, in a stable order; what cannot be used stands as an outcome in its place.

    Raises:
        ConfigError: the input is missing, empty, damaged, or of no known kind.
        BackendUnavailable: an object store does not answer.
    """
    try:
        location = storage.resolve(str(where))
        kind = storage.kind_of(location)
    except DataError as error:
        raise ConfigError(f"--input {storage.show_name(str(where))}: {error}") from error
    try:
        if kind == "missing" and glob.has_magic(location) and not storage.is_remote(location):
            sources = list(iter_pattern(location, config))
        elif kind == "folder":
            sources = list(_iter_folder(location, config))
        elif kind == "file":
            sources = list(_iter_file(location, config))
        else:
            raise ConfigError(
                f"--input {where}: {'no such file or folder' if kind == 'missing' else 'not a file'}; give {_KNOWN}."
            )
    except DataError as error:  # of the input itself: what it lists has outcomes
        raise ConfigError(f"--input {where}: {error}") from error
    if not sources:
        raise ConfigError(f"--input {where}: no file in it; give {_KNOWN}.")
    return sources


def _iter_folder(folder: str, config: InputConfig) -> Iterator[SourceVideo | Outcome]:
    """All files of a folder: what a data set's own files describe as these say, and the others as plain videos.

    A data set takes up the smallest folder that holds its descriptions and all that they name. Videos in it that they do not name
    are NOT_ANNOTATED: what they may be used for is not known.
    """
    names, refused = list_files(folder)
    yield from refused
    named: set[str] = set()
    yield from _iter_described([name for name in names if not is_hidden(name)], folder, config, named)
    rest = [name for name in names if name not in named]
    area = _find_common(named)
    strange = {name for name in rest if named and is_video(name) and not is_hidden(name) and f"{name}/".startswith(area)}
    for name in sorted(strange):
        yield refuse(name, DataError("NOT_ANNOTATED", f"the annotations and tables below {area or folder} do not name it"))
    yield from iter_folder([name for name in rest if name not in strange], folder, config)


def _iter_described(names: list[str], folder: str, config: InputConfig, named: set[str]) -> Iterator[SourceVideo | Outcome]:
    """What descriptions of data sets name; their own names and those of their videos go into ``named``."""
    if any(name.startswith(METAS) for name in names):
        yield from iter_cosmos(set(names), folder, config, named)
        return
    # A video's sidecar is no annotation, so that only the other JSON files are opened.
    stems = {str(PurePosixPath(name).with_suffix("")) for name in names if is_video(name)}
    others = [name for name in names if name.endswith(".json") and str(PurePosixPath(name).with_suffix("")) not in stems]
    if annotations := [name for name in others if is_opens2v(storage.join(folder, name))]:
        found: set[str] = set()
        yield from iter_opens2v([storage.join(folder, name) for name in annotations], folder, config, found)
        named |= {*annotations, *(path.removeprefix(f"{folder.rstrip('/')}/") for path in found)}
    tables = {name: load_column_names(storage.join(folder, name)) for name in names if name.endswith(".parquet")}
    if phantom := [name for name, columns in tables.items() if is_phantom(columns)]:
        named.update(phantom)
        files = [storage.join(folder, name) for name in phantom]
        yield from iter_phantom(files, folder, tables[phantom[0]], config, named)


def _find_common(names: Iterable[str]) -> str:
    """The folder below which all names lie, with a slash at its end; empty for the input folder."""
    parents = [PurePosixPath(name).parts[:-1] for name in names]
    common = posixpath.commonprefix(parents) if parents else ()
    return "".join(f"{part}/" for part in common)


def _iter_file(file: str, config: InputConfig) -> Iterable[SourceVideo | Outcome]:
    suffix = PurePosixPath(file).suffix.lower()
    folder = storage.parent(file)
    if is_video(file):
        return [describe_video(file, PurePosixPath(file).name, config, sidecars=find_sidecars(file))]
    if suffix in LIST_SUFFIXES:
        return iter_list(file, config)
    if suffix == ".parquet" and is_phantom(columns := load_column_names(file)):
        return iter_phantom([file], folder, columns, config, set())
    if suffix in TABLE_SUFFIXES:
        return iter_table(file, config)
    if suffix == ".json" and is_opens2v(file):
        return iter_opens2v([file], folder, config)
    if opens_as_video(file):
        return [describe_video(file, PurePosixPath(file).name, config, sidecars=find_sidecars(file))]
    raise ConfigError(f"--input {file}: of no known kind; give {_KNOWN}.")


@contextmanager
def open_source(source: SourceVideo, *, max_bytes: int) -> Iterator[tuple[SourceVideo, Path]]:
    """The source with its annotation read, and a local path to its video while the ``with`` block lasts.

    Raises:
        DataError: the annotation or the video cannot be read.
        BackendUnavailable: an object store does not answer.
    """
    if source.annotation_at:
        source = replace(source, annotation=load_annotation(source.name, source.annotation_at))
    with storage.fetch(source.path, max_bytes=max_bytes) as path:
        yield source, path
