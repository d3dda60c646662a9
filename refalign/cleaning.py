"""Step folders that the output folder's story does not refer to: left by other settings or by other input."""

from __future__ import annotations

from pathlib import Path

from refalign.errors import ArtifactError
from refalign.steps import Step, iter_step_folders
from refalign.storage import find_size, in_parallel, iter_files, join, kind_of
from refalign.summary import load_summary
from refalign.versions import find_referred
from refalign.writing import delete_folder


def find_unused(output: Path) -> list[tuple[Path, int]]:
    """Folders outside of the last story, with their sizes in bytes.

    Raises:
        ArtifactError: the folder holds no story, so nothing can be told apart.
    """
    summary = load_summary(output)
    if summary is None:
        raise ArtifactError(f"{output}: no summary.json here; give the --output folder of a run that has ended.")
    used = set(summary["folders"].values())
    for name in sorted(used):  # a version may refer to parts of earlier ones
        used |= find_referred(Step.open(Path(output) / name)) if (Path(output) / name).is_dir() else set()
    return [(folder, _size_bytes(folder)) for folder in iter_step_folders(output) if folder.name not in used]


def remove_folder(folder: Path) -> None:
    """Deletes a step folder that no process works in.

    Raises:
        BackendUnavailable: a process holds it.
    """
    step = Step.open(folder)
    with step.lease():
        # Without its manifest a half-deleted folder counts as unfinished, not as done.
        (folder / "manifest.json").unlink(missing_ok=True)
        delete_folder(step.location)
        delete_folder(str(folder))


def _size_bytes(folder: Path) -> int:
    """On the disk, and in the object store that holds its parts."""
    local = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    step = Step.open(folder)
    if not step.store or kind_of(step.location) != "folder":
        return local
    names = [name for name in iter_files(step.location) if isinstance(name, str)]
    return local + sum(size or 0 for size in in_parallel(lambda name: find_size(join(step.location, name)), names))
