"""Files by location: an absolute local path, or an ``s3://`` or ``gs://`` URI, which pyarrow reads.

Credentials and endpoints come from the environment alone (``AWS_ACCESS_KEY_ID``, ``AWS_ENDPOINT_URL``,
``GOOGLE_APPLICATION_CREDENTIALS`` ...): no row, log or fingerprint can hold a secret. Only remote files and tables need pyarrow.

What looks at a file raises `DataError` (MISSING, UNREADABLE, FORBIDDEN), or `BackendUnavailable` where the object store does not
answer. `refalign.io.writing` writes.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import posixpath
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, TypeVar
from urllib.parse import unquote

from refalign.errors import ArtifactError, BackendUnavailable, DataError
from refalign.io.untrusted import hide_secrets, parse_json_object

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow.fs import FileSystem

REMOTE_SCHEMES = ("s3", "gs")
_URI = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_CONNECT_TIMEOUT_S = 10
_REQUEST_TIMEOUT_S = 60
_RETRY_S = 30
_COPY_BYTES = 8 * 2**20
_SAMPLE_BYTES, _SAMPLES_BETWEEN, _SAMPLE_BETWEEN_BYTES = 1 << 20, 8, 1 << 16
_READERS = 16
"""Requests at a time: object stores answer slowly, and many at once."""

Kind = Literal["file", "folder", "missing", "other"]
Item = TypeVar("Item")
Result = TypeVar("Result")


def is_remote(location: str) -> bool:
    """Whether the location is a URI; what `resolve` returned is otherwise a local path."""
    return _URI.match(location) is not None


def resolve(location: str, base: str = "") -> str:
    """An absolute local path or a remote URI; ``base`` is the folder of a relative location.

    Raises:
        DataError: BAD_NAME (a name that UTF-8 cannot write, a zero byte) or BAD_URI (unknown scheme, credentials in it).
    """
    if not location or "\0" in location or not is_utf8(location):
        raise DataError("BAD_NAME", f"{show_name(location)!r}: not a usable name; rename the file, in UTF-8")
    if match := _URI.match(location):
        return _resolve_uri(match[1].lower(), match[2])
    if base and is_remote(base) and not location.startswith("/"):
        scheme, _, key = base.partition("://")
        return _resolve_uri(scheme, posixpath.join(key, location))
    return _absolute(Path(base, location))


def _absolute(path: Path) -> str:
    """Without ``..``, and with links left as they are: a dataset of links keeps the names its owner gave it."""
    return os.path.normpath(path.absolute())


def _resolve_uri(scheme: str, rest: str) -> str:
    authority, _, key = rest.partition("/")
    if scheme == "file":
        if authority not in ("", "localhost"):
            raise DataError("BAD_URI", f"file://{authority}/...: names another machine; give file:///absolute/path")
        return _absolute(Path(unquote(f"/{key}")))
    if scheme not in REMOTE_SCHEMES:
        raise DataError("BAD_URI", f"{scheme}://...: unknown scheme; give file://, s3://, gs:// or a local path")
    if "@" in authority:
        raise DataError("BAD_URI", f"{scheme}://...@...: give credentials in the environment (AWS_ACCESS_KEY_ID), not in a URI")
    if not authority or ".." in key.split("/"):
        raise DataError("BAD_URI", f"{scheme}://{rest}: expected {scheme}://bucket/key without '..'")
    return f"{scheme}://{authority}/{key}"


def join(folder: str, name: str) -> str:
    """The location of ``name`` in a folder; ``name`` is taken as it is."""
    return f"{folder.rstrip('/')}/{name}"


def parent(location: str) -> str:
    """The location of the folder that holds a file."""
    return location.rpartition("/")[0] or "/"


def show_name(name: str) -> str:
    """The name for a report: with escapes for what UTF-8 cannot write, and without credentials."""
    return hide_secrets(name.encode("utf-8", "backslashreplace").decode())


def is_utf8(text: str) -> bool:
    """Whether UTF-8 can write the text: broken JSON and names in other encodings hold half surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def kind_of(location: str) -> Kind:
    """What lies there; "other" is a pipe, a device, or a link that leads nowhere."""
    return _look_at(location)[0]


def size_of(location: str) -> int:
    """Bytes of a file. Raises also `DataError` NOT_A_FILE."""
    kind, size_bytes = _look_at(location)
    if kind == "missing":
        raise DataError("MISSING", f"{location}: no such file")
    if kind != "file":
        raise DataError("NOT_A_FILE", f"{location}: {'a folder' if kind == 'folder' else 'a broken link, a pipe or a device'}")
    return size_bytes


