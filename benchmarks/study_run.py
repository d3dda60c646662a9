"""One job of the study: train, evaluate at several steps, write one JSON. What is done is never done again.

The training folder holds checkpoints and generated clips until the JSON is there. Where the judges cannot be loaded (no
ultralytics, SciPy or scikit-learn), clips wait for a machine that has them: the same command there only judges.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recording import describe_machine
from study_arms import ARMS, PRIMARY, Budget, Job, make_config
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from refalign.config import RunConfig
from refalign.evaluation.separability import block_features, collect_references, measure
from refalign.generation import RefAlignPipeline, make_scheduler
from refalign.shards.reader import ShardIndex
from refalign.toy.benchmark import OPTIONS, iter_generated
from refalign.toy.cases import Case, make_benchmark, make_cases, shuffle_references
from refalign.toy.identities import LIKENESSES
from refalign.toy.optim import autocast_where_fast
from refalign.toy.train_transformer import build_joint
from refalign.training.checkpoint import load_checkpoint
from refalign.training.loop import train
from refalign.training.models import build_models
from refalign.training.optim import Ema
from refalign.training.records import read_records
from refalign.writing import write_json

_JUDGING = ("ultralytics", "scipy", "sklearn")
_REFERENCES = (24, 3)
"""Held-out subjects, and references of each, whose separability is measured."""


@dataclass(frozen=True)
class Place:
    """Where a study reads and writes.

    Attributes:
        start: base weights in the diffusers layout.
        shards: by `study_targets.Kind`.
        raw_prompts: the shards hold plain token embeddings, which the start's text encoder reads first.
        tracking: MLflow's address; None tracks nothing.
    """

    output: Path
    start: Path
    shards: dict[str, Path]
    judges: Path
    raw_prompts: bool = True
    tracking: str | None = None

    def result(self, job: Job) -> Path:
        return self.output / "results" / f"{job.name}.json"

    def folder(self, job: Job) -> Path:
        return self.output / "runs" / job.name


def is_done(place: Place, job: Job) -> bool:
    """Whether the job's JSON is there and whole; a half-written one does not count."""
    return load_result(place.result(job)) is not None


def load_result(path: Path) -> dict[str, Any] | None:
    """A finished result, or None."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and record.get("complete") is True else None


def run_job(place: Place, base: RunConfig, job: Job, budget: Budget) -> bool:
    """Does what is left of a job; False where its clips wait for the judges."""
    if is_done(place, job):
        return True
    arm_shards, folder = place.shards[ARMS[job.arm].targets], place.folder(job)
    config = make_config(base, job, budget, str(place.start))
    build = partial(build_joint, text_encoder=place.start / "text_encoder", frozen=True) if place.raw_prompts else build_models
    started = time.perf_counter()
    with mixed_precision():
        train(config, shards=arm_shards, folder=folder, build=build)
    costs = {"train_s": time.perf_counter() - started}
    cases = make_prompts(budget, job.prompts)
    evaluations, costs["make_s"], costs["clips"] = [], 0.0, 0
    points = [(step, OPTIONS["reference_guidance_scale"], cases) for step in budget.evaluated_steps]
    points += [(budget.steps, scale, cases[::3]) for scale in budget.curve]
    width = ShardIndex.open(arm_shards, "train").read(0).tensors["target_tokens"].shape[-1]
    facts: dict[str, Any] = {}
    for step, scale, chosen in points:
        models = build(config, width)
        facts |= _load_averages(models, config, folder / "checkpoints" / f"step-{step:06d}")
        options = {"reference_guidance_scale": scale, "num_inference_steps": budget.inference_steps}
        clips = folder / "clips" / f"{step}-{scale:g}.npz"
        seconds = make_clips(place, config, models.transformer, chosen, options, clips)
        costs["make_s"] += seconds
        costs["clips"] += len(chosen)
        evaluations.append(({"step": step, "reference_guidance": scale}, clips, chosen))
    if any(find_spec(name) is None for name in _JUDGING):
        return False
    facts["separability"] = measure_references(place, config, build, width, models.transformer)
    started = time.perf_counter()
    judged = [{**point, "records": judge_clips(place, clips, chosen)} for point, clips, chosen in evaluations]
    costs["judge_s"] = time.perf_counter() - started
    record = describe(job, budget, config, arm_shards, folder) | facts | {"costs": costs, "evaluations": judged, "complete": True}
    write_json(place.result(job), record)
    track(place, job, record, folder)
    shutil.rmtree(folder)
    return True


def make_prompts(budget: Budget, seed: int) -> list[Case]:
    """As many cases of each number of subjects; those of several come equally often in each tier of likeness."""
    lone = make_cases(budget.per_tier * len(LIKENESSES), num_subjects=1, seed=seed)
    several = [case for case in make_benchmark(budget.per_tier, seed=seed) if len(case.plan.subjects) > 1]
    return [case for case in (*lone, *several) if len(case.plan.subjects) in budget.sizes]


@contextmanager
def mixed_precision() -> Iterator[None]:
    """Matrix products in bfloat16 where that is fast; attention by plain products, which repeats bit for bit on every device."""
    on_gpu = torch.cuda.is_available()
    mixed = torch.autocast("cuda", torch.bfloat16, cache_enabled=False) if on_gpu else autocast_where_fast(cache_enabled=False)
    with mixed, sdpa_kernel(SDPBackend.MATH):
        yield


def _load_averages(models: Any, config: RunConfig, checkpoint: Path) -> dict[str, str]:
    """Fills ``models`` with the averages of a checkpoint; returns digests of its weights before averaging."""
    ema = Ema(models, config.training.ema_decay)
    load_checkpoint(checkpoint, models, None, ema)
    digest = digest_weights(dict(models.transformer.named_parameters()))
    parameters = dict(models.named_parameters())
    for name, average in ema.weights.items():
        parameters[name].data.copy_(average)
    return {"transformer_sha256": digest}


def digest_weights(weights: dict[str, Tensor]) -> str:
    """sha256 over names and bytes."""
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        digest.update(name.encode() + weight.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def make_clips(
    place: Place, config: RunConfig, transformer: Any, cases: list[Case], options: dict[str, Any], path: Path
) -> float:
    """Writes the clips of the cases unless they are there; returns the seconds it took."""
    if path.is_file():
        return 0.0
    started = time.perf_counter()
    pipeline = RefAlignPipeline.from_pretrained(
        str(place.start), transformer=transformer.eval(), scheduler=make_scheduler("euler", config.objective.shift)
    )
    pipeline.max_sequence_length = config.models.max_text_tokens
    pipeline.set_progress_bar_config(disable=True)
    if torch.cuda.is_available():
        pipeline.to("cuda")
    with mixed_precision():
        clips = np.stack(list(iter_generated(pipeline, cases, OPTIONS | options)))
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp.npz")
    np.savez_compressed(aside, clips=clips)
    aside.rename(path)
    return time.perf_counter() - started


def judge_clips(place: Place, clips: Path, cases: list[Case]) -> list[dict[str, Any]]:
    """A record per clip, with what it would score against another's looks as ``chance``."""
    from refalign.toy.scoring import score_clip
    from refalign.toy.seeing import Watcher

    watcher, records = Watcher.load(place.judges), []
    for case, other, clip in zip(cases, shuffle_references(cases), np.load(clips)["clips"], strict=True):
        records.append(score_clip(case, clip, watcher.watch(clip), other))
    return records


