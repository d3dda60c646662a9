"""The videos of OpenS2V-Eval in the folder layout of its evaluator, spread over workers, and its scores."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

from refalign.config import RunConfig
from refalign.errors import ArtifactError, ConfigError
from refalign.evaluation.making import VideoMaker
from refalign.evaluation.opens2v import MOTION_FILE, Domain, load_prompts, motion_amplitude, score_folder
from refalign.io.images import read_image, write_mp4
from refalign.io.writing import write_json
from refalign.pipeline.ray_data import complete_parts
from refalign.pipeline.steps import Step


def run_opens2v(config: RunConfig, model: Path, prompts: Path, output: Path) -> dict[str, Any]:
    """Makes what is missing of the videos, has them evaluated, and writes the manifest with the scores.

    In the step's folder, ``parts/<video id>.mp4`` are the videos and ``scores/*.json`` the evaluator's files.

    Args:
        model: an exported folder, or an official model converted.
        prompts: ``Open-Domain_Eval.json`` or ``Human-Domain_Eval.json``, its pictures beside it.

    Raises:
        ArtifactError: prompts or pictures are missing.
        ConfigError: the external evaluator failed.
    """
    from refalign.tracking.registry import digest_weights

    domain: Domain = "human" if prompts.name.startswith("Human") else "open"
    wanted = load_prompts(prompts)
    pictures = [prompts.parent / picture for prompt in wanted for picture in prompt.pictures]
    if missing := [path for path in pictures if not path.is_file()]:
        raise ArtifactError(
            f"{len(missing)} of {len(pictures)} pictures are missing, first {missing[0]}; keep Images/ beside it."
        )
    plan = {
        f"{prompt.key}.mp4": {
            "prompt": prompt.text,
            "pictures": [str((prompts.parent / picture).resolve()) for picture in prompt.pictures],
            "model": str(model),
            "seed": config.seed,
        }
        for prompt in wanted
    }
    settings = (config.evaluation.describe_videos(), config.video)
    step = Step.make(output, "evaluate", "opens2v", *settings, digest_weights(model), plan)
    with step.lease():
        records = complete_parts(step, plan, OpenS2VActor, config, label="opens2v")
        scores = step.folder / "scores"
        motion = {name.removesuffix(".mp4"): {"motion_fb": record["motion_fb"]} for name, record in records.items()}
        write_json(scores / MOTION_FILE, motion)
        if config.evaluation.opens2v_evaluator:
            _run_evaluator(config.evaluation.opens2v_evaluator, prompts, step, scores)
        return step.commit({"videos": len(plan), "folder": str(step.parts_folder), **score_folder(scores, domain)})


class OpenS2VActor:
    """One pipeline; a video per call."""

    def __init__(self, config: RunConfig) -> None:
        import torch

        torch.set_num_threads(config.cluster.threads)
        self.maker = VideoMaker(config, "cuda" if torch.cuda.is_available() else "cpu")

    def make_part(self, step: Step, name: str, work: dict[str, Any]) -> dict[str, Any]:
        """Makes one video and measures what needs no network."""
        pictures = [read_image(Path(path)) for path in work["pictures"]]
        frames = self.maker.make(work["model"], work["prompt"], pictures, work["seed"])
        record = {"motion_fb": motion_amplitude(frames)}

        def write(path: Path) -> dict[str, Any]:
            write_mp4(path, frames, self.maker.config.video.fps)
            return record

        return step.write_part(name, write)


def _run_evaluator(command: str, prompts: Path, step: Step, scores: Path) -> None:
    """Runs the user's command; it finds its folders in the environment."""
    places = {"PROMPTS": prompts.resolve(), "VIDEOS": step.parts_folder, "SCORES": scores}
    done = subprocess.run(shlex.split(command), env={**os.environ, **{name: str(path) for name, path in places.items()}})
    if done.returncode:
        raise ConfigError(
            f"evaluation.opens2v_evaluator={json.dumps(command)} ended with {done.returncode}; the videos are kept in "
            f"{step.parts_folder}, the same command asks for the scores again."
        )
