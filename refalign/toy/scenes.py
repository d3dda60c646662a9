"""What happens in one shot: who appears, where, in which pose, how they move, turn, grow and pass in front of each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from refalign.errors import ConfigError
from refalign.toy.backgrounds import BACKGROUND_PHRASES
from refalign.toy.drawing import POSES, Pose
from refalign.toy.identities import LIKENESSES, Likeness, Split, likeness_of, sample_companion, sample_identity

FRAME_SIZE_PX = 96
NUM_FRAMES = 9
FPS = 16
MAX_SUBJECTS = 3
HEIGHTS_PX: dict[int, tuple[float, float]] = {1: (56.0, 66.0), 2: (45.0, 53.0), 3: (36.0, 43.0)}
"""Range of the standing height, by the number of subjects: as large as fits side by side."""
GROUNDS_PX: dict[int, tuple[float, float]] = {1: (86.0, 94.0), 2: (77.0, 92.0), 3: (70.0, 91.0)}
"""Range of the row that feet stand on, by the number of subjects: low enough that nobody jumps out of the frame."""
PAN_PX = 6
"""The camera's largest travel over a shot."""


@dataclass(frozen=True)
class SubjectPlan:
    """One creature's part in a shot.

    Attributes:
        named: whether the caption says its shape and main colour (else "a creature").
        x_px, height_px, yaw: (first frame, last frame), linear in between.
        ground_px: row its feet stand on; whoever stands lower is in front.
        phase: where in its pose's cycle it starts.
        cycles: cycles of the pose within the shot.
    """

    identity: int
    pose: Pose
    named: bool
    x_px: tuple[float, float]
    ground_px: float
    height_px: tuple[float, float]
    yaw: tuple[float, float]
    phase: float
    cycles: float


@dataclass(frozen=True)
class ScenePlan:
    """One shot. ``subjects`` are sorted from the farthest to the nearest, which is the order of occlusion."""

    subjects: tuple[SubjectPlan, ...]
    background: str
    background_seed: int
    background_named: bool
    pan_px: tuple[float, float]
    likeness: Likeness | None
    """Of the first two cast members; None for a subject alone."""
    num_frames: int = NUM_FRAMES


def make_scene(
    seed: int | Sequence[int],
    *,
    split: Split = "train",
    cast: Sequence[int] | None = None,
    num_subjects: int | None = None,
    likeness: Likeness | None = None,
    background: str | None = None,
) -> ScenePlan:
    """Draws a scene; the same arguments give the same scene.

    Args:
        seed: one integer or several.
        split: whose identities are drawn where ``cast`` is None.
        cast: identities that appear, 1 to ``MAX_SUBJECTS``.
        num_subjects: default: one in 30%, two in 50%, three in 20% of the scenes.
        likeness: tier of the first pair of a drawn cast; by default each tier equally often.
        background: a key of ``BACKGROUND_PHRASES``; by default each equally often.
    """
    rng = np.random.default_rng(seed)
    if cast is None:
        cast = make_cast(rng, split, num_subjects or int(rng.choice([1, 2, 3], p=[0.3, 0.5, 0.2])), likeness)
    if not 1 <= len(cast) <= MAX_SUBJECTS:
        raise ConfigError(f"a scene with {len(cast)} subjects; expected 1 to {MAX_SUBJECTS}.")
    return ScenePlan(
        subjects=_place(rng, cast),
        background=background or str(rng.choice(list(BACKGROUND_PHRASES))),
        background_seed=int(rng.integers(2**31)),
        background_named=bool(rng.random() < 0.85),
        pan_px=_pan(rng),
        likeness=likeness_of(cast[0], cast[1]) if len(cast) > 1 else None,
    )


def make_cast(
    rng: np.random.Generator, split: Split, num_subjects: int, likeness: Likeness | None = None, *, taken: set[int] | None = None
) -> list[int]:
    """Draws identities: the second stands to the first in ``likeness``, the others are unlike it or of the same shape.

    Args:
        taken: identities that may not appear; the new ones are added to it.
    """
    taken = set() if taken is None else taken
    cast = [sample_identity(rng, split, taken=taken)]
    for member in range(1, num_subjects):
        tier = (likeness or rng.choice(LIKENESSES)) if member == 1 else rng.choice(LIKENESSES[:2])
        cast.append(sample_companion(rng, cast[0], tier, split, taken={*taken, *cast}))
    taken.update(cast)
    return cast


def _pan(rng: np.random.Generator) -> tuple[float, float]:
    """Camera offset at both ends; still in half of the shots."""
    start = float(rng.uniform(0, PAN_PX))
    return (start, start) if rng.random() < 0.5 else (start, float(rng.uniform(0, PAN_PX)))


def _place(rng: np.random.Generator, cast: Sequence[int]) -> tuple[SubjectPlan, ...]:
    """Gives every cast member a slot of the frame's width, then a pose and a path from there; farthest first."""
    count = len(cast)
    # One alone is too large for a third of the frame; it stands on the left, in the middle or on the right all the same.
    slots = rng.permutation(count) if count > 1 else [0.35 * float(rng.integers(-1, 2))]
    # In a third of the shared scenes somebody walks up to another: that is where real occlusion comes from.
    crossing = count > 1 and rng.random() < 0.35
    plans = []
    for member, (identity, slot) in enumerate(zip(cast, slots, strict=True)):
        pose: Pose = "walking" if crossing and member == 0 else POSES[int(rng.integers(len(POSES)))]
        height = float(rng.uniform(*HEIGHTS_PX[count]))
        growth = float(rng.uniform(0.95, 1.06))
        start = FRAME_SIZE_PX * (slot + 0.5) / count + float(rng.uniform(-0.1, 0.1)) * FRAME_SIZE_PX / count
        towards = FRAME_SIZE_PX * (slots[1] + 0.5) / count if crossing and member == 0 else None
        end = _destination(rng, pose, start, towards)
        look = float(rng.uniform(-0.8, 0.8))
        yaw = (look, look + float(rng.uniform(-0.2, 0.2)))
        margin = 0.48 * height * max(1.0, growth)
        plans.append(
            SubjectPlan(
                identity=identity,
                pose=pose,
                named=bool(rng.random() < 0.6),
                x_px=(_inside(start, margin), _inside(end, margin)),
                ground_px=float(rng.uniform(*GROUNDS_PX[count])),
                height_px=(height, height * growth),
                yaw=(0.9 if end > start else -0.9, 0.7 if end > start else -0.7) if pose == "walking" else yaw,
                phase=float(rng.uniform()),
                cycles=float(rng.uniform(0.4, 0.65)),
            )
        )
    return tuple(sorted(plans, key=lambda plan: plan.ground_px))


def _destination(rng: np.random.Generator, pose: Pose, start: float, towards: float | None) -> float:
    """Where a subject that starts at ``start`` (px) ends up; ``towards``: whom it walks up to."""
    if towards is not None:
        return start + float(np.clip(0.7 * (towards - start), -22, 22))
    if pose == "walking":
        return start + float(rng.choice([-1, 1])) * float(rng.uniform(7, 15))
    return start + (0.0 if pose == "sleeping" else float(rng.uniform(-3, 3)))


def _inside(x_px: float, margin_px: float) -> float:
    return min(max(x_px, margin_px), FRAME_SIZE_PX - margin_px)
