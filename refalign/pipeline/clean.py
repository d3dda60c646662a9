"""The runs of an output folder: the current one at its top, earlier and failed ones below ``runs/``.

    <output>/summary.json, report.html, curation_report.html     the newest run that finished
    <output>/runs/<run>/...                                      the same files of every other run

A failed run, or one that was ended after fewer steps, never takes the place of a finished one.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refalign.errors import ArtifactError, ConfigError
from refalign.io.storage import find_size, in_parallel, iter_files, join, kind_of
from refalign.io.writing import delete_folder
from refalign.pipeline.reuse import find_referred
from refalign.pipeline.steps import Step, iter_step_folders
from refalign.pipeline.summary import REPORTS, load_summary

FINISHED = "FINISHED"
_FOLDER = "runs"


@dataclass(frozen=True)
class Run:
    """A run and the step folders it names.

    Attributes:
        name: the fingerprint of its settings and input.
        status: FINISHED, FAILED or KILLED.
        ended: date and time (UTC, ISO 8601), or empty.
        model: name and version that it registered, or empty.
        folders: its step folders, and those that it took parts from.
        size_bytes: of all of them.
    """

    name: str
    status: str
    ended: str
    model: str
    is_current: bool
    folders: frozenset[str]
    size_bytes: int


def choose_place(output: Path, summary: dict[str, Any]) -> Path:
    """The folder for a run's summary and reports. Where it is ``output``, what another run left there is set aside."""
    known, name = load_summary(output), summary["story"]
    if known is not None and not _replaces(summary, known):
        return output / _FOLDER / name
    if known is not None and known.get("story", name) != name:
        place = output / _FOLDER / known["story"]
        place.mkdir(parents=True, exist_ok=True)
        for file in ("summary.json", *REPORTS):
            if (output / file).is_file():
                (output / file).replace(place / file)
    shutil.rmtree(output / _FOLDER / name, ignore_errors=True)
    return output


def _replaces(new: dict[str, Any], known: dict[str, Any]) -> bool:
    if known.get("status", FINISHED) != FINISHED:
        return True
    return new["status"] == FINISHED and len(new["folders"]) >= len(known.get("folders", {}))


def iter_places(output: Path) -> Iterator[Path]:
    """The folders that hold the summary and the reports of a run: the current run's, then those of the others by name."""
    yield output
    yield from sorted(output.glob(f"{_FOLDER}/*"))


def list_runs(output: Path) -> list[Run]:
    """All runs of an output folder, the current one first.

    Raises:
        ArtifactError: no run has ended there.
    """
    summaries = [(place, summary) for place in iter_places(output) if (summary := load_summary(place)) is not None]
    if not summaries:
        raise ArtifactError(f"{output}: no summary.json here; give the --output folder of a run that has ended.")
    folders = [_find_folders(output, summary) for _, summary in summaries]
    sizes = {name: _size_bytes(output / name) for name in frozenset().union(*folders) if (output / name).is_dir()}
    return [
        Run(
            name=summary.get("story", "?"),
            status=summary.get("status", FINISHED),
            ended=summary.get("ended", ""),
            model="{name} version {version}".format(**summary["model"]) if "model" in summary else "",
            is_current=place == output,
            folders=named,
            size_bytes=sum(sizes.get(name, 0) for name in named),
        )
        for (place, summary), named in zip(summaries, folders, strict=True)
    ]


def find_unused(output: Path, runs: list[Run]) -> list[tuple[Path, int]]:
    """Step folders, with their sizes in bytes, that neither a finished run nor the run that ended last names."""
    last = max(runs, key=lambda run: run.ended)
    used = frozenset().union(*(run.folders for run in runs if run.status == FINISHED or run.is_current or run is last))
    return [(folder, _size_bytes(folder)) for folder in iter_step_folders(output) if folder.name not in used]


def forget_run(output: Path, name: str) -> None:
    """Deletes the summary and the reports of a run; its step folders are then unused, where no other run names them.

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


def _find_folders(output: Path, summary: dict[str, Any]) -> frozenset[str]:
    """Names of the run's step folders; a version may refer to parts of earlier ones."""
    named = set(summary.get("folders", {}).values())
    referred = (find_referred(Step.open(output / name)) for name in sorted(named) if (output / name).is_dir())
    return frozenset(named.union(*referred))


def _size_bytes(folder: Path) -> int:
    """On the disk, and in the object store that holds its parts."""
    local = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    step = Step.open(folder)
    if not step.store or kind_of(step.location) != "folder":
        return local
    names = [name for name in iter_files(step.location) if isinstance(name, str)]
    return local + sum(size or 0 for size in in_parallel(lambda name: find_size(join(step.location, name)), names))
