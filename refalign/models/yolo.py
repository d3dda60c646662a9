"""The detector: any ultralytics ``-seg`` model, from a local folder without pickle or by the name of its weights.

A folder holds ``model.yaml`` (the architecture as ultralytics writes it, plus ``names`` and ``image_size_px``) and
``model.safetensors``. YOLO is licensed under AGPL-3.0: see the project's README for what that means to you.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refalign.errors import ArtifactError, GeometryError

DEFAULT_IMAGE_SIZE_PX = 640
"""The side ultralytics' own weights were trained at."""
_BATCH_FRAMES = 16
"""Frames a forward pass; fixed, because another batch size rounds differently."""


@dataclass(frozen=True)
class Detections:
    """What one frame shows, best score first. D detections in a frame of H x W px.

    Attributes:
        boxes_xyxy_px: float32 [D, 4], half-open, pixels of the source frame.
        scores: float32 [D] in [0, 1].
        class_names: D names.
        masks: bool [D, H, W], at the size of the source frame.
        track_ids: int64 [D], from 1, stable within one call of ``Detector.track``; None from ``Detector.detect``.
    """

    boxes_xyxy_px: np.ndarray
    scores: np.ndarray
    class_names: tuple[str, ...]
    masks: np.ndarray
    track_ids: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.scores)


class Detector:
    """Finds and follows objects in uint8 RGB frames; the same frames give the same answer."""

    def __init__(self, yolo: Any, *, image_size_px: int, min_score: float, max_overlap: float, device: str):
        self._yolo = yolo
        self._device = device
        self.image_size_px = image_size_px
        self.min_score = min_score
        self.max_overlap = max_overlap
        self.class_names: tuple[str, ...] = tuple(yolo.names.values())

    def detect(self, frames: np.ndarray) -> list[Detections]:
        """Detects in each frame alone.

        Args:
            frames: uint8 [N, H, W, 3], RGB.
        """
        return [_detections(result) for result in self._predict(frames, self.min_score)]

    def track(self, frames: np.ndarray) -> list[Detections]:
        """Detects and follows objects through consecutive frames with ultralytics' ByteTrack; no state survives the call.

        Weak detections (down to 0.1) serve to keep a track alive, as ByteTrack means it; detections that belong to no track are
        left out. Boxes and masks are the detector's own, not the tracker's smoothed ones.

        Args:
            frames: uint8 [N, H, W, 3], RGB, in order of time.
        """
        from ultralytics.trackers.byte_tracker import BYTETracker
        from ultralytics.utils import YAML, IterableSimpleNamespace
        from ultralytics.utils.checks import check_yaml

        settings = YAML.load(check_yaml("bytetrack.yaml"))
        settings.update(track_high_thresh=self.min_score, new_track_thresh=self.min_score)
        tracker = BYTETracker(IterableSimpleNamespace(**settings))
        tracked = []
        for result in self._predict(frames, min(self.min_score, float(settings["track_low_thresh"]))):
            # A row of the tracker's answer: box (4), track id, score, class, index of the detection.
            rows = tracker.update(result.boxes.cpu().numpy(), result.orig_img)
            rows = rows[np.argsort(-rows[:, 5], kind="stable")] if len(rows) else np.zeros((0, 8))
            tracked.append(_detections(result[rows[:, 7].astype(int)], track_ids=rows[:, 4].astype(np.int64)))
        return tracked

    def _predict(self, frames: np.ndarray, min_score: float) -> list[Any]:
        if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
            raise GeometryError(f"frames are {frames.dtype} {list(frames.shape)}; expected uint8 [N, H, W, 3], RGB.")
        results: list[Any] = []
        for start in range(0, len(frames), _BATCH_FRAMES):
            # ultralytics takes arrays in OpenCV's order, BGR.
            batch = [np.ascontiguousarray(frame[..., ::-1]) for frame in frames[start : start + _BATCH_FRAMES]]
            results += self._yolo.predict(
                batch,
                imgsz=self.image_size_px,
                conf=min_score,
                iou=self.max_overlap,
                retina_masks=True,
                device=self._device,
                verbose=False,
                save=False,
            )
        return results


