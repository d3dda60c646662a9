"""OpenS2V-Eval: videos of its prompts in its evaluator's layout, and the totals of its leaderboard.

Motion amplitude is computed here; it needs no network. The other scores are read from the files of the upstream evaluator.
Without all scores there is no total.

Source: OpenS2V-Nexus (arXiv 2505.20292), its evaluation scripts and leaderboard.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8
from pydantic import BaseModel, FiniteFloat, TypeAdapter, ValidationError

from refalign.config import RunConfig, describe_problems
from refalign.errors import ArtifactError, ConfigError
from refalign.evaluation.worker import Model, VideoMaker, commit_part
from refalign.io.images import read_image, write_mp4
from refalign.io.storage import load_json
from refalign.io.writing import write_json
from refalign.pipeline.ray_data import complete_parts
from refalign.pipeline.steps import Step

Domain = Literal["open", "human"]
MOTION_FILE = "motionscore.json"
_FACE_KINDS = ("singlehuman", "singleface", "faceobj", "humanobj")
_KEY = re.compile(r"\w[\w.-]{0,99}")
"""Video ids, which become names of files."""
_NUMBER = TypeAdapter(FiniteFloat)
_FLOW_WIDTH_PX = 16
_FARNEBACK = {"pyr_scale": 0.5, "levels": 3, "winsize": 15, "iterations": 3, "poly_n": 5, "poly_sigma": 1.2, "flags": 0}


@dataclass(frozen=True)
class _Score:
    """Where a score is in upstream's files, and how it becomes a number in [0, 1].

    Attributes:
        weights: in the total, by domain.
        files: each holds video id -> value, or video id -> {field: value}; their mean counts.
        limits: values are clipped to them; they become 0 and 1.
    """

    weights: Mapping[Domain, float]
    files: tuple[str, ...]
    fields: tuple[str, ...] = ()
    limits: tuple[float, float] = (0.0, 1.0)
    skip_zeros: bool = False
    only_faces: bool = False


_SCORES = {
    "aesthetics": _Score({"open": 0.16, "human": 0.18}, ("aesthetic_score.json",), ("aes_score",), (4.0, 7.0)),
    "motion_smoothness": _Score({"open": 0.06, "human": 0.09}, ("motion_smoothness.json",), ("motion_smoothness",)),
    "motion_amplitude": _Score({"open": 0.02, "human": 0.03}, (MOTION_FILE, "motion_amplitude.json"), ("motion_fb",)),
    "face_similarity": _Score({"open": 0.20, "human": 0.25}, ("facesim.json",), ("cur_score",), only_faces=True),
    "gme": _Score({"open": 0.12, "human": 0.15}, ("gmescore.json",), ("gme_score",)),
    # The evaluator's releases name this field differently.
    "nexus": _Score({"open": 0.20}, ("nexusscore.json",), ("nexus_score", "retrieval_score"), (0.0, 0.05), skip_zeros=True),
    "natural": _Score(
        {"open": 0.24, "human": 0.30}, tuple(f"naturalscore_{number}.json" for number in (1, 2, 3)), limits=(1.0, 5.0)
    ),
}


class Scores(BaseModel):
    """Scores in [0, 1].

    Attributes:
        scores: None for a score that was not run.
        videos: number of videos by score.
        total: None while a score is missing.
    """

    domain: Domain
    scores: dict[str, float | None]
    videos: dict[str, int]
    total: float | None

    def describe(self) -> str:
        """One line per score, in per cent, and the total if there is one."""
        lines = [f"OpenS2V-Eval, {self.domain} domain, in per cent"]
        for name, value in self.scores.items():
            shown = "not run" if value is None else f"{100 * value:6.2f}  ({self.videos[name]} videos)"
            lines.append(f"  {name:18} {shown}")
        missing = ", ".join(name for name, value in self.scores.items() if value is None)
        lines.append(f"  {'total':18} {100 * self.total:6.2f}" if self.total is not None else f"  no total: {missing} not run")
        return "\n".join(lines)


class OpenS2VManifest(Scores):
    """Of a step outside of a run; ``folder`` holds the videos."""

    folder: str


class Prompt(BaseModel):
    """One video to make; ``img_paths`` are relative to the benchmark's folder, in the order of its subjects."""

    prompt: str
    img_paths: list[str]


