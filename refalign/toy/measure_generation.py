"""What generated sprite clips show: subjects found by the judges' detector, attributes and poses read by the reader.

Prompts and references are of held-out identities. Without references the *spoken* attributes are scored (does the model follow
text?), with references the *unspoken* ones too (did it look?), beside the same videos scored against shuffled references.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from refalign.models.yolo import Detector, load_detector
from refalign.toy.captions import make_caption
from refalign.toy.drawing import POSES, render_reference
from refalign.toy.identities import HIDDEN_ATTRIBUTES, SPOKEN_ATTRIBUTES
from refalign.toy.judges import VOCABULARIES, Judge, Reading, cut_crops, encode_truth
from refalign.toy.scenes import FRAME_SIZE_PX, NUM_FRAMES, ScenePlan, make_scene

SEED = 70
OPTIONS = {"num_inference_steps": 20, "guidance_scale": 4.0, "reference_guidance_scale": 3.0}
"""Of generation, as the toy preset has them."""
MIN_SCORE = 0.5
MIN_FRAMES = NUM_FRAMES // 2
"""Frames that a subject must be found in to count."""


@dataclass(frozen=True)
class Case:
    """One clip to make: what is asked for, and the pictures given (uint8 [H, W, 3] each, in the order of the plan's subjects)."""

    plan: ScenePlan
    prompt: str
    references: tuple[np.ndarray, ...]
    seed: int


def make_cases(count: int, *, num_subjects: int, seed: int = SEED) -> list[Case]:
    """Held-out scenes; each reference shows its subject in another pose than the scene does, looking elsewhere."""
    cases = []
    for number in range(count):
        plan = make_scene([seed, num_subjects, number], split="heldout", num_subjects=num_subjects)
        rng = np.random.default_rng([seed, num_subjects, number, 1])
        pictures = []
        for subject in plan.subjects:
            pose = POSES[(POSES.index(subject.pose) + int(rng.integers(1, len(POSES)))) % len(POSES)]
            phase, yaw = float(rng.uniform()), float(rng.uniform(-1, 1))
            pictures.append(render_reference(subject.identity, pose, FRAME_SIZE_PX, phase=phase, yaw=yaw))
        cases.append(Case(plan, make_caption(plan), tuple(pictures), seed * 1_000_000 + number))
    return cases


def generate(pipeline: Any, cases: Sequence[Case], *, with_references: bool, **options: Any) -> np.ndarray:
    """Clips of the cases, which must have equally many subjects: uint8 [N, F, H, W, 3]."""
    return (
        pipeline(
            [case.prompt for case in cases],
            [case.references for case in cases] if with_references else [],
            height=FRAME_SIZE_PX,
            width=FRAME_SIZE_PX,
            num_frames=NUM_FRAMES,
            generator=[torch.Generator().manual_seed(case.seed) for case in cases],
            output_type="uint8",
            **options,
        )
        .frames.cpu()
        .numpy()
    )


def find_subjects(detector: Detector, frames: np.ndarray) -> list[np.ndarray]:
    """Crops [F', 64, 64, 3] of every subject that is followed through at least ``MIN_FRAMES`` frames, F' frames each."""
    boxes: dict[int, dict[int, np.ndarray]] = {}
    for number, found in enumerate(detector.track(frames)):
        assert found.track_ids is not None
        for track, box in zip(found.track_ids.tolist(), found.boxes_xyxy_px, strict=True):
            boxes.setdefault(track, {})[number] = box
    return [
        cut_crops(frames[list(track)], np.stack(list(track.values())))
        for _, track in sorted(boxes.items())
        if len(track) >= MIN_FRAMES
    ]


def assign(readings: Sequence[Reading], truths: Sequence[dict[str, int]], questions: Sequence[str]) -> list[Reading | None]:
    """For each wanted subject the reading that stands for it (None: nothing is left for it), by the likeliest pairing."""
    if not readings:
        return [None] * len(truths)
    cost = np.array(
        [
            [-sum(np.log(reading.probabilities[name][truth[name]] + 1e-4) for name in questions) for reading in readings]
            for truth in truths
        ]
    )
    rows, columns = linear_sum_assignment(cost)
    chosen = dict(zip(rows.tolist(), columns.tolist(), strict=True))
    return [readings[chosen[number]] if number in chosen else None for number in range(len(truths))]


def score(cases: Sequence[Case], readings: Sequence[Sequence[Reading]], questions: Sequence[str]) -> dict[str, float]:
    """Question -> share of wanted subjects that show it; a missing subject shows nothing.

    Spoken attributes are asked only of the subjects whose attributes the prompt names.
    """
    right: dict[str, list[bool]] = {name: [] for name in questions}
    for case, found in zip(cases, readings, strict=True):
        truths = [encode_truth(subject.identity, subject.pose) for subject in case.plan.subjects]
        asked = [name for name in questions if name not in SPOKEN_ATTRIBUTES or all(s.named for s in case.plan.subjects)]
        for subject, truth, reading in zip(case.plan.subjects, truths, assign(found, truths, asked or questions), strict=True):
            for name in questions:
                if name in SPOKEN_ATTRIBUTES and not subject.named and not case.references:
                    continue
                answer = reading.answers[name] if reading else None
                right[name].append(answer == VOCABULARIES[name][truth[name]])
    return {name: float(np.mean(values)) if values else float("nan") for name, values in right.items()}


def read_clips(judge: Judge, detector: Detector, clips: np.ndarray) -> list[list[Reading]]:
    """What is seen in each clip."""
    return [[judge.read(crops[None])[0] for crops in find_subjects(detector, frames)] for frames in clips]


def without_references(cases: Sequence[Case]) -> list[Case]:
    """The same cases, of which only what the prompt names can be known."""
    return [Case(case.plan, case.prompt, (), case.seed) for case in cases]


def shuffle_truth(cases: Sequence[Case]) -> list[Case]:
    """Each case with the identities of the next one, its own poses and names: what chance scores."""
    from dataclasses import replace

    shuffled = []
    for case, other in zip(cases, [*cases[1:], cases[0]], strict=True):
        pairs = zip(case.plan.subjects, other.plan.subjects, strict=True)
        subjects = tuple(replace(mine, identity=theirs.identity) for mine, theirs in pairs)
        shuffled.append(replace(case, plan=replace(case.plan, subjects=subjects)))
    return shuffled


def evaluate(
    pipeline: Any, judges: Path, clips: int, *, with_references: bool, **options: Any
) -> tuple[dict[str, float], list[np.ndarray]]:
    """Figures over ``clips`` clips with one subject and as many with two, and the clips themselves."""
    detector = load_detector(judges / "detector", min_score=MIN_SCORE)
    judge = Judge.load(judges / "reader")
    figures: dict[str, float] = {}
    pictures = []
    for num_subjects in (1, 2):
        cases = make_cases(clips, num_subjects=num_subjects)
        made = [
            generate(pipeline, cases[start : start + 8], with_references=with_references, **options)
            for start in range(0, clips, 8)
        ]
        videos = np.concatenate(made)
        pictures += [np.concatenate([*case.references, *frames[::4]], 1) for case, frames in zip(cases, videos, strict=True)]
        readings = read_clips(judge, detector, videos)
        found = np.mean([len(each) for each in readings])
        figures[f"subjects found of {num_subjects}"] = float(found)
        asked = (*SPOKEN_ATTRIBUTES, *HIDDEN_ATTRIBUTES, "pose") if with_references else (*SPOKEN_ATTRIBUTES, "pose")
        known = cases if with_references else without_references(cases)
        for name, value in score(known, readings, asked).items():
            figures[f"{name} ({num_subjects})"] = value
        for name, value in score(shuffle_truth(known), readings, asked).items():
            figures[f"{name} ({num_subjects}) by chance"] = value
    return figures, pictures