def find_size(location: str) -> int | None:
    """Bytes of a file; None where there is none."""
    kind, size_bytes = _look_at(location)
    return size_bytes if kind == "file" else None


def _look_at(location: str) -> tuple[Kind, int]:
    """Kind and bytes; the bytes mean something for a file only."""
    if is_remote(location):
        from pyarrow.fs import FileType

        with open_store(location) as (system, path):
            info = system.get_file_info(path.rstrip("/"))
        kinds: dict[FileType, Kind] = {FileType.File: "file", FileType.Directory: "folder", FileType.NotFound: "missing"}
        return kinds.get(info.type, "other"), info.size or 0
    path = Path(location)
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return "other" if path.is_symlink() else "missing", 0
    except OSError as error:
        if error.errno == errno.ELOOP:
            return "other", 0
        raise DataError("UNREADABLE", f"{location}: {error.strerror}") from error
    return "file" if stat.S_ISREG(found.st_mode) else "folder" if stat.S_ISDIR(found.st_mode) else "other", found.st_size


def digest_sampled(location: str) -> str:
    """16 hexadecimal digits from the size, the first and last MiB and samples between: at most ten reads at any size.

    The time of change is left out: it changes with every copy, and the content does not.
    """
    size_bytes = size_of(location)
    digest, between = hashlib.sha256(str(size_bytes).encode()), size_bytes - 2 * _SAMPLE_BYTES
    samples = [(0, _SAMPLE_BYTES)]
    for number in range(_SAMPLES_BETWEEN if between > 0 else 0):
        samples.append((_SAMPLE_BYTES + between * number // _SAMPLES_BETWEEN, min(between, _SAMPLE_BETWEEN_BYTES)))
    samples.append((min(size_bytes, max(_SAMPLE_BYTES, size_bytes - _SAMPLE_BYTES)), _SAMPLE_BYTES))
    with open_file(location) as file:
        for offset, count in samples:
            file.seek(offset)
            digest.update(file.read(count))
    return digest.hexdigest()[:16]


def read_bytes(location: str) -> bytes:
    """The whole content of a small file."""
    with open_file(location) as file:
        return file.read()


def load_json(location: str) -> dict[str, Any] | None:
    """The object in a small JSON file; None where there is no file. Raises `ArtifactError` where it is damaged."""
    try:
        return parse_json_object(read_bytes(location))
    except DataError as error:
        if error.reason != "MISSING":
            raise
        return None
    except ValueError as error:
        raise ArtifactError(f"{location}: damaged ({error}); delete it and run again.") from error


def read_table(location: str, columns: Sequence[str] | None = None) -> pa.Table:
    """The ``pyarrow.Table`` in a parquet file that a stage wrote.

    Args:
        columns: those to read, all of them if None; ``subjects.list.element.embedding`` names a part of a struct. Of a
            remote file only their bytes are fetched.

    Raises:
        ArtifactError: the file is damaged.
    """
    import pyarrow.parquet as pq
    from pyarrow import ArrowException

    try:
        with open_file(location) as file, pq.ParquetFile(file) as table:
            return table.read(columns=list(columns) if columns is not None else None)
    except ArrowException as error:
        text = " ".join(str(error).split())[:160]
        raise ArtifactError(f"{location}: damaged ({text}); delete it and its .json, and run again.") from error


def in_parallel(work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """``work(item)`` for every item, in order, many at a time."""
    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(work, items))


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a local file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_bytes(size: float) -> str:
    """For people: "3.2 GiB"."""
    power = min(5, int(math.log(max(size, 1), 1024)))
    return f"{size / 1024**power:.1f} {('B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB')[power]}"


def check_disk_space(folder: Path, needed_bytes: float, advice: str = "free some space, or give another --output") -> None:
    """Raises `ArtifactError`, with ``advice``, where less than ``needed_bytes`` is free where ``folder`` will be."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free, needed = shutil.disk_usage(existing).free, describe_bytes(needed_bytes)
    if free < needed_bytes:
        raise ArtifactError(f"{existing}: {describe_bytes(free)} free, about {needed} needed; {advice}.")


@contextmanager
def open_file(location: str) -> Iterator[BinaryIO]:
    """A binary, seekable file to read from; of a remote one only the ranges that are read are fetched."""
    with translated_errors(location):
        if is_remote(location):
            system, path = find_system(location)
            with system.open_input_file(path) as file:
                yield file
        else:
            with Path(location).open("rb") as file:
                yield file


def iter_files(folder: str) -> Iterator[str | DataError]:
    """Sorted names, relative to the folder, of all files below it; then a fault for each subfolder that cannot be listed.

    Links to folders are not followed, so that a loop of them ends.
    """
    if is_remote(folder):
        from pyarrow.fs import FileSelector, FileType

        with open_store(folder) as (system, path):
            root = path.rstrip("/")
            infos = system.get_file_info(FileSelector(root, recursive=True))
        yield from sorted(info.path[len(root) + 1 :] for info in infos if info.type == FileType.File)
        return
    faults: list[OSError] = []
    walk = os.walk(folder, onerror=faults.append)
    yield from sorted(Path(root, name).relative_to(folder).as_posix() for root, _, files in walk for name in files)
    for fault in faults:
        name = show_name(Path(str(fault.filename)).relative_to(folder).as_posix())
        yield DataError("UNREADABLE", f"{name}: this folder cannot be listed ({fault.strerror})")


@contextmanager
def fetch(location: str, *, max_bytes: int | None = None) -> Iterator[Path]:
    """A local path to a file's content, for a ``with`` block.

    A remote file is copied to a private temporary file, deleted when the block ends. A `DataError` of the block then names
    the location, not the copy.

    Raises:
        DataError: also TOO_LARGE (more than ``max_bytes``, unread) and IO_ERROR (shorter than announced).
        ArtifactError: the temporary folder (``TMPDIR``) has no room for the copy.
    """
    if not is_remote(location):
        yield Path(location)
        return
    size_bytes = size_of(location)
    if max_bytes is not None and size_bytes > max_bytes:
        raise DataError("TOO_LARGE", f"{location}: {size_bytes} bytes; curation.max_video_bytes is {max_bytes}")
    check_disk_space(Path(tempfile.gettempdir()), size_bytes)
    suffix = PurePosixPath(location).suffix
    with tempfile.NamedTemporaryFile(prefix="refalign-", suffix=suffix if len(suffix) < 9 else "") as copy:
        with open_file(location) as file:
            shutil.copyfileobj(file, copy, _COPY_BYTES)
        copy.flush()
        if copy.tell() != size_bytes:
            raise DataError("IO_ERROR", f"{location}: {copy.tell()} of {size_bytes} bytes arrived")
        try:
            yield Path(copy.name)
        except DataError as error:
            raise DataError(error.reason, str(error).replace(copy.name, location)) from error


def find_system(location: str) -> tuple[FileSystem, str]:
    """pyarrow's file system of a remote location, and the path in it."""
    scheme, _, path = location.partition("://")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or ""
    return _make_system(scheme, os.environ.get("AWS_ENDPOINT_URL", ""), region), path


@lru_cache(maxsize=16)
def _make_system(scheme: str, endpoint: str, region: str) -> FileSystem:
    """The file system; not by `from_uri`, which decodes percent signs in keys and has no timeouts."""
    from datetime import timedelta

    from pyarrow.fs import GcsFileSystem, S3FileSystem

    if scheme == "gs":
        return GcsFileSystem(retry_time_limit=timedelta(seconds=_RETRY_S))
    match = _URI.match(endpoint)
    return S3FileSystem(
        endpoint_override=(match[2].rstrip("/") if match else endpoint) or None,
        scheme=match[1] if match else "https",
        region=region or ("us-east-1" if endpoint else None),
        connect_timeout=_CONNECT_TIMEOUT_S,
        request_timeout=_REQUEST_TIMEOUT_S,
    )


@contextmanager
def open_store(location: str) -> Iterator[tuple[FileSystem, str]]:
    """`find_system` for a ``with`` block, with `translated_errors`."""
    with translated_errors(location):
        yield find_system(location)


@contextmanager
def translated_errors(location: str) -> Iterator[None]:
    """Turns an error of the system or an object store into DataError (this file is bad) or BackendUnavailable (try later)."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError("MISSING", f"{location}: no such file or bucket") from error
    except OSError as error:
        text = str(error).partition("\n")[0]
        if not is_remote(location):
            raise DataError("UNREADABLE", f"{location}: {error.strerror or text}") from error
        if isinstance(error, PermissionError) or any(word in text for word in ("ACCESS_DENIED", "Forbidden", "HTTP status 403")):
            raise DataError("FORBIDDEN", f"{location}: the object store refuses access; check the credentials' rights") from error
        if any(word in text for word in ("NO_SUCH_BUCKET", "NoSuchBucket", "HTTP status 404")):
            raise DataError("MISSING", f"{location}: no such bucket") from error
        raise BackendUnavailable(
            f"{location}: the object store does not answer ({text}); check AWS_ENDPOINT_URL, credentials and network, "
            "then run the same command again."
        ) from error
