"""The runs of an output folder: the current one at its top, earlier and failed ones below ``runs/``.

    <output>/summary.json, report.html, curation_report.html     the newest run that finished
    <output>/runs/<run>/...                                      the same files of every other run

A failed run, or one that was ended after fewer steps, never takes the place of a finished one.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from refalign.errors import ArtifactError, ConfigError
from refalign.io.storage import find_size, in_parallel, iter_files, join, kind_of
from refalign.io.writing import delete_folder
from refalign.pipeline.reuse import find_referred
from refalign.pipeline.steps import Step, iter_step_folders
from refalign.pipeline.summary import FINISHED, REPORTS, Head, Summary, load_head

_FOLDER = "runs"


class EndedRun(NamedTuple):
    """A run with its step folders, and those that it took parts from."""

    head: Head
    is_current: bool
    folders: frozenset[str]
    size_bytes: int


def choose_place(output: Path, summary: Summary) -> Path:
    """The folder for a run's summary and reports. If it is ``output``, what another run left there is set aside."""
    new, known = Head.model_validate(summary), load_head(output)
    own = output / _FOLDER / new.name
    if known is not None:
        keeps_place = new.status != FINISHED or len(new.folders) < len(known.folders)
        if known.status == FINISHED and keeps_place:
            return own
        if known.name not in ("", new.name):
            place = output / _FOLDER / known.name
            place.mkdir(parents=True, exist_ok=True)
            for file in ("summary.json", *REPORTS):
                if (output / file).is_file():
                    (output / file).replace(place / file)
    shutil.rmtree(own, ignore_errors=True)
    return output


def iter_places(output: Path) -> Iterator[Path]:
    """The folders that hold the summary and the reports of a run: the current run's, then those of the others by name."""
    yield output
    yield from sorted(output.glob(f"{_FOLDER}/*"))


def list_runs(output: Path) -> list[EndedRun]:
    """All runs of an output folder, the current one first.

    Raises:
        ArtifactError: no run has ended there.
    """
    heads = {place: head for place in iter_places(output) if (head := load_head(place)) is not None}
    if not heads:
        raise ArtifactError(f"{output}: no summary.json here; give the --output folder of a run that has ended.")
    folders = {place: _find_folders(output, head) for place, head in heads.items()}
    sizes = {name: _size_bytes(output / name) for name in frozenset().union(*folders.values()) if (output / name).is_dir()}
    return [
        EndedRun(head, place == output, folders[place], sum(sizes.get(name, 0) for name in folders[place]))
        for place, head in heads.items()
    ]


def find_unused(output: Path, runs: list[EndedRun]) -> list[tuple[Path, int]]:
    """Step folders, with their sizes in bytes, that neither a finished run nor the run that ended last names."""
    last = max(runs, key=lambda run: run.head.ended)
    used = frozenset().union(*(run.folders for run in runs if run.head.status == FINISHED or run.is_current or run is last))
    return [(folder, _size_bytes(folder)) for folder in iter_step_folders(output) if folder.name not in used]


def forget_run(output: Path, name: str) -> None:
    """Deletes the summary and the reports of a run; its step folders are then unused, unless another run names them.

    Raises:
        ConfigError: there is no such run, or it is the current one.
    """
    others = [place.name for place in iter_places(output) if place != output]
    if name not in others:
        raise ConfigError(f"--forget {name}: expected a run that is not the current one: {', '.join(others) or 'there is none'}.")
    delete_folder(str(output / _FOLDER / name))


def remove_folder(folder: Path) -> None:
    """Deletes a step folder that no process works in.

    Raises:
        BackendUnavailable: a process holds it.
    """
    step = Step.open(folder)
    with step.lease():
        # Without its manifest a half-deleted folder counts as unfinished, not as done.
        step.discard_manifest()
        delete_folder(step.location)
        delete_folder(str(folder))


def _find_folders(output: Path, head: Head) -> frozenset[str]:
    """Names of the run's step folders; a version may refer to parts of earlier ones."""
    named = frozenset(head.folders.values())
    return named.union(*(find_referred(Step.open(output / name)) for name in sorted(named) if (output / name).is_dir()))


def _size_bytes(folder: Path) -> int:
    """On the disk, and in the object store that holds its parts."""
    local = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    step = Step.open(folder)
    if not step.store or kind_of(step.location) != "folder":
        return local
    names = [name for name in iter_files(step.location) if isinstance(name, str)]
    return local + sum(size or 0 for size in in_parallel(lambda name: find_size(join(step.location, name)), names))