def load_prompts(path: Path) -> dict[str, Prompt]:
    """Prompts by video id, of a file like ``Open-Domain_Eval.json``.

    Raises:
        ArtifactError: it is missing, or it is no such file.
    """
    table = load_json(str(path))
    if table is None:
        raise ArtifactError(f"{path}: not found; give Open-Domain_Eval.json or Human-Domain_Eval.json of OpenS2V-Eval.")
    prompts = {}
    for key, entry in table.items():
        try:
            prompts[key] = Prompt.model_validate(entry)
        except ValidationError as error:
            problems = describe_problems(error)
            raise ArtifactError(f"{path}: {key[:80]!r}: {problems}; not a prompt file of OpenS2V-Eval.") from error
        if not _KEY.fullmatch(key) or not all(map(_is_below, prompts[key].img_paths)):
            raise ArtifactError(f"{path}: {key[:80]!r} names a file outside of the benchmark's folder, or an invalid name.")
    if not prompts:
        raise ArtifactError(f"{path}: no prompt in it.")
    return prompts


def motion_amplitude(frames: UInt8[np.ndarray, "F H W 3"]) -> float:
    """Magnitude of the mean signed optical flow of a video, in pixels per frame.

    Farneback's flow between all consecutive frames, each averaged down to 16 pixels of width; x and y count alike, so that
    opposite motions cancel. Grey is made from RGB by the formula for BGR, as upstream does.
    """
    import cv2

    grey = [cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY) for frame in frames]
    size = (_FLOW_WIDTH_PX, int(frames.shape[1] * _FLOW_WIDTH_PX / frames.shape[2]))
    flows = [cv2.calcOpticalFlowFarneback(*pair, None, **_FARNEBACK) for pair in zip(grey, grey[1:], strict=False)]  # ty: ignore
    return abs(float(np.mean([cv2.resize(flow, size, interpolation=cv2.INTER_AREA) for flow in flows])))


def score_folder(folder: Path, domain: Domain) -> Scores:
    """Scores from the evaluator's files in ``folder``.

    Raises:
        ArtifactError: a file is damaged.
    """
    values = {name: _load_values(folder, score) for name, score in _SCORES.items() if domain in score.weights}
    scores = {name: _normalise(_SCORES[name], found) for name, found in values.items()}
    counts = {name: len(found) for name, found in values.items()}
    return Scores(domain=domain, scores=scores, videos=counts, total=total(scores, domain))


def total(scores: Mapping[str, float | None], domain: Domain) -> float | None:
    """Weighted sum of the leaderboard; None while a score is missing."""
    weights = {name: score.weights[domain] for name, score in _SCORES.items() if domain in score.weights}
    parts = [weight * score for name, weight in weights.items() if (score := scores.get(name)) is not None]
    return math.fsum(parts) if len(parts) == len(weights) else None


