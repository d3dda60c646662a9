"""Trains the toy's detector: a narrow one-class YOLO segmentation model, on freshly drawn frames.

    python -m workshop.weights.train_detector

The loss is ultralytics' own. Its trainer is not used, because it needs files on disk and network access.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from refalign.models.yolo import prepare_ultralytics
from refalign.toy import WEIGHTS_FOLDER
from workshop.weights.initial_weights import replace_folder
from workshop.weights.sampling import FrameTruth, sample_clutter, sample_frames
from workshop.weights.training import TrainingState, make_parser, train

ARCHITECTURE, SEED = "yolo11n-seg.yaml", 20
BATCH = 8
CLASS_NAME = "creature"
IMAGE_SIZE_PX = 320
"""Width that frames are enlarged to: a cell of the mask prototypes is then one pixel of the frame."""
CLUTTER_EVERY = 4
"""One frame in so many shows no creature."""
WIDTH, DEPTH, MAX_CHANNELS = 0.125, 0.5, 512


def model_description() -> dict[str, Any]:
    """The published architecture, narrower and with one class, as ``model.yaml`` stores it."""
    prepare_ultralytics()
    from ultralytics.nn.tasks import yaml_model_load

    published = yaml_model_load(ARCHITECTURE)
    return {
        "nc": 1,
        "names": [CLASS_NAME],
        "image_size_px": IMAGE_SIZE_PX,
        "scales": {"n": [DEPTH, WIDTH, MAX_CHANNELS]},
        "backbone": published["backbone"],
        "head": published["head"],
    }


def make_model() -> Any:
    """The untrained model with the settings its loss reads."""
    prepare_ultralytics()
    from ultralytics.cfg import get_cfg
    from ultralytics.nn.tasks import SegmentationModel

    torch.manual_seed(SEED)
    model: Any = SegmentationModel({**model_description(), "scale": "n"}, verbose=False)
    model.args = get_cfg()
    model.names = {0: CLASS_NAME}
    return model


def make_batch(first: int, batch_size: int) -> dict[str, torch.Tensor]:
    """Frames number ``first`` ... of the training seed, augmented, as ultralytics' loss takes them."""
    numbers = range(first, first + batch_size)
    drawn = sample_frames(SEED, numbers, later=True)
    samples = [sample_clutter(SEED, n) if n % CLUTTER_EVERY == 0 else sample for n, sample in zip(numbers, drawn, strict=True)]
    truths = [_augment(sample, np.random.default_rng([SEED, n, 3])) for n, sample in zip(numbers, samples, strict=True)]
    height, width = truths[0].frame.shape[:2]
    images = torch.from_numpy(np.stack([truth.frame for truth in truths])).permute(0, 3, 1, 2).float() / 255
    size = IMAGE_SIZE_PX * height // width, IMAGE_SIZE_PX
    images = torch.nn.functional.interpolate(images, size, mode="bilinear", align_corners=False)
    boxes = torch.from_numpy(np.concatenate([truth.boxes_xyxy_px for truth in truths])).float()
    boxes = boxes / torch.tensor([width, height, width, height])
    # Disjoint masks as one picture: 0 for background, n + 1 for subject n.
    index_masks = np.stack([(truth.masks * np.arange(1, len(truth.masks) + 1)[:, None, None]).sum(0) for truth in truths])
    owners = np.repeat(np.arange(batch_size), [len(truth.masks) for truth in truths])
    return {
        "img": images,
        "batch_idx": torch.from_numpy(owners).float(),
        "cls": torch.zeros(len(boxes), 1),
        "bboxes": torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], dim=1),
        "masks": torch.from_numpy(index_masks).float(),
    }


def _augment(truth: FrameTruth, rng: np.random.Generator) -> FrameTruth:
    """Mirrors, shifts colours, and compresses as a video would."""
    frame, boxes, masks = truth.frame, truth.boxes_xyxy_px, truth.masks
    if rng.random() < 0.5:
        frame, masks = frame[:, ::-1], masks[:, :, ::-1]
        boxes = np.stack([frame.shape[1] - boxes[:, 2], boxes[:, 1], frame.shape[1] - boxes[:, 0], boxes[:, 3]], axis=1)
    gain, offset = rng.uniform(0.85, 1.15, 3), rng.uniform(-12, 12)
    frame = np.clip(frame * gain + offset, 0, 255).astype(np.uint8)
    if rng.random() < 0.6:
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, "JPEG", quality=int(rng.integers(55, 96)))
        frame = np.asarray(Image.open(buffer))
    return FrameTruth(np.ascontiguousarray(frame), boxes, np.ascontiguousarray(masks))


def export(model: Any, target: Path) -> None:
    """Writes ``model.yaml`` and half-precision ``model.safetensors``."""

    def write(folder: Path) -> None:
        state = {key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in model.state_dict().items()}
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / "model.safetensors")
        (folder / "model.yaml").write_text(yaml.safe_dump(model_description(), sort_keys=False, default_flow_style=None))

    replace_folder(target, write)


def main() -> None:
    parser = make_parser(__doc__, steps=1500, checkpoint="runs/toy_detector.pt", output=WEIGHTS_FOLDER / "detector")
    arguments = parser.parse_args()
    model = make_model()

    def make_loss(step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        terms, named = model.loss(make_batch(step * BATCH, BATCH))
        return terms.sum() / BATCH, named

    train(
        TrainingState(model, [torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-3)]),
        make_loss,
        lambda step: min(1.0, (step + 1) / 100) * (1 - 0.98 * step / arguments.steps),
        lambda averaged: export(averaged, arguments.output),
        steps=arguments.steps,
        checkpoint=arguments.checkpoint,
        clip_norm=10.0,
    )


if __name__ == "__main__":
    main()
