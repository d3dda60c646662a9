"""Prompts of the sprite benchmark: held-out subjects, what is said, the pictures given, and clips made wrong on purpose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

import numpy as np
from PIL import Image

from refalign.toy.captions import make_caption
from refalign.toy.drawing import POSES, Pose, render_reference
from refalign.toy.identities import (
    HIDDEN_ATTRIBUTES,
    LIKENESSES,
    Attributes,
    Likeness,
    attributes_of,
    identity_of,
    second_colours,
)
from refalign.toy.rendering import render_empty, render_scene
from refalign.toy.scenes import FRAME_SIZE_PX, ScenePlan, make_scene

SEED = 70
Fault = Literal["truth", "swap", "dominance", "blending", "paste"]
FAULTS: tuple[Fault, ...] = ("truth", "swap", "dominance", "blending", "paste")


@dataclass(frozen=True)
class Given:
    """How a reference shows its subject: another pose than the prompt asks for, at some moment, looking somewhere."""

    pose: Pose
    phase: float
    yaw: float


@dataclass(frozen=True)
class Case:
    """One clip to make.

    Attributes:
        key: names it among all cases.
        plan: what is asked for.
        given: one per subject of the plan; empty where the clip is made from text alone.
        seed: of the noise.
    """

    key: str
    plan: ScenePlan
    prompt: str
    given: tuple[Given, ...]
    seed: int

    @property
    def references(self) -> list[np.ndarray]:
        """The pictures, uint8 [96, 96, 3] each, in the order of the plan's subjects."""
        return [
            render_reference(subject.identity, given.pose, FRAME_SIZE_PX, phase=given.phase, yaw=given.yaw)
            for subject, given in zip(self.plan.subjects, self.given, strict=False)
        ]

    @property
    def named_references(self) -> list[np.ndarray]:
        """The same pictures as the prompt goes through their subjects, from left to right; that is how a model is given them."""
        pictures = zip(self.plan.subjects, self.references, strict=False)
        return [picture for _, picture in sorted(pictures, key=lambda pair: pair[0].x_px[0])]


def make_cases(count: int, *, num_subjects: int, likeness: Likeness | None = None, seed: int = SEED) -> list[Case]:
    """Held-out scenes with ``num_subjects`` subjects, the first two in ``likeness`` (None: as they come)."""
    tier = LIKENESSES.index(likeness) if likeness else len(LIKENESSES)
    cases = []
    for number in range(count):
        plan = make_scene([seed, num_subjects, tier, number], split="heldout", num_subjects=num_subjects, likeness=likeness)
        rng = np.random.default_rng([seed, num_subjects, tier, number, 1])
        given = []
        for subject in plan.subjects:
            pose = POSES[(POSES.index(subject.pose) + int(rng.integers(1, len(POSES)))) % len(POSES)]
            given.append(Given(pose, float(rng.uniform()), float(rng.uniform(-1, 1))))
        key = f"{num_subjects}-{(likeness or 'any').replace(' ', '_')}-{number:03d}"
        cases.append(Case(key, plan, make_caption(plan), tuple(given), seed * 1_000_000 + number))
    return cases


def make_benchmark(per_tier: int, *, seed: int = SEED) -> list[Case]:
    """``per_tier`` cases of one subject, and of two and of three in each tier of likeness."""
    cases = make_cases(per_tier, num_subjects=1, seed=seed)
    for num_subjects in (2, 3):
        for likeness in LIKENESSES:
            cases += make_cases(per_tier, num_subjects=num_subjects, likeness=likeness, seed=seed)
    return cases


def without_references(cases: Sequence[Case]) -> list[Case]:
    """The same cases, of which only what the prompt names can be known."""
    return [replace(case, given=()) for case in cases]


def shuffle_references(cases: Sequence[Case]) -> list[Case]:
    """Each case with the hidden looks of the next of its size, its own poses and names: what chance scores."""
    shuffled = list(cases)
    for size in {len(case.plan.subjects) for case in cases}:
        places = [place for place, case in enumerate(cases) if len(case.plan.subjects) == size]
        for place, other in zip(places, [*places[1:], places[0]], strict=True):
            looks = [subject.identity for subject in cases[other].plan.subjects]
            shuffled[place] = _recast(cases[place], looks)
    return shuffled


def draw_case(case: Case, fault: Fault) -> np.ndarray:
    """A clip of a case as a perfect model would make it, or with one fault on purpose: uint8 [F, 96, 96, 3].

    swap: the first two subjects have each other's hidden looks; dominance: the second has the first's; blending: it has half of
    them; paste: every subject is its reference picture, standing still.
    """
    return _paste(case) if fault == "paste" else render_scene(recast_for(case, fault).plan).frames


def recast_for(case: Case, fault: Fault) -> Case:
    """The case whose right answer is the given one's fault."""
    subjects = case.plan.subjects
    looks = [subject.identity for subject in subjects]
    if fault == "swap":
        looks[:2] = looks[1::-1]
    elif fault == "dominance":
        looks[1] = looks[0]
    elif fault == "blending":
        looks[1] = _blend(subjects[1].identity, subjects[0].identity)
    return _recast(case, looks)


def _recast(case: Case, looks: Sequence[int]) -> Case:
    """The case with the hidden attributes of other identities, its own spoken ones and poses."""
    subjects = tuple(
        replace(subject, identity=_dress(subject.identity, look)) for subject, look in zip(case.plan.subjects, looks, strict=True)
    )
    return replace(case, plan=replace(case.plan, subjects=subjects))


def _dress(identity: int, look: int, names: Sequence[str] = HIDDEN_ATTRIBUTES) -> int:
    """``identity`` with the named attributes of ``look``, but for a second colour that its main colour does not go with."""
    mine, theirs = asdict(attributes_of(identity)), asdict(attributes_of(look))
    taken = {name: theirs[name] for name in names}
    if taken.get("second_colour") not in (None, *second_colours(mine["main_colour"])):
        del taken["second_colour"]
    return identity_of(Attributes(**mine | taken))


def _blend(identity: int, other: int) -> int:
    """Half of the hidden attributes in which the two differ are the other's."""
    mine, theirs = attributes_of(identity), attributes_of(other)
    telling = [name for name in HIDDEN_ATTRIBUTES if getattr(mine, name) != getattr(theirs, name)]
    fitting = [name for name in telling if name != "second_colour"]
    return _dress(identity, other, fitting[: (len(telling) + 1) // 2])


def _paste(case: Case) -> np.ndarray:
    """The scene's place with each reference cut out where its subject would stand, the same in every frame."""
    drawn = render_scene(case.plan)
    frame = Image.fromarray(render_empty(case.plan))
    for number, picture in enumerate(case.references):
        x0, y0, x1, y1 = (int(value) for value in drawn.boxes_xyxy_px[number, 0])
        side = max(x1 - x0, y1 - y0, 8)
        image = Image.fromarray(picture).resize((side, side), Image.Resampling.BOX)
        mask = Image.fromarray(((np.asarray(image).min(2) < 250) * 255).astype(np.uint8))
        frame.paste(image, ((x0 + x1 - side) // 2, y1 - side), mask)
    return np.repeat(np.asarray(frame)[None], case.plan.num_frames, axis=0)
