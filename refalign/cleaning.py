"""Step folders that the output folder's story does not refer to: left by other settings or by other input."""

from __future__ import annotations

import shutil
from pathlib import Path

from refalign.errors import ArtifactError
from refalign.steps import Step, iter_step_folders
from refalign.summary import load_summary


def find_unused(output: Path) -> list[tuple[Path, int]]:
    """Folders outside of the last story, with their sizes in bytes.

    Raises:
        ArtifactError: the folder holds no story, so nothing can be told apart.
    """
    summary = load_summary(output)
    if summary is None:
        raise ArtifactError(f"{output}: no summary.json here; give the --output folder of a run that has ended.")
    used = set(summary["folders"].values())
    return [(folder, _size_bytes(folder)) for folder in iter_step_folders(output) if folder.name not in used]


def remove_folder(folder: Path) -> None:
    """Deletes a step folder that no process works in.

    Raises:
        BackendUnavailable: a process holds it.
    """
    name, _, fingerprint = folder.name.partition("-")
    with Step(name, fingerprint, folder).lease():
        # Without its manifest a half-deleted folder counts as unfinished, not as done.
        (folder / "manifest.json").unlink(missing_ok=True)
        shutil.rmtree(folder)


def _size_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
