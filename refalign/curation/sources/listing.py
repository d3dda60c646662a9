"""What lies below an input folder: every file once, links to folders followed, and output folders of runs told from inputs."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from refalign.curation.sources.source_video import refuse
from refalign.errors import ConfigError, DataError
from refalign.io import storage
from refalign.pipeline.outcomes import Outcome

_STEP_FOLDER = re.compile(r"(world|subjects|pairs|shards|train|evaluate|register)-[0-9a-f]{12}")
_STEP_FILES = ("lease", "manifest.json", "store")


def list_files(folder: str) -> tuple[list[str], list[Outcome]]:
    """Sorted names of all files below a folder, relative to it, and an outcome for each folder that is not listed.

    A link to a folder is followed, once: a folder that is listed already is a DUPLICATE, and one that holds the input is not
    followed. The folders of earlier runs are left out as OWN_OUTPUT.

    Raises:
        DataError: the folder itself cannot be listed.
        ConfigError: the folder is the output folder of a run.
        BackendUnavailable: the object store does not answer.
    """
    if storage.is_remote(folder):
        names, outcomes = [name for name in storage.iter_files(folder) if isinstance(name, str)], []
    else:
        names, outcomes = _walk(folder)
    kept, left_out = _leave_runs(names, folder)
    return kept, [*outcomes, *left_out]


def _walk(folder: str) -> tuple[list[str], list[Outcome]]:
    names: list[str] = []
    outcomes: list[Outcome] = []
    root = os.path.realpath(folder)
    seen: dict[str, str] = {}
    folders, links = [""], []
    while folders or links:
        # Links wait until all real folders are known, so that of two names for a folder the real one is kept.
        name = folders.pop() if folders else links.pop(0)
        there = os.path.realpath(Path(folder, name))
        try:
            if there in seen:
                raise DataError("DUPLICATE", f"{name}: leads to a folder that is listed as {seen[there] or '.'}")
            if name and Path(root).is_relative_to(there):
                raise DataError("NOT_A_FILE", f"{name}: leads to a folder that holds the input, and is not followed")
            seen[there] = name
            for entry in _scan(Path(folder, name)):
                inside = f"{name}/{entry.name}" if name else entry.name
                kind = names if not _is_folder(entry) else links if entry.is_symlink() else folders
                kind.append(inside)
        except OSError as error:
            if not name:
                raise DataError("UNREADABLE", f"this folder cannot be listed ({error.strerror})") from error
            outcomes.append(refuse(name, DataError("UNREADABLE", f"{name}: this folder cannot be listed ({error.strerror})")))
        except DataError as error:
            outcomes.append(refuse(name, error))
        links.sort()
    return sorted(names), sorted(outcomes, key=lambda outcome: outcome.item)


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return list(entries)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a loop of links
        return False


def _leave_runs(names: list[str], folder: str) -> tuple[list[str], list[Outcome]]:
    """The names without those in output folders of runs, and an outcome for each such folder."""
    runs = {str(PurePosixPath(name).parents[1]) for name in names if _is_of_step(name)}
    if "." in runs:
        raise ConfigError(f"--input {folder}: the output folder of a run; give the folder of the videos that it was made of.")
    count = dict.fromkeys(sorted(runs), 0)
    kept = []
    for name in names:
        run = next((str(parent) for parent in PurePosixPath(name).parents if str(parent) in runs), None) if runs else None
        if run is None:
            kept.append(name)
        else:
            count[run] += 1
    return kept, [
        refuse(run, DataError("OWN_OUTPUT", f"{run}: the output folder of a run, with {number} files; left out"))
        for run, number in count.items()
    ]


def _is_of_step(name: str) -> bool:
    path = PurePosixPath(name)
    return path.name in _STEP_FILES and _STEP_FOLDER.fullmatch(path.parent.name) is not None


def find_run(path: Path, top: Path) -> Path | None:
    """The output folder of a run that a local file lies in, below ``top``."""
    for folder in path.parents:
        if not folder.is_relative_to(top):
            break
        if any(_STEP_FOLDER.fullmatch(each.name) and (each / "lease").exists() for each in folder.glob("*-" + "?" * 12)):
            return folder
    return None


def check_apart(where: str, outputs: Iterable[str | Path | None]) -> None:
    """Refuses an output inside the input, which every later run would take for more videos.

    Args:
        where: what ``--input`` names.
        outputs: the output folder, and the location of parts where there is one.

    Raises:
        ConfigError: one of them lies in the input folder, or below the fixed part of a pattern with ``**``.
    """
    try:
        folder = storage.resolve(where)
        kind = storage.kind_of(folder)
    except DataError:  # said where it is listed
        return
    if kind == "missing" and glob.has_magic(folder) and "**" in Path(folder).parts:
        folder = folder.partition("/**")[0]
        folder = folder if not glob.has_magic(folder) else str(split_pattern(folder)[0])
    elif kind != "folder":
        return
    for output in filter(None, outputs):
        inside, outside = _real(str(output)), _real(folder)
        if f"{inside}/".startswith(f"{outside}/"):
            raise ConfigError(
                f"--output {output} lies in --input {where}: every later run would read what this one wrote; "
                "give an output outside of it."
            )


def split_pattern(pattern: str) -> tuple[Path, str]:
    """The folder before the first part with a wildcard, and the rest."""
    parts = Path(pattern).parts
    fixed = next(position for position, part in enumerate(parts) if glob.has_magic(part))
    return Path(*parts[:fixed]), "/".join(parts[fixed:])


def _real(location: str) -> str:
    return location.rstrip("/") if storage.is_remote(location) else os.path.realpath(location).rstrip("/")
