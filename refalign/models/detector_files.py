"""What a detector's files are, found out in milliseconds, before a run starts, without building a model."""

from __future__ import annotations

import pickletools
import zipfile
from pathlib import Path

from refalign.errors import ArtifactError

_WANTED = (
    "give weights that ultralytics wrote (*.pt), a folder with model.yaml and model.safetensors, or a name such as yolo11n-seg.pt"
)
_TASKS = {
    "SegmentationModel": "segment",
    "YOLOESegModel": "segment",
    "DetectionModel": "detect",
    "RTDETRDetectionModel": "detect",
    "WorldModel": "detect",
    "YOLOEModel": "detect",
}
"""ultralytics' class of a model -> what it can do; its other classes find no objects."""
_EXPORTED = (".onnx", ".engine", ".torchscript", ".tflite", ".mlpackage", ".pb")


def check_detector(source: str | Path, *, needs_masks: bool) -> None:
    """Looks at a detector's files; the name of published weights that are not here yet passes.

    Args:
        source: a folder, a ``.pt`` file, or a name.
        needs_masks: whether boxes alone will not do.

    Raises:
        ArtifactError: nothing is there, or something else than is wanted.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        if missing := [name for name in ("model.yaml", "model.safetensors") if not (path / name).is_file()]:
            raise ArtifactError(
                f"{path}: {missing[0]} is missing; expected a detector folder with model.yaml and model.safetensors."
            )
    elif path.is_file():
        check_task(source, _find_task(path), needs_masks=needs_masks)
    elif path.suffix != ".pt":
        raise ArtifactError(f"{source}: no such detector folder; {_WANTED}.")
    elif path.parent != Path():
        raise ArtifactError(f"{source}: no such file; {_WANTED}.")


def check_task(source: str | Path, task: str, *, needs_masks: bool) -> None:
    """Refuses a model that finds no objects, or finds boxes where masks are needed."""
    if task not in ("segment", "detect"):
        raise ArtifactError(f"{source}: a model for the task {task!r}; expected 'segment', or 'detect' with curation.crop=box.")
    if needs_masks and task != "segment":
        raise ArtifactError(
            f"{source}: a model for the task {task!r}; masks are needed, so give segmentation weights (*-seg.pt), or set "
            "curation.crop=box."
        )


def _find_task(path: Path) -> str:
    """What the model in a file that torch wrote can do, from the names of classes in it; nothing is built from it."""
    if path.suffix in _EXPORTED:
        raise ArtifactError(
            f"{path}: the file is there, but is a model exported for inference; give the .pt that it was made of."
        )
    if path.suffix != ".pt":
        hint = " Rename it: ultralytics wants its suffix in small letters." if path.suffix.lower() == ".pt" else ""
        raise ArtifactError(f"{path}: the file is there, but its name does not end with .pt; {_WANTED}.{hint}")
    try:
        with zipfile.ZipFile(path) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            classes = _list_classes(archive.read(name))
    except (zipfile.BadZipFile, ValueError, OSError) as error:
        raise ArtifactError(f"{path}: the file is there, but torch did not write it ({error}); {_WANTED}.") from error
    found = sorted(each.rpartition(".")[2] for each in classes if each.startswith("ultralytics.nn.tasks."))
    if not found:
        raise ArtifactError(
            f"{path}: the file is there, but holds no model of ultralytics (a state dict, perhaps: tensors without the network "
            "that they belong to); load them into a model and write that with YOLO(...).save(file)."
        )
    return next((_TASKS[each] for each in found if each in _TASKS), found[0])


def _list_classes(data: bytes) -> set[str]:
    """Qualified names of all that a pickle would import."""
    classes: set[str] = set()
    texts: list[str] = []
    for operation, argument, _ in pickletools.genops(data):
        if operation.name == "GLOBAL":
            classes.add(str(argument).replace(" ", "."))
        elif operation.name == "STACK_GLOBAL":
            classes.add(".".join(texts[-2:]))
        elif isinstance(argument, str):
            texts.append(argument)
    return classes
