"""The detector: an ultralytics model that finds masks, or boxes where they are enough, from a folder or its weights.

A folder holds ``model.yaml`` (the architecture as ultralytics writes it, plus ``names`` and ``image_size_px``) and
``model.safetensors``. An open-vocabulary model (YOLOE) finds any words. It needs its text encoder once, or the words' embeddings
from a file: ``classes.npz`` in the folder, or ``<name>.npz`` beside ``<name>.pt``. ``YOLOE(...).set_classes(words)`` and
``save_prompt_embeddings(file)`` of ultralytics write such a file.

YOLO is licensed under AGPL-3.0: see the project's README for what that means to you.
"""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refalign.errors import ArtifactError, GeometryError
from refalign.models.detector_files import check_detector, check_task
from refalign.models.loading import load_tensors

DEFAULT_MIN_SCORE = 0.25
_IMAGE_SIZE_PX = 640  # the side ultralytics' own weights were trained at
_MAX_OVERLAP = 0.7  # of two boxes with a larger IoU only the better one stays
_BATCH_FRAMES = 16  # a forward pass; fixed, because another batch size rounds differently
_MAX_DESCRIPTION_BYTES, _MAX_DESCRIPTION_VALUES = 2**18, 10_000
"""Of model.yaml, aliases counted as often as they are used; the largest published one has 400 values."""


@dataclass(frozen=True)
class Detections:
    """What one frame shows, best score first. D detections in a frame of H x W px."""

    boxes_xyxy_px: np.ndarray  # float32 [D, 4], half-open, pixels of the source frame
    scores: np.ndarray  # float32 [D] in [0, 1]
    class_names: tuple[str, ...]
    masks: np.ndarray  # bool [D, H, W], at the size of the source frame; the boxes, of a model that finds no masks
    track_ids: np.ndarray | None = None  # int64 [D], from 1, stable within one call of ``Detector.track``

    def __len__(self) -> int:
        return len(self.scores)


class Detector:
    """Finds and follows objects in uint8 RGB frames; the same frames give the same answer."""

    def __init__(self, yolo: Any, *, image_size_px: int, min_score: float, device: str, classes: Sequence[str]) -> None:
        self._yolo, self._device, self._classes = yolo, device, classes
        self.image_size_px, self.min_score = image_size_px, min_score
        self.class_names: tuple[str, ...] = tuple(yolo.names.values())

    def detect(self, frames: np.ndarray) -> list[Detections]:
        """Detects in each of the frames alone, uint8 [N, H, W, 3]."""
        return [_detections(result) for result in self._predict(frames, self.min_score)]

    def track(self, frames: np.ndarray, classes: Sequence[str] = ()) -> list[Detections]:
        """Follows objects through consecutive frames, uint8 [N, H, W, 3], with ultralytics' ByteTrack.

        Weak detections (down to 0.1) keep a track alive, as in ByteTrack. Detections without a track are left out. Boxes and
        masks are the detector's own, not the tracker's smoothed ones. Only ``classes`` are looked for if there are any.
        """
        from ultralytics.trackers.byte_tracker import BYTETracker
        from ultralytics.utils import YAML, IterableSimpleNamespace
        from ultralytics.utils.checks import check_yaml

        settings = YAML.load(check_yaml("bytetrack.yaml"))
        settings.update(track_high_thresh=self.min_score, new_track_thresh=self.min_score)
        tracker = BYTETracker(IterableSimpleNamespace(**settings))
        tracked = []
        for result in self._predict(frames, min(self.min_score, float(settings["track_low_thresh"])), classes):
            # A row of the tracker's answer: box (4), track id, score, class, index of the detection.
            rows = tracker.update(result.boxes.cpu().numpy(), result.orig_img)
            rows = rows[np.argsort(-rows[:, 5], kind="stable")] if len(rows) else np.zeros((0, 8))
            tracked.append(_detections(result[rows[:, 7].astype(int)], track_ids=rows[:, 4].astype(np.int64)))
        return tracked

    def _predict(self, frames: np.ndarray, min_score: float, classes: Sequence[str] = ()) -> list[Any]:
        if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
            raise GeometryError(f"frames are {frames.dtype} {list(frames.shape)}; expected uint8 [N, H, W, 3], RGB.")
        wanted = classes or self._classes
        results: list[Any] = []
        for start in range(0, len(frames), _BATCH_FRAMES):
            results += self._yolo.predict(
                [np.ascontiguousarray(frame[..., ::-1]) for frame in frames[start : start + _BATCH_FRAMES]],  # BGR
                imgsz=self.image_size_px,
                conf=min_score,
                iou=_MAX_OVERLAP,
                classes=[number for number, name in self._yolo.names.items() if name in wanted] if wanted else None,
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
    min_score: float = DEFAULT_MIN_SCORE,
    device: str = "cpu",
    classes: Sequence[str] = (),
    needs_masks: bool = True,
) -> Detector:
    """Loads a detector.

    Args:
        source: a folder with ``model.yaml`` and ``model.safetensors``, a ``.pt`` file, or the name of published weights such as
            ``yolo11n-seg.pt``, which are fetched once into ``$YOLO_CONFIG_DIR`` (default: below the system's temporary folder).
        image_size_px: side that frames are scaled to; default: the folder's, else 640.
        min_score: weaker detections are dropped; in [0, 1].
        classes: what to look for: any words for an open-vocabulary model, known names for another. Empty: all it knows.
        needs_masks: refuse a model that finds boxes only.

    Raises:
        ArtifactError: the folder is incomplete, the weights are no such model or cannot be fetched, or the model does not know
            the classes.
    """
    check_detector(source, needs_masks=needs_masks)
    prepare_ultralytics()
    path = Path(source).expanduser()
    yolo, own_size_px = _open_folder(path) if path.is_dir() else (_open_weights(str(source)), _IMAGE_SIZE_PX)
    check_task(source, str(yolo.task), needs_masks=needs_masks)
    _set_classes(yolo, path, list(classes))
    return Detector(yolo, image_size_px=image_size_px or own_size_px, min_score=min_score, device=device, classes=classes)


