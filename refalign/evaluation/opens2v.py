"""OpenS2V-Eval: its prompts, the score files that its evaluator writes, and the totals of its leaderboard.

What needs no network is computed here (motion amplitude). The rest is read from the files of the upstream evaluator; a score
that is absent is absent, and without all of them there is no total.

Source: OpenS2V-Nexus (arXiv 2505.20292), its evaluation scripts and leaderboard.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8

from refalign.errors import ArtifactError
from refalign.io.storage import load_json

Domain = Literal["open", "human"]
WEIGHTS: dict[Domain, dict[str, float]] = {
    "open": {
        "aesthetics": 0.16,
        "motion_smoothness": 0.06,
        "motion_amplitude": 0.02,
        "face_similarity": 0.20,
        "gme": 0.12,
        "nexus": 0.20,
        "natural": 0.24,
    },
    "human": {
        "aesthetics": 0.18,
        "motion_smoothness": 0.09,
        "motion_amplitude": 0.03,
        "face_similarity": 0.25,
        "gme": 0.15,
        "natural": 0.30,
    },
}
"""Domain -> score -> its weight in the total."""
MOTION_FILE = "motionscore.json"
_FACE_KINDS = ("singlehuman", "singleface", "faceobj", "humanobj")
_KEY = re.compile(r"\w[\w.-]{0,99}")
"""Video ids, which become names of files."""
_FLOW_WIDTH_PX = 16
_FARNEBACK = {
    "pyr_scale": 0.5,
    "levels": 3,
    "winsize": 15,
    "iterations": 3,
    "poly_n": 5,
    "poly_sigma": 1.2,
    "flags": 0,
}


@dataclass(frozen=True)
class _Score:
    """Where a score stands in upstream's files and how it becomes a number in [0, 1].

    Attributes:
        files: each holds video id -> value, or video id -> {field: value}; their mean counts.
        limits: values are clipped to them; their ends become 0 and 1.
    """

    files: tuple[str, ...]
    fields: tuple[str, ...] = ()
    limits: tuple[float, float] = (0.0, 1.0)
    skip_zeros: bool = False
    only_faces: bool = False


_SCORES = {
    "aesthetics": _Score(("aesthetic_score.json",), ("aes_score",), (4.0, 7.0)),
    "motion_smoothness": _Score(("motion_smoothness.json",), ("motion_smoothness",)),
    "motion_amplitude": _Score((MOTION_FILE, "motion_amplitude.json"), ("motion_fb",)),
    "face_similarity": _Score(("facesim.json",), ("cur_score",), only_faces=True),
    "gme": _Score(("gmescore.json",), ("gme_score",)),
    # The evaluator's releases name this field differently.
    "nexus": _Score(("nexusscore.json",), ("nexus_score", "retrieval_score"), (0.0, 0.05), skip_zeros=True),
    "natural": _Score(tuple(f"naturalscore_{number}.json" for number in (1, 2, 3)), (), (1.0, 5.0)),
}


@dataclass(frozen=True)
class Prompt:
    """One video to make. ``pictures`` are paths relative to the benchmark's folder, in the order of its subjects."""

    key: str
    text: str
    pictures: tuple[str, ...]


def load_prompts(path: Path) -> list[Prompt]:
    """Prompts of a file like ``Open-Domain_Eval.json``.

    Raises:
        ArtifactError: it is missing, or no such file.
    """
    table = load_json(str(path))
    if table is None:
        raise ArtifactError(f"{path}: not found; give Open-Domain_Eval.json or Human-Domain_Eval.json of OpenS2V-Eval.")
    prompts = []
    for key, entry in table.items():
        try:
            text, pictures = entry["prompt"], entry["img_paths"]
        except (KeyError, TypeError) as error:
            raise ArtifactError(f"{path}: {key!r} has no prompt and img_paths; not a prompt file of OpenS2V-Eval.") from error
        if not (isinstance(text, str) and isinstance(pictures, list) and all(isinstance(each, str) for each in pictures)):
            raise ArtifactError(f"{path}: {key!r} its prompt is no text, or its img_paths no list of texts.")
        if not _KEY.fullmatch(key) or not all(map(_is_below, pictures)):
            raise ArtifactError(f"{path}: {key[:80]!r} names a file outside of the benchmark's folder, or none that can be.")
        prompts.append(Prompt(key, text, tuple(pictures)))
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


def score_folder(folder: Path, domain: Domain) -> dict[str, Any]:
    """Scores in [0, 1] from the evaluator's files in ``folder``.

    Returns:
        "scores": score -> number, or None where it was not run; "videos": score -> number of videos; "total": number or None.

    Raises:
        ArtifactError: a file is damaged.
    """
    values = {name: _load_values(Path(folder), _SCORES[name]) for name in WEIGHTS[domain]}
    scores = {name: _normalise(_SCORES[name], list(found.values())) for name, found in values.items()}
    counts = {name: len(found) for name, found in values.items()}
    return {"domain": domain, "scores": scores, "videos": counts, "total": total(scores, domain)}


def total(scores: Mapping[str, float | None], domain: Domain) -> float | None:
    """Weighted sum of the leaderboard; None while a score is missing."""
    parts = [weight * score for name, weight in WEIGHTS[domain].items() if (score := scores.get(name)) is not None]
    return math.fsum(parts) if len(parts) == len(WEIGHTS[domain]) else None


def describe_scores(result: Mapping[str, Any]) -> str:
    """One line per score, in per cent, and the total if there is one."""
    shown = {
        name: "not run" if value is None else f"{100 * value:6.2f}  ({result['videos'][name]} videos)"
        for name, value in result["scores"].items()
    }
    lines = [f"  {name:18} {text}" for name, text in shown.items()]
    missing = [name for name, value in result["scores"].items() if value is None]
    last = f"  no total: {', '.join(missing)} not run" if missing else f"  {'total':18} {100 * result['total']:6.2f}"
    return "\n".join([f"OpenS2V-Eval, {result['domain']} domain, in per cent", *lines, last])


def _load_values(folder: Path, score: _Score) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for name in score.files:
        for key, entry in (load_json(str(folder / name)) or {}).items():
            if score.only_faces and key.rpartition("_")[0] not in _FACE_KINDS:
                continue
            value = _read_value(folder / name, key, entry, score.fields)
            if value is not None:
                found.setdefault(key, []).append(value)
    means = {key: float(np.mean(values)) for key, values in found.items()}
    return {key: value for key, value in means.items() if value or not score.skip_zeros}


def _read_value(path: Path, key: str, entry: Any, fields: tuple[str, ...]) -> float | None:
    """The number for one video; None where the evaluator noted that it has none."""
    if isinstance(entry, dict):
        entry = next((entry[field] for field in fields if field in entry), None)
    if entry is None:
        return None
    try:
        value = float(entry)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise ArtifactError(f"{path}: {key!r} has {json.dumps(entry)[:80]} where a number was expected; run that score again.")
    return value


def _normalise(score: _Score, values: list[float]) -> float | None:
    if not values:
        return None
    low, high = score.limits
    return (float(np.clip(values, low, high).mean()) - low) / (high - low)


def _is_below(path: str) -> bool:
    return not Path(path).is_absolute() and ".." not in Path(path).parts and path.isprintable()