def load_detector(
    source: str | Path,
    *,
    image_size_px: int | None = None,
    min_score: float = 0.25,
    max_overlap: float = 0.7,
    device: str = "cpu",
) -> Detector:
    """Loads a segmentation detector.

    Args:
        source: a folder with ``model.yaml`` and ``model.safetensors``, a ``.pt`` file, or the name of published weights such as
            ``yolo11n-seg.pt``. Named weights are fetched once into ``$YOLO_CONFIG_DIR`` (default: a folder in the system's
            temporary one).
        image_size_px: side that frames are scaled to; default: the folder's, else 640.
        min_score: detections below are dropped; in [0, 1].
        max_overlap: of two boxes with a larger IoU only the better one stays.

    Raises:
        ArtifactError: the folder is incomplete, or the weights are no segmentation model or cannot be fetched.
    """
    prepare_ultralytics()
    if Path(source).expanduser().is_dir():
        yolo, folder_size_px = _open_folder(Path(source).expanduser())
    else:
        yolo, folder_size_px = _open_weights(str(source)), DEFAULT_IMAGE_SIZE_PX
    return Detector(
        yolo, image_size_px=image_size_px or folder_size_px, min_score=min_score, max_overlap=max_overlap, device=device
    )


def prepare_ultralytics() -> None:
    """Keeps ultralytics from fetching, installing and reporting by itself; must run before its first import.

    It reads these variables once, at import. What is already set stays.
    """
    defaults = {
        "YOLO_OFFLINE": "true",
        "YOLO_AUTOINSTALL": "false",
        "YOLO_VERBOSE": "false",
        # A .pt file is a pickle: with this, only ultralytics' and torch's own classes are built from it.
        "ULTRALYTICS_SAFE_LOAD": "true",
        "YOLO_CONFIG_DIR": str(Path(tempfile.gettempdir()) / f"refalign-ultralytics-{os.getuid()}"),
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    Path(os.environ["YOLO_CONFIG_DIR"]).mkdir(parents=True, exist_ok=True)


def _open_folder(folder: Path) -> tuple[Any, int]:
    """Builds the model that ``model.yaml`` describes and fills it from ``model.safetensors``."""
    import yaml
    from safetensors.torch import load_file
    from ultralytics import YOLO

    for name in ("model.yaml", "model.safetensors"):
        if not (folder / name).is_file():
            raise ArtifactError(f"{folder}: {name} is missing; expected a detector folder with model.yaml and model.safetensors.")
    description = yaml.safe_load((folder / "model.yaml").read_text())
    try:
        yolo: Any = YOLO(str(folder / "model.yaml"), task="segment")
        state = {
            key: tensor.float() if tensor.is_floating_point() else tensor
            for key, tensor in load_file(folder / "model.safetensors").items()
        }
        yolo.model.load_state_dict(state)
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        raise ArtifactError(
            f"{folder}: model.yaml and model.safetensors do not make a model ({text}); export them again."
        ) from error
    yolo.model.names = dict(enumerate(description["names"]))
    return yolo, int(description.get("image_size_px", DEFAULT_IMAGE_SIZE_PX))


def _open_weights(source: str) -> Any:
    """Opens a ``.pt`` file, fetching it where only a published name was given."""
    from ultralytics import YOLO
    from ultralytics.utils.downloads import attempt_download_asset

    if not source.endswith(".pt"):
        raise ArtifactError(f"{source}: no such detector folder; give one, a .pt file, or a name such as yolo11n-seg.pt.")
    path = Path(source).expanduser()
    if not path.is_file() and path.parent != Path():
        raise ArtifactError(f"{source}: no such file; give a detector folder, a .pt file, or a name such as yolo11n-seg.pt.")
    try:
        if not path.is_file():
            path = Path(attempt_download_asset(Path(os.environ["YOLO_CONFIG_DIR"]) / source, retry=1))
        yolo = YOLO(str(path))
    except Exception as error:
        text = " ".join(str(error).split())[:160]
        raise ArtifactError(
            f"{source}: these detector weights could not be opened or fetched ({text}); check name and network, or give a file."
        ) from error
    if yolo.task != "segment":
        raise ArtifactError(
            f"{source}: a model for the task {yolo.task!r}; masks are needed, so give segmentation weights (*-seg.pt)."
        )
    return yolo


def _detections(result: Any, track_ids: np.ndarray | None = None) -> Detections:
    """One frame's ultralytics ``Results`` as plain arrays."""
    boxes = result.boxes.cpu().numpy()
    height, width = result.orig_shape
    masks = (
        np.zeros((0, height, width), bool) if result.masks is None or not len(boxes) else result.masks.data.cpu().numpy() > 0.5
    )
    return Detections(
        boxes_xyxy_px=boxes.xyxy.astype(np.float32).reshape(-1, 4),
        scores=boxes.conf.astype(np.float32),
        class_names=tuple(result.names[int(number)] for number in boxes.cls),
        masks=masks,
        track_ids=track_ids,
    )
