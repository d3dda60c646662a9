"""Files by location, written in one step: a reader finds the old content, nothing, or the whole new one.

Errors are those of `refalign.io.storage`.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from refalign.errors import ConfigError, DataError
from refalign.io.storage import is_remote, join, kind_of, open_store

_COPY_BYTES = 8 * 2**20


@contextmanager
def open_aside(location: str) -> Iterator[Path]:
    """A local path to write to; when the block ends well, its content becomes the file at ``location`` in one step.

    On a disk it is synced and renamed; an object appears when its upload is complete. When the block fails, the old file stays.
    """
    if is_remote(location):
        with tempfile.NamedTemporaryFile(prefix="refalign-", suffix=".part") as file:
            yield Path(file.name)
            with (
                open_store(location) as (system, path),
                Path(file.name).open("rb") as source,
                system.open_output_stream(path) as target,
            ):
                shutil.copyfileobj(source, target, _COPY_BYTES)
        return
    final = Path(location)
    final.parent.mkdir(parents=True, exist_ok=True)
    aside = final.with_name(f".{final.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    try:
        yield aside
        _sync(aside)
        aside.replace(final)
        _sync(final.parent)
    finally:
        aside.unlink(missing_ok=True)


def write_bytes(location: str | Path, data: bytes) -> None:
    """Writes a small file."""
    with open_aside(str(location)) as aside:
        aside.write_bytes(data)


def write_json(location: str | Path, value: object) -> None:
    """Writes ``value`` as JSON, sorted by key."""
    write_bytes(location, (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode())


def delete_file(location: str) -> None:
    """Deletes a file, if it is there."""
    if is_remote(location):
        _delete(location, "delete_file")
    else:
        Path(location).unlink(missing_ok=True)


def delete_folder(location: str) -> None:
    """Deletes a folder with all that is in it, if it is there."""
    if is_remote(location):
        _delete(location, "delete_dir")
    else:
        shutil.rmtree(location, ignore_errors=True)


def _delete(location: str, method: Literal["delete_file", "delete_dir"]) -> None:
    try:
        with open_store(location) as (system, path):
            getattr(system, method)(path)
    except DataError as error:
        if error.reason != "MISSING":
            raise


def check_store(location: str) -> None:
    """Raises `ConfigError` where an object store has no such bucket, or refuses to write there."""
    probe = join(location, ".writable")
    try:
        if kind_of("/".join(location.split("/")[:3])) != "folder":
            raise DataError("MISSING", f"{location}: no such bucket")
        write_bytes(probe, b"")
        delete_file(probe)
    except DataError as error:
        raise ConfigError(f"storage.parts={location}: nothing can be written there ({error}); create the bucket.") from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
