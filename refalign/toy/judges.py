"""Judges of generated sprite videos: what a drawn creature is, read from its pixels, by networks that training never sees.

A reader looks at one subject over the frames of a clip and names every attribute and the pose, or abstains where it cannot tell
(nothing there, too soft, two creatures blended into one). It is a convolutional network on other identities than the vision
encoder and the Transformer are trained on, with a detector of its own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional

from refalign.errors import ArtifactError
from refalign.models.loading import load_tensors
from refalign.toy.drawing import POSES
from refalign.toy.identities import (
    ATTRIBUTE_NAMES,
    COLOURS,
    EYES,
    HEADWEAR,
    LIMBS,
    MAIN_COLOURS,
    PATTERNS,
    SHAPES,
    attributes_of,
)

CROP_PX = 64
"""Side of the square that a subject is shown in."""
MARGIN = 1.15
"""Side of the square cut out around a subject's box, over the longer side of the box."""
VOCABULARIES: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "main_colour": MAIN_COLOURS,
    "second_colour": tuple(COLOURS),
    "pattern": PATTERNS,
    "eyes": EYES,
    "headwear": HEADWEAR,
    "limbs": LIMBS,
    "pose": POSES,
}
"""Question -> possible answers; one more, behind them, stands for abstaining."""
_WIDTHS = (48, 64, 96, 128)


class Reader(nn.Module):
    """Crops of one subject in, logits per question out.

    Attributes are read in each frame and averaged; the pose is read from mean and spread of the frames' features, because one
    frame cannot tell a walk from a dance, and from how far the subject moves, which its crops do not show.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, _WIDTHS[0], 4, stride=2, padding=1, bias=False), nn.BatchNorm2d(_WIDTHS[0])]
        layers += [nn.ReLU(), Residual(_WIDTHS[0])]
        for width_in, width_out in zip(_WIDTHS[:-1], _WIDTHS[1:], strict=True):
            layers += [nn.Conv2d(width_in, width_out, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width_out), nn.ReLU()]
            layers += [Residual(width_out)]
        self.trunk = nn.Sequential(*layers, nn.Conv2d(_WIDTHS[-1], 32, 1), nn.Flatten(), nn.Linear(32 * 16, 192), nn.ReLU())
        self.attributes = nn.ModuleDict({name: nn.Linear(192, len(VOCABULARIES[name]) + 1) for name in ATTRIBUTE_NAMES})
        self.pose = nn.Sequential(nn.Linear(2 * 192 + 2, 96), nn.ReLU(), nn.Linear(96, len(POSES) + 1))

    def forward(self, crops: Float[Tensor, "N F 3 64 64"], travel: Float[Tensor, "N 2"]) -> dict[str, Tensor]:
        """Logits: per attribute [N, F, answers + 1], ``pose`` [N, answers + 1]. Crops are in [-1, 1]; see `measure_travel`."""
        features = self.trunk(crops.flatten(0, 1)).unflatten(0, crops.shape[:2])
        logits = {name: head(features) for name, head in self.attributes.items()}
        spread = features.std(1, correction=0) if crops.shape[1] > 1 else torch.zeros_like(features[:, 0])
        return {**logits, "pose": self.pose(torch.cat([features.mean(1), spread, travel], 1))}


class Residual(nn.Module):
    """x + two convolutions of x."""

    def __init__(self, width: int) -> None:
        super().__init__()
        first, second = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.body = nn.Sequential(first, nn.BatchNorm2d(width), nn.ReLU(), second, nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(x + self.body(x))


@dataclass(frozen=True)
class Reading:
    """What the reader makes of one subject.

    Attributes:
        answers: question -> answer, or None where it abstains.
        probabilities: question -> float [answers + 1], the last for abstaining.
    """

    answers: dict[str, str | None]
    probabilities: dict[str, np.ndarray]


class Judge:
    """The trained reader."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader.eval().requires_grad_(False)

    @classmethod
    def load(cls, folder: str | Path) -> Judge:
        """Reads ``model.safetensors`` of a folder that the training script wrote.

        Raises:
            ArtifactError: it is missing or of another version.
        """
        path = Path(folder) / "model.safetensors"
        if not path.is_file():
            raise ArtifactError(f"{path}: not found; python -m refalign.toy.train_judges makes it.")
        reader = Reader()
        try:
            reader.load_state_dict({name: tensor.float() for name, tensor in load_tensors(path).items()})
        except RuntimeError as error:
            raise ArtifactError(f"{path}: not a reader of this version ({str(error).splitlines()[0]}).") from error
        return cls(reader)

    @torch.no_grad()
    def read(self, crops: UInt8[np.ndarray, "N F 64 64 3"], travel: Float[np.ndarray, "N 2"]) -> list[Reading]:
        """One reading per subject from its crops (`cut_crops`) and travel (`measure_travel`) over F frames of one clip."""
        pixels = to_input(torch.from_numpy(np.ascontiguousarray(crops)))
        logits = self.reader(pixels, torch.from_numpy(travel))
        probabilities = {name: (value if name == "pose" else value.mean(1)).softmax(-1).numpy() for name, value in logits.items()}
        readings = []
        for number in range(len(crops)):
            mine = {name: value[number] for name, value in probabilities.items()}
            answers = {name: (*VOCABULARIES[name], None)[int(value.argmax())] for name, value in mine.items()}
            readings.append(Reading(answers, mine))
        return readings


