"""Whether a fault belongs to a file or to the place that it lies in. Places come back: their faults are tried again."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from pathlib import Path

from refalign.errors import BackendUnavailable, DataError
from refalign.io import storage
from refalign.pipeline.outcomes import belongs_to_place

_UNREACHABLE = frozenset(
    {errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH}
    | {errno.ENETDOWN, errno.ENETUNREACH, errno.ENODEV, errno.ENXIO}
)
_OF_DECODING = frozenset(
    {"UNREADABLE", "TRUNCATED", "NO_FRAMES", "NO_VIDEO", "BAD_TIMES", "TOO_SHORT", "EMPTY_FILE", "TOO_LARGE", "NOT_A_FILE"}
)
"""Reasons that a file which vanishes or changes under its reader may give as well."""


def judge_fault(error: DataError, location: str, video_id: str) -> DataError:
    """The error itself if it is the file's own, otherwise one that names the fault of its place.

    Those are MISSING, FORBIDDEN, UNREACHABLE (a mount or a share that does not answer), IO_ERROR, and CHANGED (the content is
    not the one of ``video_id``, which was planned).

    Raises:
        BackendUnavailable: an object store does not answer.
    """
    if error.reason not in _OF_DECODING:
        return error
    numbers = _list_error_numbers(error)
    if numbers & _UNREACHABLE:
        return DataError("UNREACHABLE", str(error))
    if errno.EACCES in numbers:
        return DataError("FORBIDDEN", str(error))
    try:
        if storage.digest_sampled(location) != video_id:
            return DataError("CHANGED", f"{location}: has changed since the run was planned; run the command again")
    except DataError as lost:
        return lost if belongs_to_place(lost.reason) else DataError("IO_ERROR", str(lost))
    return DataError("IO_ERROR", str(error)) if errno.EIO in numbers else error


def _list_error_numbers(error: BaseException | None) -> set[int]:
    numbers: set[int] = set()
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            numbers.add(error.errno)
        error = error.__cause__
    return numbers


def check_place(where: str | Path | None, locations: Sequence[str]) -> None:
    """Stops a run whose input is gone as a whole, before faults of all its files are stored.

    Args:
        where: the input. A folder is gone if it is missing or empty, as an unmounted one is.
        locations: of videos of the input. If it is no folder, it is gone if all of them are missing.

    Raises:
        BackendUnavailable: the input is gone, or an object store does not answer.
    """
    if _is_gone(str(where or ""), locations):
        raise BackendUnavailable(
            f"--input {where or 'of the drawn world'}: gone since this run was planned (for example {locations[0]}); bring it "
            "back and run the same command again. Nothing was stored of what was being read."
        )


def _is_gone(where: str, locations: Sequence[str]) -> bool:
    try:
        folder = storage.resolve(where) if where else ""
        kind = storage.kind_of(folder) if where else "other"
        if kind == "folder":
            return not storage.is_remote(folder) and not any(Path(folder).iterdir())
    except (DataError, OSError):
        return True
    if kind == "missing" and not set("*?[") & set(where):
        return True
    return bool(locations) and not any(is_there(location) for location in locations)


def is_there(location: str) -> bool:
    """Whether there is a file. Raises `BackendUnavailable` if an object store does not answer."""
    try:
        return storage.kind_of(location) == "file"
    except DataError:
        return False


def changed_at(location: str) -> int | None:
    """Time of the file's last change in ns since 1970; None if it cannot be told."""
    try:
        if not storage.is_remote(location):
            return Path(location).stat().st_mtime_ns
        system, path = storage.find_system(location)
        with storage.translated_errors(location):
            return system.get_file_info(path).mtime_ns
    except (OSError, DataError):
        return None
