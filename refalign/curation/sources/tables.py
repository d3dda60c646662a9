"""Lists and tables that name videos by path or URI.

A list (``.txt``, ``.lst``) has one location a line; empty lines are left out, and so are lines that begin with ``#``, unless a
file of that name is there. A table (``.parquet``, ``.csv``, ``.jsonl``) has them in a column ``path``, ``uri`` or ``video``, and
may say more in ``caption`` (or ``text``, ``prompt``, ``video_caption``), ``license``, ``consent``, ``source_group``. Relative
locations are taken from the file's own folder. Both are read row by row.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

from refalign.curation.sources.folder import is_video
from refalign.curation.sources.rows import CAPTION_NAMES, SourceRow, find_caption
from refalign.errors import ConfigError, DataError
from refalign.io import storage
from refalign.io.untrusted import parse_json_object
from refalign.pipeline.places import is_there

LIST_SUFFIXES = (".txt", ".lst")
_PATH_COLUMNS = ("path", "uri", "video")
_COLUMNS = (*_PATH_COLUMNS, *CAPTION_NAMES, "license", "consent", "source_group", "shots")
_BATCH_ROWS = 1024
_MAX_CELL_CHARACTERS = 2**24
"""Of a CSV; Python's own limit is below what captioners write."""

Cells = dict[str, Any]


def iter_list(file: str) -> Iterator[SourceRow]:
    """Every location of a list file; sidecars lie beside the videos."""
    folder = storage.parent(file)
    with storage.open_file(file) as stream:
        # A name that is not UTF-8 costs only its own line.
        for line in io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape"):
            entry = line.strip()
            if entry and (not entry.startswith("#") or _is_there(entry, folder)):
                yield SourceRow(entry, entry, folder, sidecars=None)
            elif is_video(entry):
                yield SourceRow(
                    entry, fault=DataError("COMMENT", "taken for a comment: it begins with #, and there is no such file")
                )


def _is_there(entry: str, folder: str) -> bool:
    try:
        return is_there(storage.resolve(entry, folder))
    except DataError:
        return False


def iter_table(file: str) -> Iterator[SourceRow]:
    """Every row of a table.

    Raises:
        ConfigError: the table is damaged or has no column of paths.
    """
    name, folder = PurePosixPath(file).name, storage.parent(file)
    iter_rows = {".parquet": iter_parquet, ".csv": _iter_csv}.get(PurePosixPath(file).suffix.lower(), _iter_jsonl)
    captions_from = {"caption"}
    for number, cells in enumerate(iter_rows(file), start=1):
        here = f"{name} row {number}"
        if isinstance(cells, DataError):
            yield SourceRow(here, fault=cells)
            continue
        entry = next((cells[column] for column in _PATH_COLUMNS if cells.get(column)), None)
        if not isinstance(entry, str):
            yield SourceRow(here, fault=DataError("BAD_ROW", _describe_no_path(cells)))
            continue
        yield SourceRow(entry, entry, folder, said=cells, blame="BAD_ROW")
        if (caption := find_caption(cells)) not in captions_from:
            captions_from.add(caption)
            print(f"{name}: captions are read from {caption!r}", flush=True)


def iter_parquet(file: str, columns: Sequence[str] | None = None) -> Iterator[Cells]:
    """Rows of a parquet file, a batch in memory at a time; without ``columns`` those that describe videos.

    Raises:
        ConfigError: the file is damaged, or has none of the columns that name videos.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with storage.open_file(file) as stream:
        try:
            table = pq.ParquetFile(stream)
            names = table.schema_arrow.names
            _check_columns(file, names, columns)
            # Other columns are not read: what Python cannot convert in them is no fault of the videos.
            for batch in table.iter_batches(_BATCH_ROWS, columns=columns or [name for name in _COLUMNS if name in names]):
                yield from batch.to_pylist()
        except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
            if isinstance(error, FileNotFoundError | PermissionError):
                raise
            raise ConfigError(f"--input {file}: this parquet file is damaged ({error}); restore it.") from error


def load_column_names(file: str) -> list[str]:
    """The columns of a parquet file; empty where it is damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with storage.open_file(file) as stream:
        try:
            return pq.ParquetFile(stream).schema_arrow.names
        except (pa.ArrowException, OSError):
            return []


def _iter_csv(file: str) -> Iterator[Cells | DataError]:
    csv.field_size_limit(_MAX_CELL_CHARACTERS)
    with storage.open_file(file) as stream:
        # Strict: otherwise the rest of the file would be one cell after a quote that is not closed.
        rows = csv.DictReader(io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""), strict=True)
        begin = 1
        try:
            names = list(rows.fieldnames or ())
            _check_columns(file, names)
            begin = rows.line_num + 1
            for row in rows:
                begin = rows.line_num + 1
                if left_over := row.pop(None, None):
                    count = len(names) + len(left_over)
                    yield DataError("BAD_ROW", f"{count} cells, expected {len(names)}; put quotes around a cell with a comma")
                else:
                    yield {key: value or None for key, value in row.items() if key}
        except UnicodeDecodeError as error:
            raise ConfigError(f"--input {file}: no CSV in UTF-8 after line {rows.line_num} ({error}); restore it.") from error
        except csv.Error as error:
            raise ConfigError(
                f"--input {file}: the row that begins in line {begin} is no CSV ({error}); look for a quote in it that is not "
                "closed, or not doubled."
            ) from error


def _iter_jsonl(file: str) -> Iterator[Cells | DataError]:
    with storage.open_file(file) as stream:
        for line in filter(str.strip, io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape")):
            try:
                yield parse_json_object(line)
            except ValueError as error:
                yield DataError("BAD_ROW", f"no JSON object: {error}")


def _check_columns(file: str, names: Sequence[str], wanted: Sequence[str] | None = None) -> None:
    """Refuses a table without any column of paths, where none are ``wanted`` by name, and one with a name twice."""
    if wanted is None and not set(_PATH_COLUMNS) & set(names):
        raise ConfigError(
            f"--input {file}: its columns are {', '.join(names) or 'none'}; expected one of {', '.join(_PATH_COLUMNS)} "
            "that holds paths or URIs of videos."
        )
    if doubled := [name for name in wanted or _COLUMNS if names.count(name) > 1]:
        raise ConfigError(f"--input {file}: column {doubled[0]!r} occurs twice; rename one.")


def _describe_no_path(cells: Cells) -> str:
    there = [column for column in _PATH_COLUMNS if column in cells]
    return f"{there[0]} is {cells[there[0]]!r}, expected a path or URI" if there else f"has none of {', '.join(_PATH_COLUMNS)}"