def to_input(crops: UInt8[Tensor, "N F 64 64 3"]) -> Float[Tensor, "N F 3 64 64"]:
    """Pixels to [-1, 1], channels first."""
    return crops.float().div_(127.5).sub_(1).permute(0, 1, 4, 2, 3)


def cut_crops(
    frames: UInt8[np.ndarray, "F H W 3"], boxes_xyxy_px: Float[np.ndarray, "F 4"] | Int[np.ndarray, "F 4"]
) -> UInt8[np.ndarray, "F 64 64 3"]:
    """The square around each frame's box, with some margin, at ``CROP_PX``; edge pixels continue beyond the frame."""
    boxes = torch.from_numpy(np.asarray(boxes_xyxy_px, np.float32))
    centre, side = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]).amax(1).clamp(min=1) * MARGIN
    height, width = frames.shape[1:3]
    steps = (torch.arange(CROP_PX) + 0.5) / CROP_PX - 0.5
    x = (centre[:, 0, None] + steps * side[:, None]) / width * 2 - 1
    y = (centre[:, 1, None] + steps * side[:, None]) / height * 2 - 1
    grid = torch.stack([x[:, None, :].expand(-1, CROP_PX, -1), y[:, :, None].expand(-1, -1, CROP_PX)], -1)
    pixels = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float()
    crops = functional.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return crops.round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


def measure_travel(boxes_xyxy_px: Float[np.ndarray, "F 4"] | Int[np.ndarray, "F 4"]) -> Float[np.ndarray, "2"]:
    """Standard deviation of a box's centre over the frames, along x and y, in tenths of the mean longer side."""
    boxes = np.asarray(boxes_xyxy_px, np.float32)
    centres, side = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]).max(1).mean()
    return centres.std(0) / max(float(side), 1.0) * 10


def encode_truth(identity: int, pose: str) -> dict[str, int]:
    """Question -> index of the right answer."""
    attributes = attributes_of(identity)
    right = {name: getattr(attributes, name) for name in ATTRIBUTE_NAMES} | {"pose": pose}
    return {name: VOCABULARIES[name].index(value) for name, value in right.items()}


def count_right(readings: Sequence[Reading], truths: Sequence[dict[str, int]]) -> dict[str, float]:
    """Question -> share of subjects that are read right; abstaining counts as wrong."""
    return {
        name: float(
            np.mean([reading.answers[name] == words[truth[name]] for reading, truth in zip(readings, truths, strict=True)])
        )
        for name, words in VOCABULARIES.items()
    }


def save_description(folder: Path) -> None:
    """Writes what the questions and answers are, for whoever opens the folder without this code."""
    description = {"crop_px": CROP_PX, "margin": MARGIN, "questions": VOCABULARIES}
    (folder / "config.json").write_text(json.dumps(description, indent=1) + "\n")
