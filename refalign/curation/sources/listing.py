"""What lies below an input folder: every file once, links to folders followed, and output folders of runs told from inputs."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from refalign.curation.sources.rows import SourceRow
from refalign.errors import ConfigError, DataError
from refalign.io import storage

_STEP_FOLDER = re.compile(r"(world|subjects|pairs|shards|train|evaluate|register)-[0-9a-f]{12}")
_STEP_FILES = ("lease", "manifest.json", "store")


def list_files(folder: str) -> tuple[list[str], list[SourceRow]]:
    """Sorted names of all files below a folder, relative to it, and a fault for each folder that is not listed.

    A link to a folder is followed, once: a folder that is listed already is a DUPLICATE, and one that holds the input is not
    followed. The folders of earlier runs are left out as OWN_OUTPUT.

    Raises:
        DataError: the folder itself cannot be listed.
        ConfigError: the folder is the output folder of a run.
        BackendUnavailable: the object store does not answer.
    """
    faults: dict[str, DataError] = {}
    if storage.is_remote(folder):
        names = [name for name in storage.iter_files(folder) if isinstance(name, str)]
    else:
        names, faults = _walk(folder)
    runs = {str(PurePosixPath(name).parents[1]) for name in names if _is_of_step(name)}
    if "." in runs:
        raise ConfigError(f"--input {folder}: the output folder of a run; give the folder of the videos that it was made of.")
    run_of = {name: run for name in names for run in map(str, PurePosixPath(name).parents) if run in runs} if runs else {}
    rows = [SourceRow(name, fault=fault) for name, fault in sorted(faults.items())]
    for run, count in sorted(Counter(run_of.values()).items()):
        rows.append(SourceRow(run, fault=DataError("OWN_OUTPUT", f"the output folder of a run, with {count} files; left out")))
    return [name for name in names if name not in run_of], rows


def _walk(folder: str) -> tuple[list[str], dict[str, DataError]]:
    names: list[str] = []
    faults: dict[str, DataError] = {}
    root = os.path.realpath(folder)
    seen: dict[str, str] = {}
    folders, links = [""], []
    while folders or links:
        # Links wait until all real folders are known, so that of two names for a folder the real one is kept.
        name = folders.pop() if folders else links.pop(0)
        there = os.path.realpath(Path(folder, name))
        if there in seen:
            faults[name] = DataError("DUPLICATE", f"leads to a folder that is listed as {seen[there] or '.'}")
            continue
        if name and Path(root).is_relative_to(there):
            faults[name] = DataError("NOT_A_FILE", "leads to a folder that holds the input, and is not followed")
            continue
        seen[there] = name
        try:
            with os.scandir(Path(folder, name)) as entries:
                for entry in entries:
                    inside = f"{name}/{entry.name}" if name else entry.name
                    kind = names if not _is_folder(entry) else links if entry.is_symlink() else folders
                    kind.append(inside)
        except OSError as error:
            faults[name] = DataError("UNREADABLE", f"this folder cannot be listed ({error.strerror})")
            if not name:
                raise faults[name] from error
        links.sort()
    return sorted(names), faults


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a loop of links
        return False


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
    if kind == "missing" and "**" in Path(folder).parts:
        folder = str(split_pattern(folder)[0])
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
