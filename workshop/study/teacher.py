"""Trains the study's labelled upper bound: a vision encoder that is shown which pictures are of one creature.

uv run -m workshop.study.teacher --output FOLDER

Two pictures of each of many creatures, in poses of their own, are contrasted by creature: as CLS, and as mean of the patches. No
vision encoder of a pipeline knows that of its pictures.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from refalign.toy.identities import sample_identity
from refalign.toy.rendering import render_references
from workshop.weights.sampling import sample_pose
from workshop.weights.train_vision_encoder import (
    BATCH_PICTURES,
    SEED,
    Student,
    make_view,
    random_geometry,
    train_student,
    whole_loss,
)
from workshop.weights.training import parse_arguments


def supervised_loss(student: Student, step: int) -> tuple[Tensor, Tensor]:
    """The two terms on the pictures of a step."""
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
    folder = Path("runs/study_teacher")
    arguments = parse_arguments(__doc__, steps=900, checkpoint=f"{folder}/state.pt", output=folder / "dinov3")
    torch.manual_seed(SEED)
    student = Student()

    def make_loss(step: int) -> tuple[Tensor, dict[str, Any]]:
        whole, patches = supervised_loss(student, step)
        return whole + patches, {"whole": whole.detach(), "patches": patches.detach()}

    train_student(student, make_loss, arguments)


if __name__ == "__main__":
    main()