def measure_references(place: Place, config: RunConfig, build: Any, width: int, trained: Any) -> dict[str, Any]:
    """Separability of held-out subjects by block, in the start's weights and in the trained ones."""
    index = ShardIndex.open(place.shards["own"], "validation")
    references = collect_references(index, *_REFERENCES)
    if references is None:
        return {}
    before, length = build(config, width), config.models.max_text_tokens
    prompt = index.load_null_prompt()
    prompt = torch.zeros(1, index.read(0).tensors["prompt_embeds"].shape[1]) if prompt is None else prompt.float()
    embeds = before.embed_text(torch.nn.functional.pad(prompt, (0, 0, 0, length - len(prompt)))[None])
    embeds = embeds.detach().expand(len(references.latents), -1, -1)
    options = {"prompt_embeds": embeds, "num_latent_frames": index.entries[0].shape[1]}
    measured = {}
    for name, transformer in (("before", before.transformer), ("after", trained)):
        features = block_features(transformer.cpu().eval(), references.latents, references.foreground, **options)
        measured[name] = [measure(block, references.subjects) for block in features]
    return measured


def describe(job: Job, budget: Budget, config: RunConfig, shards: Path, folder: Path) -> dict[str, Any]:
    """What makes the result readable by itself."""
    records = read_records(folder / "metrics.jsonl")
    steps = [record["step_s"] for record in records if "step_s" in record]
    last = {name: value for name, value in records[-1].items() if name.startswith("validation/")}
    return {
        "job": asdict(job),
        "budget": asdict(budget),
        "primary": PRIMARY,
        "shard_digest": ShardIndex.open(shards, "train").digest,
        "objective": config.objective.model_dump(),
        "step_s": float(np.median(steps)),
        "validation": last,
        "machine": describe_machine(),
    }


def track(place: Place, job: Job, record: dict[str, Any], folder: Path) -> None:
    """A run in MLflow with its curve and its scores, where MLflow is at hand."""
    if place.tracking is None or find_spec("mlflow") is None:
        return
    import mlflow
    from study_report import summarise_job

    mlflow.set_tracking_uri(place.tracking)
    if mlflow.get_experiment_by_name("study") is None:  # files go beside the results, not into whatever folder this runs in
        mlflow.create_experiment("study", artifact_location=str((place.output / "artifacts").resolve()))
    mlflow.set_experiment("study")
    with mlflow.start_run(run_name=job.name, tags={"phase": job.phase, "arm": job.arm}):
        mlflow.log_params({**asdict(job.settings), "arm": job.arm, "references": job.references, "seed": job.seed})
        for line in read_records(folder / "metrics.jsonl"):
            values = {name: value for name, value in line.items() if isinstance(value, float)}
            mlflow.log_metrics(values, step=line["step"], synchronous=False)
        mlflow.log_metrics({f"score/{name}": value for name, value in summarise_job(record).items()})
        mlflow.log_dict({name: value for name, value in record.items() if name != "evaluations"}, "result.json")
