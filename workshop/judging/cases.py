"""Prompts of the toy benchmark: held-out subjects, what is said, the pictures given, and clips made wrong on purpose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal, get_args

import numpy as np

from refalign.toy import identities
from refalign.toy.drawing import Pose
from refalign.toy.identities import HIDDEN_ATTRIBUTES, LIKENESSES, Likeness, Split, attributes_of
from refalign.toy.rendering import render_references, render_scenes
from refalign.toy.scenes import NUM_FRAMES, ScenePlan, make_caption, make_scene
from workshop.weights.sampling import sample_pose

SEED = 70
Fault = Literal["truth", "swap", "dominance", "blending", "paste"]
FAULTS: tuple[Fault, ...] = get_args(Fault)


@dataclass(frozen=True)
class Case:
    """One clip to make."""

    key: str
    plan: ScenePlan
    given: tuple[Pose, ...]  # of each subject in its reference, in another action than the plan's; empty without references
    seed: int  # of the noise
    shown: tuple[int, ...] = ()  # identities in the references, if not those of the plan

    @property
    def prompt(self) -> str:
        return make_caption(self.plan)

    @property
    def references(self) -> list[np.ndarray]:
        """The pictures, uint8 [H, W, 3] each, in the order of the subjects."""
        if not self.given:
            return []
        return [*render_references(self.shown or self.plan.identities, self.given)]


def make_cases(
    count: int, *, num_subjects: int, likeness: Likeness | None = None, seed: int = SEED, split: Split = "heldout"
) -> list[Case]:
    """Scenes with ``num_subjects`` subjects, the first two of ``likeness`` (None: any)."""
    tier = LIKENESSES.index(likeness) if likeness else len(LIKENESSES)
    cases = []
    for number in range(count):
        words = [seed, num_subjects, tier, number]
        plan = make_scene(words, split=split, num_subjects=num_subjects, likeness=likeness)
        rng = np.random.default_rng([*words, 1])
        given = tuple(_other_pose(rng, subject.action) for subject in plan.subjects)
        key = f"{num_subjects}-{(likeness or 'any').replace(' ', '_')}-{number:03d}"
        cases.append(Case(key, plan, given, seed * 1_000_000 + number))
    return cases


def _other_pose(rng: np.random.Generator, action: str) -> Pose:
    while (pose := sample_pose(rng)).action == action or pose.blink:
        pass
    return replace(pose, lift=0.0)


def make_benchmark(per_tier: int, *, seed: int = SEED, split: Split = "heldout") -> list[Case]:
    """``2 * per_tier`` cases of one subject, and ``per_tier`` of two and of three in each tier of likeness."""
    cases = make_cases(2 * per_tier, num_subjects=1, seed=seed, split=split)
    for num_subjects in (2, 3):
        for likeness in LIKENESSES:
            cases += make_cases(per_tier, num_subjects=num_subjects, likeness=likeness, seed=seed, split=split)
    return cases


def without_references(cases: Sequence[Case]) -> list[Case]:
    """The same cases without references. Their prompts name every subject."""
    named = [tuple(replace(subject, named=True) for subject in case.plan.subjects) for case in cases]
    return [replace(case, plan=replace(case.plan, subjects=each), given=()) for case, each in zip(cases, named, strict=True)]


def shuffle_references(cases: Sequence[Case]) -> list[Case]:
    """Each case with the hidden looks of the next of its size, its own poses and names: scores against it are chance."""
    shuffled = list(cases)
    for size in {len(case.plan.subjects) for case in cases}:
        places = [place for place, case in enumerate(cases) if len(case.plan.subjects) == size]
        for place, other in zip(places, [*places[1:], places[0]], strict=True):
            shuffled[place] = _recast(cases[place], cases[other].plan.identities)
    return shuffled


def mislead(cases: Sequence[Case]) -> list[Case]:
    """The cases, each with the references of its shuffled twin: fidelity to its own plan is then chance."""
    return [replace(case, shown=other.plan.identities) for case, other in zip(cases, shuffle_references(cases), strict=True)]


def exchange_references(cases: Sequence[Case]) -> list[Case]:
    """The cases of several subjects. In their references the first two have each other's hidden looks."""
    return [recast_for(case, "swap") for case in cases if len(case.plan.subjects) > 1]


def draw_case(case: Case, fault: Fault) -> np.ndarray:
    """A clip of a case as a perfect model would make it, or with one fault: uint8 [F, H, W, 3].

    swap: the first two subjects have each other's hidden looks; dominance: the second has the first's; blending: it has half of
    them; paste: every subject keeps the pose of its reference.
    """
    if fault == "paste":
        (still,) = render_scenes([case.plan], 1, poses=case.given)
        return np.repeat(still.frames, NUM_FRAMES, axis=0)
    return render_scenes([recast_for(case, fault).plan])[0].frames


def recast_for(case: Case, fault: Fault) -> Case:
    """The case whose correct clip shows the fault in the given case."""
    first, *others = case.plan.identities
    if fault == "swap":
        return _recast(case, [others[0], first, *others[1:]])
    if fault == "dominance":
        return _recast(case, [first, first, *others[1:]])
    if fault == "blending":
        return _recast(case, [first, _blend(others[0], first), *others[1:]])
    return case


def _recast(case: Case, looks: Sequence[int]) -> Case:
    """The case with the hidden attributes of other identities, its own spoken ones and poses."""
    pairs = zip(case.plan.subjects, looks, strict=True)
    subjects = tuple(replace(subject, identity=_dress(subject.identity, look)) for subject, look in pairs)
    return replace(case, plan=replace(case.plan, subjects=subjects))


def _dress(identity: int, look: int, names: Sequence[str] = HIDDEN_ATTRIBUTES) -> int:
    """``identity`` with the named attributes of ``look``, except colours that do not go with its main colour."""
    mine, theirs = asdict(attributes_of(identity)), asdict(attributes_of(look))
    words = identities.vocabularies(mine["main_colour"])
    taken = {name: theirs[name] for name in names if theirs[name] in words[name]}
    return identities.identity_of(identities.Attributes(**mine | taken))


def _blend(identity: int, other: int) -> int:
    """Half of the hidden attributes in which the two differ are the other's."""
    mine, theirs = attributes_of(identity), attributes_of(other)
    words = identities.vocabularies(mine.main_colour)
    telling = [name for name in HIDDEN_ATTRIBUTES if getattr(mine, name) != getattr(theirs, name)]
    fitting = [name for name in telling if getattr(theirs, name) in words[name]]
    return _dress(identity, other, fitting[: len(telling) // 2])