def run_opens2v(config: RunConfig, model: Path, prompts: Path, output: Path) -> OpenS2VManifest:
    """Makes the missing videos, runs the evaluator if the settings name one, and writes the manifest with the scores.

    In the step's folder, ``parts/<video id>.mp4`` are the videos and ``scores/*.json`` the evaluator's files.

    Args:
        model: an exported folder, or an official model converted.
        prompts: ``Open-Domain_Eval.json`` or ``Human-Domain_Eval.json``, beside its folder ``Images/``.

    Raises:
        ArtifactError: prompts or pictures are missing.
        ConfigError: the external evaluator failed.
    """
    from refalign.tracking.registry import digest_weights

    plan = {}
    for key, each in load_prompts(prompts).items():
        pictures = [str((prompts.parent / path).resolve()) for path in each.img_paths]
        plan[f"{key}.mp4"] = OpenS2VWork(each.prompt, pictures, str(model), config.seed)
    pictures = [path for work in plan.values() for path in work.pictures]
    if missing := [path for path in pictures if not Path(path).is_file()]:
        raise ArtifactError(
            f"{len(missing)} of {len(pictures)} pictures are missing, first {missing[0]}; keep Images/ beside {prompts.name}."
        )
    settings = (config.evaluation.describe_videos(), config.video, digest_weights(model))
    step = Step.make(output, "evaluate", "opens2v", *settings, {name: asdict(work) for name, work in plan.items()})
    with step.lease():
        commits = complete_parts(step, plan, OpenS2VActor, config, label="opens2v")
        scores = step.folder / "scores"
        motion = {name.removesuffix(".mp4"): {"motion_fb": commit["motion_fb"]} for name, commit in commits.items()}
        write_json(scores / MOTION_FILE, motion)
        if config.evaluation.opens2v_evaluator:
            _run_evaluator(config.evaluation.opens2v_evaluator, prompts, step, scores)
        found = score_folder(scores, "human" if prompts.name.startswith("Human") else "open")
        manifest = OpenS2VManifest(folder=str(step.parts_folder), **found.model_dump())
        step.commit(manifest.model_dump(mode="json"))
    return manifest


@dataclass(frozen=True)
class OpenS2VWork:
    """One video; ``pictures`` are absolute paths."""

    prompt: str
    pictures: list[str]
    model: str
    seed: int


class OpenS2VActor:
    """One pipeline; a video per call."""

    def __init__(self, config: RunConfig) -> None:
        self.maker = VideoMaker(config)

    def make_part(self, step: Step, name: str, work: OpenS2VWork) -> dict[str, Any]:
        """Makes one video and measures its motion."""
        pictures = [read_image(Path(path)) for path in work.pictures]
        frames = self.maker.make(Model(work.model), work.prompt, pictures, work.seed)
        fps = self.maker.config.video.fps
        return commit_part(step, name, lambda path: write_mp4(path, frames, fps), {"motion_fb": motion_amplitude(frames)})


def _run_evaluator(command: str, prompts: Path, step: Step, scores: Path) -> None:
    """Runs the user's command; it finds its folders in the environment."""
    places = {"PROMPTS": str(prompts.resolve()), "VIDEOS": str(step.parts_folder), "SCORES": str(scores)}
    done = subprocess.run(shlex.split(command), env=os.environ | places)
    if done.returncode:
        raise ConfigError(
            f"evaluation.opens2v_evaluator={json.dumps(command)} ended with {done.returncode}. The videos are kept in "
            f"{step.parts_folder}; run the same command again to score them."
        )


def _load_values(folder: Path, score: _Score) -> list[float]:
    """One number per video: the mean over the score's files."""
    found: dict[str, list[float]] = {}
    for name in score.files:
        for key, entry in (load_json(str(folder / name)) or {}).items():
            if score.only_faces and key.rpartition("_")[0] not in _FACE_KINDS:
                continue
            if isinstance(entry, dict):
                entry = next((entry[field] for field in score.fields if field in entry), None)
            if entry is None:  # the evaluator has no number for this video
                continue
            try:
                found.setdefault(key, []).append(_NUMBER.validate_python(entry))
            except ValidationError as error:
                what = f"{folder / name}: {key!r} has {json.dumps(entry)[:80]} where a number was expected"
                raise ArtifactError(f"{what}; run that score again.") from error
    means = [float(np.mean(values)) for values in found.values()]
    return [value for value in means if value or not score.skip_zeros]


def _normalise(score: _Score, values: list[float]) -> float | None:
    low, high = score.limits
    return (float(np.clip(values, low, high).mean()) - low) / (high - low) if values else None


def _is_below(path: str) -> bool:
    return not Path(path).is_absolute() and ".." not in Path(path).parts and path.isprintable()