def prepare_ultralytics() -> None:
    """Imports ultralytics such that it neither fetches, installs nor reports by itself, nor runs code that a file brings.

    What is already set in the environment stays, except ``ULTRALYTICS_SAFE_LOAD``.

    Raises:
        ArtifactError: it was imported before without that variable, which it reads at import.
    """
    # A .pt file is a pickle and a model.yaml may hold an expression: with this, only ultralytics' and torch's own classes are
    # built from them. Not to be switched off from outside.
    os.environ["ULTRALYTICS_SAFE_LOAD"] = "true"
    os.environ.setdefault("YOLO_OFFLINE", "true")
    os.environ.setdefault("YOLO_AUTOINSTALL", "false")
    os.environ.setdefault("YOLO_VERBOSE", "false")
    folder = os.environ.setdefault("YOLO_CONFIG_DIR", f"{tempfile.gettempdir()}/refalign-ultralytics-{os.getuid()}")
    Path(folder).mkdir(parents=True, exist_ok=True)
    from ultralytics.utils import SAFE_LOAD

    if not SAFE_LOAD:
        raise ArtifactError(
            "ultralytics was imported without ULTRALYTICS_SAFE_LOAD=true, and would run code that a detector's file brings; "
            "set it in the environment, or import refalign.models.yolo first."
        )


def _open_folder(folder: Path) -> tuple[Any, int]:
    """Builds the model that ``model.yaml`` describes and fills it from ``model.safetensors``; also its image size in px."""
    from ultralytics import YOLO, YOLOE

    description = _load_description(folder / "model.yaml")
    tensors = load_tensors(folder / "model.safetensors")
    try:
        # ultralytics tells YOLOE by the file's name, which is fixed here.
        head = str(description["head"][-1][2])
        kind: Any = YOLOE if "YOLOE" in head else YOLO
        yolo: Any = kind(str(folder / "model.yaml"), task="segment" if "Segment" in head else "detect")
        state = {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}
        yolo.model.load_state_dict(state)
        yolo.model.names = dict(enumerate(map(str, description["names"])))
        return yolo, int(description.get("image_size_px", _IMAGE_SIZE_PX))
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        raise ArtifactError(
            f"{folder}: model.yaml and model.safetensors do not make a model ({text}); export them again."
        ) from error


def _load_description(path: Path) -> dict[str, Any]:
    """What ``model.yaml`` says; refused if it is damaged, asks for Python objects, or is a bomb of aliases."""
    import yaml

    try:
        with path.open("rb") as file:
            description = yaml.safe_load(file.read(_MAX_DESCRIPTION_BYTES + 1))
            is_whole = file.tell() <= _MAX_DESCRIPTION_BYTES
    except (yaml.YAMLError, OSError, ValueError, RecursionError) as error:
        text = " ".join(str(error).split())[:160]
        raise ArtifactError(f"{path}: not a description of a detector ({text}); export it again.") from error
    count, todo = 0, [description]
    while todo and count <= _MAX_DESCRIPTION_VALUES:
        value = todo.pop()
        count += 1
        todo += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if not is_whole or todo or not isinstance(description, dict):
        raise ArtifactError(f"{path}: expected a mapping of a few hundred values; export it again.")
    return description


