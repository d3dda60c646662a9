"""Where videos come from. Whatever ``--input`` names becomes one table of `SourceVideo` rows, each with licence and consent.

| ``--input`` is | read by |
|---|---|
| a folder of videos, one video, or a pattern | `folder` |
| a list (``.txt``, ``.lst``) or a table (``.parquet``, ``.csv``, ``.jsonl``) of paths or URIs | `tables` |
| an OpenS2V annotation, or a folder with one | `opens2v` |
| a Phantom-Data table, or a folder with one | `phantom` |
| an output folder of cosmos-curate | `cosmos` |

Each may be local or an ``s3://`` or ``gs://`` URI (patterns: local only). What all formats share is in `rows`.
"""

from __future__ import annotations

import glob
import posixpath
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path, PurePosixPath

from refalign.config import InputConfig
from refalign.curation.sources.cosmos import METAS, iter_cosmos
from refalign.curation.sources.folder import (
    TABLE_SUFFIXES,
    VIDEO_SUFFIXES,
    is_hidden,
    is_video,
    iter_files,
    iter_pattern,
    opens_as_video,
)
from refalign.curation.sources.listing import check_apart, list_files
from refalign.curation.sources.opens2v import Annotation, is_opens2v, iter_opens2v, load_annotation
from refalign.curation.sources.phantom import is_phantom, iter_phantom
from refalign.curation.sources.rows import SourceRow, SourceVideo, finish_rows, identify_sources
from refalign.curation.sources.tables import LIST_SUFFIXES, iter_list, iter_table, load_column_names
from refalign.errors import ConfigError, DataError
from refalign.io import storage
from refalign.pipeline.outcomes import Outcome

__all__ = ["Annotation", "SourceVideo", "check_apart", "identify_sources", "list_sources", "open_source"]

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
        sources = finish_rows(_iter_rows(config, str(where)), config)
    except DataError as error:  # of the input itself: what it lists has outcomes
        raise ConfigError(f"--input {storage.show_name(str(where))}: {error}") from error
    if not sources:
        raise ConfigError(f"--input {where}: no file in it; give {_KNOWN}.")
    return sources


def _iter_rows(config: InputConfig, where: str) -> Iterator[SourceRow]:
    location = storage.resolve(where)
    kind = storage.kind_of(location)
    if kind == "folder":
        return _iter_folder(location, config)
    if kind == "file":
        return _iter_file(location, config)
    if kind == "missing" and glob.has_magic(location) and not storage.is_remote(location):
        return iter_pattern(location)
    raise ConfigError(f"--input {where}: {'no such file or folder' if kind == 'missing' else 'not a file'}; give {_KNOWN}.")


def _iter_folder(folder: str, config: InputConfig) -> Iterator[SourceRow]:
    """All files of a folder: what a data set's own files describe as these say, and the others as plain videos.

    A data set takes up the smallest folder that holds its descriptions and all that they name. Videos in it that they do not name
    are NOT_ANNOTATED: what they may be used for is not known.
    """
    names, refused = list_files(folder)
    yield from refused
    named, rows = _find_data_sets([name for name in names if not is_hidden(name)], folder, config)
    for row in rows:
        named.update(row.takes)
        yield row
    rest = [name for name in names if name not in named]
    parents = [PurePosixPath(name).parts[:-1] for name in named]
    area = "".join(f"{part}/" for part in posixpath.commonprefix(parents)) if parents else ""
    strange = {name for name in rest if named and is_video(name) and not is_hidden(name) and name.startswith(area)}
    for name in sorted(strange):
        message = f"the annotations and tables below {area or folder} do not name it"
        yield SourceRow(name, fault=DataError("NOT_ANNOTATED", message))
    plain = [name for name in rest if name not in strange]
    yield from iter_files(plain, folder, set(plain))


def _find_data_sets(names: list[str], folder: str, config: InputConfig) -> tuple[set[str], Iterator[SourceRow]]:
    """The files of a folder that describe data sets, and the rows that these give."""
    if any(name.startswith(METAS) for name in names):
        return set(), iter_cosmos(set(names), folder)
    rows: Iterator[SourceRow] = iter(())
    # A video's sidecar is no annotation, so that only the other JSON files are opened.
    stems = {str(PurePosixPath(name).with_suffix("")) for name in names if is_video(name)}
    others = [name for name in names if name.endswith(".json") and str(PurePosixPath(name).with_suffix("")) not in stems]
    if annotations := [name for name in others if is_opens2v(storage.join(folder, name))]:
        rows = iter_opens2v([storage.join(folder, name) for name in annotations], folder, config)
    tables = {name: load_column_names(storage.join(folder, name)) for name in names if name.endswith(".parquet")}
    if phantom := [name for name, columns in tables.items() if is_phantom(columns)]:
        files = [storage.join(folder, name) for name in phantom]
        rows = chain(rows, iter_phantom(files, tables[phantom[0]], names, folder, config))
    return {*annotations, *phantom}, rows


def _iter_file(file: str, config: InputConfig) -> Iterator[SourceRow]:
    suffix = PurePosixPath(file).suffix.lower()
    folder = storage.parent(file)
    if suffix in LIST_SUFFIXES:
        return iter_list(file)
    if suffix == ".parquet" and is_phantom(columns := load_column_names(file)):
        return iter_phantom([file], columns, list_files(folder)[0], folder, config)
    if suffix in TABLE_SUFFIXES:
        return iter_table(file)
    if suffix == ".json" and is_opens2v(file):
        return iter_opens2v([file], folder, config)
    if is_video(file) or opens_as_video(file):
        return iter([SourceRow(PurePosixPath(file).name, file, sidecars=None)])
    raise ConfigError(f"--input {file}: of no known kind; give {_KNOWN}.")


@contextmanager
def open_source(source: SourceVideo, *, max_bytes: int) -> Iterator[tuple[Annotation | None, Path]]:
    """The source's annotation, if it has one, and a local path to its video while the ``with`` block lasts.

    Raises:
        DataError: the annotation or the video cannot be read.
        BackendUnavailable: an object store does not answer.
    """
    annotation = load_annotation(source.name, source.entry) if source.entry else None
    with storage.fetch(source.path, max_bytes=max_bytes) as path:
        yield annotation, path
