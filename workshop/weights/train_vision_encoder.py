"""Trains the toy's DINOv3 without labels: two augmented views of one picture must agree, as a whole and patch by patch.

    python -m workshop.weights.train_vision_encoder
    python -m workshop.weights.train_vision_encoder --supervised FOLDER --steps 900     # the study's upper bound, with labels

The whole-picture term contrasts CLS tokens between pictures. The dense term contrasts patch tokens at corresponding places of
the two views with those of other pictures and of distant places. Both act through heads that are thrown away.
"""

from __future__ import annotations

import copy
import functools
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from refalign.toy import WEIGHTS_FOLDER
from refalign.toy.drawing import FRAME_HEIGHT_PX, FRAME_WIDTH_PX
from refalign.toy.identities import sample_identity
from refalign.toy.rendering import render_references
from workshop.weights.initial_weights import make_vision_encoder, save_vision_encoder
from workshop.weights.sampling import sample_frames, sample_pose, sample_references
from workshop.weights.training import TrainingState, make_optimizers, make_parser, train

SEED = 40
POOL_SIZE = 12000
PATCH_PX = 8
BATCH_PICTURES = 64
PLACES = 8
"""Number of places of a picture at which the dense term compares the views."""
NEAR = 0.45
"""Places of one picture closer than this (in half-widths of the view) are neither positives nor negatives of each other."""
TEMPERATURE = 0.15
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Student(nn.Module):
    """The encoder with one head for whole pictures and one for places."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = make_vision_encoder(SEED)
        width = self.encoder.config.hidden_size
        self.whole = nn.Sequential(nn.Linear(width, 256), nn.GELU(), nn.Linear(256, 64))
        self.place = nn.Sequential(nn.Linear(width, 256), nn.GELU(), nn.Linear(256, 64))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised pixels [N, 3, H, W] -> CLS features [N, 64] and a map of patch features [N, 64, h, w]."""
        tokens = self.encoder(pixels).last_hidden_state
        side = pixels.shape[-1] // self.encoder.config.patch_size
        patches = self.place(tokens[:, 1 + self.encoder.config.num_register_tokens :])
        return self.whole(tokens[:, 0]), patches.transpose(1, 2).unflatten(2, (side, side))