def _open_weights(source: str) -> Any:
    """Opens a ``.pt`` file, fetching it where only a published name was given."""
    from ultralytics import YOLO
    from ultralytics.utils.downloads import attempt_download_asset

    path = Path(source).expanduser()
    try:
        if not path.is_file():
            path = Path(attempt_download_asset(Path(os.environ["YOLO_CONFIG_DIR"]) / source, retry=1))
        return YOLO(str(path))
    except Exception as error:
        text = " ".join(str(error).split())[:160]
        raise ArtifactError(
            f"{source}: these detector weights could not be opened or fetched ({text}); check name and network, or give a file."
        ) from error


def _set_classes(yolo: Any, source: Path, classes: list[str]) -> None:
    """Makes ``classes`` the vocabulary of an open-vocabulary model; checks that another one knows them."""
    from ultralytics.nn.tasks import YOLOEModel

    names = list(yolo.names.values())
    if not isinstance(yolo.model, YOLOEModel) or hasattr(yolo.model.model[-1], "lrpc"):  # with lrpc its vocabulary is built in
        if unknown := sorted(set(classes) - set(names)):
            raise ArtifactError(
                f"{source}: does not know the classes {', '.join(unknown)} (it knows {len(names)}: {', '.join(names[:8])} ...); "
                "change curation.classes, or give an open-vocabulary detector such as yoloe-11l-seg.pt."
            )
    elif classes:
        yolo.set_classes(classes, _embed_classes(yolo, source, classes))
    elif getattr(yolo.model, "pe", None) is None:
        raise ArtifactError(f"{source}: finds what it is told to find; name it in curation.classes, a list of words.")


def _embed_classes(yolo: Any, source: Path, classes: list[str]) -> Any:
    """Text embeddings [1, C, E] of the words: from the file beside the weights, else from the model's own text encoder."""
    import torch

    saved = source / "classes.npz" if source.is_dir() else source.with_suffix(".npz")
    if saved.is_file():
        try:
            with np.load(saved, allow_pickle=False) as data:
                names, embeddings = [str(name) for name in data["names"]], np.asarray(data["embeddings"], np.float32)
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise ArtifactError(f"{saved}: not a file of names and embeddings ({error}); write it again.") from error
        missing = [name for name in classes if name not in names]
        if missing or embeddings.shape != (1, len(names), yolo.model.model[-1].embed):
            raise ArtifactError(f"{saved}: holds no embedding of {', '.join(missing) or 'the right size'}; write it again.")
        return torch.from_numpy(embeddings[:, [names.index(name) for name in classes]])
    try:
        return yolo.get_text_pe(classes)
    except Exception as error:
        encoder = {"mobileclip:blt": "mobileclip_blt.ts", "mobileclip2:b": "mobileclip2_b.ts"}
        weights = encoder.get(str(getattr(yolo.model, "text_model", "")), "its text encoder's weights")
        text = " ".join(str(error).split())[:120]
        raise ArtifactError(
            f"{source}: the words of curation.classes need this detector's text encoder, which cannot be had here ({text}); "
            f"install ultralytics' CLIP package (github.com/ultralytics/CLIP) and put {weights} into the working folder, or put "
            f"the words' embeddings into {saved.name} beside the weights (ultralytics: save_prompt_embeddings)."
        ) from error


def _detections(result: Any, track_ids: np.ndarray | None = None) -> Detections:
    """One frame's ultralytics ``Results`` as plain arrays."""
    boxes = result.boxes.cpu().numpy()
    found = boxes.xyxy.astype(np.float32).reshape(-1, 4)
    if result.masks is not None:
        masks = result.masks.data.cpu().numpy() > 0.5
    else:
        masks = np.zeros((len(found), *result.orig_shape), bool)
        for mask, (left, top, right, bottom) in zip(masks, np.rint(found).astype(int).clip(0), strict=True):
            mask[top:bottom, left:right] = True
    names = tuple(result.names[int(number)] for number in boxes.cls)
    return Detections(found, boxes.conf.astype(np.float32), names, masks, track_ids)
