"""Trains the toy's detector: a narrow one-class YOLO segmentation model, on freshly drawn frames.

    python -m refalign.toy.train_detector --steps 1600 --checkpoint runs/detector.pt [--init runs/detector.pt]
    python -m refalign.toy.train_detector --steps 0            # only measures what is shipped

The loss is ultralytics' own; the loop is ours, because its trainer wants files on disk and looks for the network.
"""

from __future__ import annotations

import argparse
import io
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from refalign.models.yolo import Detections, load_detector, prepare_ultralytics
from refalign.toy import WEIGHTS_FOLDER
from refalign.toy.initial_weights import replace_folder
from refalign.toy.optim import TrainingState
from refalign.toy.sampling import FrameTruth, sample_clutter, sample_frames

ARCHITECTURE, SEED = "yolo11n-seg.yaml", 20
HELDOUT_SEED = 21
CLASS_NAME = "creature"
IMAGE_SIZE_PX = 320
"""Frames are enlarged to this width: a prototype's cell is then one pixel of the frame."""
CLUTTER_EVERY = 4
"""One frame in so many shows no creature."""
WIDTH, DEPTH, MAX_CHANNELS = 0.125, 0.5, 512


def model_description() -> dict[str, Any]:
    """The published architecture at our width, with one class, as ``model.yaml`` stores it."""
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
    index_masks = np.stack([_index_mask(truth.masks) for truth in truths])
    return {
        "img": images,
        "batch_idx": torch.repeat_interleave(
            torch.arange(batch_size), torch.tensor([len(truth.masks) for truth in truths])
        ).float(),
        "cls": torch.zeros(len(boxes), 1),
        "bboxes": torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], dim=1),
        "masks": torch.from_numpy(index_masks).float(),
    }


def _index_mask(masks: np.ndarray) -> np.ndarray:
    """Disjoint masks bool [S, H, W] -> [H, W] with 0 for background and n + 1 for subject n."""
    numbers = np.arange(1, len(masks) + 1, dtype=np.uint8)[:, None, None]
    return (masks * numbers).sum(0, dtype=np.uint8)


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


def evaluate(folder: Path, num_frames: int) -> dict[str, float]:
    """Held-out figures: box recall at IoU .5, mean mask IoU of the matched, and the share of detections that match nothing."""
    detector = load_detector(folder)
    truths = sample_frames(HELDOUT_SEED, range(num_frames), "heldout", min_visible=0.3, later=True)
    found = detector.detect(np.stack([truth.frame for truth in truths]))
    scores = [match_frame(truth, detections) for truth, detections in zip(truths, found, strict=True)]
    subjects, matched = sum(len(truth.masks) for truth in truths), [iou for ious in scores for iou in ious]
    detections = sum(len(frame) for frame in found)
    clutter = detector.detect(np.stack([sample_clutter(HELDOUT_SEED, number).frame for number in range(num_frames)]))
    return {
        "frames": num_frames,
        "box_recall_at_50": len(matched) / subjects,
        "mask_iou": float(np.mean(matched)) if matched else 0.0,
        "false_share": (detections - len(matched)) / max(1, detections),
        "highest_score_on_clutter": max((float(frame.scores.max()) for frame in clutter if len(frame)), default=0.0),
    }


def match_frame(truth: FrameTruth, detections: Detections, *, min_iou: float = 0.5) -> list[float]:
    """Mask IoUs of the subjects whose box is met at ``min_iou``; each detection serves one subject, best score first."""
    ious, free = [], list(range(len(truth.masks)))
    for box, mask in zip(detections.boxes_xyxy_px, detections.masks, strict=True):
        overlaps = [_box_iou(box, truth.boxes_xyxy_px[number]) for number in free]
        if overlaps and max(overlaps) >= min_iou:
            number = free.pop(int(np.argmax(overlaps)))
            ious.append(float((mask & truth.masks[number]).sum() / (mask | truth.masks[number]).sum()))
    return ious


def _box_iou(first: np.ndarray, second: np.ndarray) -> float:
    inner = np.maximum(np.minimum(first[2:], second[2:]) - np.maximum(first[:2], second[:2]), 0).prod()
    return float(inner / ((first[2:] - first[:2]).prod() + (second[2:] - second[:2]).prod() - inner))


def export(model: Any, target: Path) -> None:
    """Writes ``model.yaml`` and half-precision ``model.safetensors``."""
    import yaml
    from safetensors.torch import save_file

    def write(folder: Path) -> None:
        state = {key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in model.state_dict().items()}
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / "model.safetensors")
        (folder / "model.yaml").write_text(yaml.safe_dump(model_description(), sort_keys=False, default_flow_style=None))

    replace_folder(target, write)


def train(steps: int, batch_size: int, checkpoint: Path, init: Path | None, output: Path) -> None:
    """Trains to step ``steps`` with a learning rate that falls linearly to 2%; exports the moving average of the weights."""
    model = make_model()
    state = TrainingState(model, [torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-3)])
    if init:
        state.load(init)
    started = time.monotonic()
    while (step := state.step) < steps:
        model.train()
        terms, named = model.loss(make_batch(step * batch_size, batch_size))
        (terms.sum() / batch_size).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        state.advance(min(1.0, (step + 1) / 100) * (1 - 0.98 * step / steps))
        if state.step % 50 == 0:
            shown = " ".join(f"{name} {float(value):.3f}" for name, value in named.items())
            print(f"step {state.step}/{steps} {shown} {time.monotonic() - started:.0f} s", flush=True)
        if state.step % 300 == 0 or state.step == steps:
            state.save(checkpoint)
            export(state.averaged, output)
            print(f"step {state.step} held-out {evaluate(output, 200)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1600, help="total number of steps; 0 only measures --output")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/toy_detector.pt"), help="where the training state is kept")
    parser.add_argument("--init", type=Path, help="training state to continue from, or folder of weights to start from")
    parser.add_argument("--output", type=Path, default=WEIGHTS_FOLDER / "detector")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.steps:
        train(arguments.steps, arguments.batch_size, arguments.checkpoint, arguments.init, arguments.output)
    print(evaluate(arguments.output, 500))


if __name__ == "__main__":
    main()