def draw_pool(size: int = POOL_SIZE) -> np.ndarray:
    """Training pictures uint8 [size, 48, 48, 3]: half references on white, half pieces of frames, as wide as high."""
    middle = (FRAME_WIDTH_PX - FRAME_HEIGHT_PX) // 2
    references = sample_references(SEED, range(size // 2))[:, :, middle : middle + FRAME_HEIGHT_PX]
    frames = np.stack([truth.frame for truth in sample_frames(SEED, range(size - size // 2))])
    starts = np.random.default_rng(SEED).integers(0, 2 * middle + 1, len(frames))
    pieces = [frame[:, start : start + FRAME_HEIGHT_PX] for frame, start in zip(frames, starts, strict=True)]
    return np.concatenate([references, pieces])


def random_geometry(count: int, generator: torch.Generator) -> Tensor:
    """Affine maps [count, 2, 3] from a view's coordinates in [-1, 1] to the picture's: turn, zoom, shift and mirror."""
    turn = torch.randn(count, generator=generator).clamp(-2.5, 2.5) * math.radians(12)
    zoom = torch.empty(count).uniform_(0.55, 1.1, generator=generator)
    mirror = torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0)
    room = (1.1 - zoom)[:, None].clamp_min(0.05)
    shift = (torch.rand(count, 2, generator=generator) * 2 - 1) * room
    cos, sin = torch.cos(turn) * zoom, torch.sin(turn) * zoom
    rows = torch.stack([torch.stack([cos * mirror, -sin], 1), torch.stack([sin * mirror, cos], 1)], 1)
    return torch.cat([rows, shift[:, :, None]], 2)


def make_view(pictures: Tensor, geometry: Tensor, generator: torch.Generator) -> Tensor:
    """One augmented view: geometry, colour (a little, because creatures differ by it), blur; normalised, [N, 3, H, W]."""
    count, _, height, width = pictures.shape
    grid = functional.affine_grid(geometry, [count, 3, height, width], align_corners=False)
    view = functional.grid_sample(pictures, grid, padding_mode="border", align_corners=False)

    def noise(channels: int) -> Tensor:
        return torch.rand(count, channels, 1, 1, generator=generator) - 0.5

    view = (view * (1 + 0.24 * noise(1) + 0.1 * noise(3)) + 0.08 * noise(1)).clamp(0, 1)
    blurred = functional.avg_pool2d(functional.pad(view, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    view = torch.where(noise(1) < -0.2, blurred, view)
    view = view + 0.02 * torch.randn(view.shape, generator=generator)
    return (view - torch.tensor(_MEAN)[:, None, None]) / torch.tensor(_STD)[:, None, None]


def corresponding(places: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Where places [N, Q, 2] of the first view lie in the second, which shows those in [-1, 1]."""
    picture = places @ first[:, :, :2].transpose(1, 2) + first[:, None, :, 2]
    return (picture - second[:, None, :, 2]) @ torch.linalg.inv(second[:, :, :2]).transpose(1, 2)


def choose_places(view: Tensor, first: Tensor, second: Tensor, generator: torch.Generator) -> Tensor:
    """``PLACES`` patch centres [N, Q, 2] of the first view that the second also shows, those with contrast more often."""
    side = view.shape[-1] // PATCH_PX
    axis = (torch.arange(side) + 0.5) / side * 2 - 1
    centres = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).view(1, -1, 2).expand(len(view), -1, 2)
    contrast = functional.unfold(view, PATCH_PX, stride=PATCH_PX).std(1)
    shared = (corresponding(centres, first, second).abs() < 0.95).all(-1)
    weight = (0.05 + contrast) * shared + 1e-6
    chosen = torch.multinomial(weight, PLACES, generator=generator)
    return centres.gather(1, chosen[..., None].expand(-1, -1, 2))


def whole_loss(first: Tensor, second: Tensor) -> Tensor:
    """Symmetric InfoNCE between the views of N pictures, [N, 64] each."""
    scores = functional.normalize(first, dim=1) @ functional.normalize(second, dim=1).T / TEMPERATURE
    target = torch.arange(len(scores))
    return 0.5 * (functional.cross_entropy(scores, target) + functional.cross_entropy(scores.T, target))


def dense_loss(maps: tuple[Tensor, Tensor], places: tuple[Tensor, Tensor]) -> Tensor:
    """Symmetric InfoNCE between corresponding places; near places of the same picture are no negatives."""
    features = []
    for feature_map, place in zip(maps, places, strict=True):
        sampled = functional.grid_sample(feature_map, place[:, None], padding_mode="border", align_corners=False)
        features.append(functional.normalize(sampled[:, :, 0].transpose(1, 2).flatten(0, 1), dim=1))
    scores = features[0] @ features[1].T / TEMPERATURE
    count, per_picture = places[0].shape[:2]
    near = torch.cdist(places[0], places[0]) < NEAR
    ignored = torch.block_diag(*near.unbind()) & ~torch.eye(count * per_picture, dtype=torch.bool)
    scores = scores.masked_fill(ignored, -1e4)
    target = torch.arange(len(scores))
    seen = (places[1].abs() < 1).all(-1).flatten().float()
    both = sum(functional.cross_entropy(each, target, reduction="none") for each in (scores, scores.T))
    return 0.5 * (both * seen).sum() / seen.sum().clamp_min(1)


def training_loss(student: Student, pictures: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The two terms for a batch of pictures [N, 3, H, W] in [0, 1]."""
    geometries = [random_geometry(len(pictures), generator) for _ in range(2)]
    views = [make_view(pictures, geometry, generator) for geometry in geometries]
    first = choose_places(views[0], geometries[0], geometries[1], generator)
    second = corresponding(first, geometries[0], geometries[1])
    wholes, maps = student(torch.cat(views))
    (whole_one, whole_two), (map_one, map_two) = wholes.chunk(2), maps.chunk(2)
    return whole_loss(whole_one, whole_two), dense_loss((map_one, map_two), (first, second))


def self_supervised_loss(student: Student, pool: np.ndarray, step: int) -> tuple[Tensor, Tensor]:
    """The two terms on pictures of the pool."""
    generator = torch.Generator().manual_seed(SEED * 1_000_000 + step)
    chosen = torch.randint(len(pool), (BATCH_PICTURES,), generator=generator)
    return training_loss(student, torch.from_numpy(pool[chosen.numpy()]).permute(0, 3, 1, 2).float() / 255, generator)


def supervised_loss(student: Student, step: int) -> tuple[Tensor, Tensor]:
    """Contrasts two pictures of each of many creatures, in different poses, by creature: their CLS tokens, their mean patches."""
    rng, generator = np.random.default_rng([SEED, step, 7]), torch.Generator().manual_seed(SEED * 1_000_000 + step)
    identities = [sample_identity(rng, "train") for _ in range(BATCH_PICTURES)]
    views = []
    for _ in range(2):
        drawn = render_references(identities, [sample_pose(rng) for _ in identities], rng)
        pictures = torch.from_numpy(drawn[:, :, 16:64]).permute(0, 3, 1, 2).float() / 255
        views.append(make_view(pictures, random_geometry(len(pictures), generator), generator))
    wholes, maps = student(torch.cat(views))
    return whole_loss(*wholes.chunk(2)), whole_loss(*maps.mean((2, 3)).chunk(2))


def main() -> None:
    parser = make_parser(__doc__, steps=1500, checkpoint="runs/toy_vision.pt", output=WEIGHTS_FOLDER / "dinov3")
    parser.add_argument("--supervised", type=Path, metavar="FOLDER", help="train with labels instead, to FOLDER/dinov3")
    arguments = parser.parse_args()
    torch.manual_seed(SEED)
    student, checkpoint, output = Student(), arguments.checkpoint, arguments.output
    loss_of = functools.partial(supervised_loss, student)
    if arguments.supervised:
        checkpoint, output = arguments.supervised / "state.pt", arguments.supervised / "dinov3"
    else:
        loss_of = functools.partial(self_supervised_loss, student, draw_pool())

    def make_loss(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        whole, dense = loss_of(step)
        return whole + dense, {"whole": whole.detach(), "dense": dense.detach()}

    train(
        TrainingState(student, make_optimizers(student), averaged=student.encoder),
        make_loss,
        lambda step: min(1.0, (step + 1) / 50, 0.01 + 0.99 * 1.6 * (1 - step / arguments.steps)),
        lambda averaged: save_vision_encoder(copy.deepcopy(averaged), output),
        steps=arguments.steps,
        checkpoint=checkpoint,
        clip_norm=float("inf"),
        save_every=250,
    )


if __name__ == "__main__":
    main()
