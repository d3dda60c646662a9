"""Lists and tables that name videos by path or URI.

A list (``.txt``, ``.lst``) has one location a line; empty lines are left out, and so are lines that begin with ``#``, unless a
file of that name is there. A table (``.parquet``, ``.csv``, ``.jsonl``) has them in a column ``path``, ``uri`` or ``video``, and
may say more in ``caption`` (or ``text``, ``prompt``, ``video_caption``), ``license``, ``consent``, ``source_group``. Relative
locations are taken from the file's own folder. Both are read row by row.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

from refalign.config import InputConfig
from refalign.curation.sources.folder import describe_video, find_sidecars, is_video
from refalign.curation.sources.source_video import CAPTION_NAMES, SourceVideo, make_source, read_caption, refuse
from refalign.errors import ConfigError, DataError
from refalign.io import storage
from refalign.io.untrusted import parse_json
from refalign.pipeline.outcomes import Outcome
from refalign.pipeline.places import is_there

LIST_SUFFIXES = (".txt", ".lst")
_PATH_COLUMNS = ("path", "uri", "video")
_SAID_COLUMNS = (*CAPTION_NAMES, "license", "consent", "source_group", "shots")
_BATCH_ROWS = 1024
_MAX_CELL_CHARACTERS = 2**24
"""Of a CSV; Python's own limit is below what captioners write."""


def iter_list(file: str, config: InputConfig) -> Iterator[SourceVideo | Outcome]:
    """Every location of a list file, with the sidecar that lies beside it."""
    folder = storage.parent(file)
    with storage.open_file(file) as stream:
        # Names that are not UTF-8 must cost their own line only.
        for line in io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape"):
            entry = line.strip()
            if not entry:
                continue
            try:
                path = storage.resolve(entry, folder)
                if not entry.startswith("#") or is_there(path):
                    yield describe_video(path, entry, config, sidecars=find_sidecars(path))
                elif is_video(entry):
                    yield refuse(entry, DataError("COMMENT", "a comment, for it begins with #, and no file is called so"))
            except DataError as error:
                if not entry.startswith("#"):
                    yield refuse(entry, error)


def iter_table(file: str, config: InputConfig) -> Iterator[SourceVideo | Outcome]:
    """Every row of a table.

    Raises:
        ConfigError: the table is damaged or has no column of paths.
    """
    folder = storage.parent(file)
    suffix = PurePosixPath(file).suffix.lower()
    iter_rows = {".parquet": iter_parquet, ".csv": _iter_csv}.get(suffix, _iter_jsonl)
    captions_from = {"", "caption"}
    for number, row in enumerate(iter_rows(file), start=1):
        here = f"{PurePosixPath(file).name} row {number}"
        if isinstance(row, DataError):
            yield refuse(here, row)
            continue
        entry = next((row[column] for column in _PATH_COLUMNS if row.get(column)), None)
        try:
            if not isinstance(entry, str):
                raise DataError("BAD_ROW", f"{here}: {_describe_no_path(row)}")
            yield make_source(storage.resolve(entry, folder), entry, row, config)
            if (name := read_caption(row)[0]) not in captions_from:
                captions_from.add(name)
                print(f"{PurePosixPath(file).name}: captions are read from {name!r}", flush=True)
        except DataError as error:
            fault = DataError("BAD_ROW", str(error)) if error.reason == "BAD_SIDECAR" else error
            yield refuse(entry if isinstance(entry, str) else here, fault)


def iter_parquet(file: str, columns: Iterable[str] | None = None) -> Iterator[dict[str, Any]]:
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
            if columns is None:
                _check_columns(file, names)
                columns = [name for name in (*_PATH_COLUMNS, *_SAID_COLUMNS) if name in names]
            _check_doubled(file, names, columns)
            # Other columns stay unread: a date of the year 300,000 is no fault of the videos.
            for batch in table.iter_batches(_BATCH_ROWS, columns=list(columns)):
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


def _iter_csv(file: str) -> Iterator[dict[str, Any] | DataError]:
    csv.field_size_limit(_MAX_CELL_CHARACTERS)
    with storage.open_file(file) as stream:
        # Strict: a quote that never closes would otherwise make one cell of the rest of the file.
        rows = csv.DictReader(io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""), strict=True)
        begin = 1
        try:
            names = rows.fieldnames or []
            _check_columns(file, names)
            _check_doubled(file, names, (*_PATH_COLUMNS, *_SAID_COLUMNS))
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


def _iter_jsonl(file: str) -> Iterator[dict[str, Any] | DataError]:
    with storage.open_file(file) as stream:
        for line in io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape"):
            if not line.strip():
                continue
            try:
                row = parse_json(line)
            except ValueError as error:
                yield DataError("BAD_ROW", f"not JSON: {error}")
                continue
            yield row if isinstance(row, dict) else DataError("BAD_ROW", f"a {type(row).__name__}, expected an object")


def _check_doubled(file: str, names: Sequence[str], wanted: Iterable[str]) -> None:
    if doubled := [name for name in wanted if list(names).count(name) > 1]:
        raise ConfigError(f"--input {file}: column {doubled[0]!r} occurs twice; rename one.")


def _check_columns(file: str, names: Iterable[str]) -> None:
    if not set(_PATH_COLUMNS) & set(names):
        raise ConfigError(
            f"--input {file}: its columns are {', '.join(names) or 'none'}; expected one of {', '.join(_PATH_COLUMNS)} "
            "that holds paths or URIs of videos."
        )


def _describe_no_path(row: dict[str, Any]) -> str:
    there = [column for column in _PATH_COLUMNS if column in row]
    return f"{there[0]} is {row[there[0]]!r}, expected a path or URI" if there else f"has none of {', '.join(_PATH_COLUMNS)}"
