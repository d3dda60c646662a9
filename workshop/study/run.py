"""One job of the study: train, evaluate at several steps, write one JSON. What is done is never done again.

The training folder holds checkpoints and what was read from generated clips until the JSON is there.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.recording import describe_machine
from refalign.config import RunConfig
from refalign.evaluation.separability import collect_references
from refalign.evaluation.separability import describe as describe_blocks
from refalign.generation.pipeline import RefAlignPipeline, make_scheduler
from refalign.io.writing import write_json
from refalign.shards.reader import ShardIndex
from refalign.toy.identities import HIDDEN_ATTRIBUTES, LIKENESSES, SPOKEN_ATTRIBUTES
from refalign.training.checkpoint import load_checkpoint
from refalign.training.loop import train
from refalign.training.models import build_models
from refalign.training.optim import Ema
from refalign.training.records import read_records
from workshop.judging.cases import Case, make_benchmark, make_cases
from workshop.judging.clips import OPTIONS, run_benchmark
from workshop.judging.confusion import CONFUSED
from workshop.study.arms import ARMS, PRIMARY, Budget, Job, make_config
from workshop.study.results import load_result, summarise_job
from workshop.weights.training import autocast_where_fast

_REFERENCES = (24, 3)
"""Held-out subjects, and references of each, whose separability is measured."""


@dataclass(frozen=True)
class Place:
    """Where a study reads and writes.

    Attributes:
        start: base weights in the diffusers layout.
        shards: by `study_targets.Kind`.
        tracking: MLflow's address; None tracks nothing.
    """

    output: Path
    start: Path
    shards: dict[str, Path]
    tracking: str | None = None

    def result(self, job: Job) -> Path:
        return self.output / "results" / f"{job.name}.json"

    def folder(self, job: Job) -> Path:
        return self.output / "runs" / job.name


def is_done(place: Place, job: Job) -> bool:
    """Whether the job's JSON is there and whole; a half-written one does not count."""
    return load_result(place.result(job)) is not None


def run_job(place: Place, base: RunConfig, job: Job, budget: Budget) -> None:
    """Does what is left of a job."""
    if is_done(place, job):
        return
    arm_shards, folder = place.shards[ARMS[job.arm].targets], place.folder(job)
    config = make_config(base, job, budget, str(place.start))
    started = time.perf_counter()
    with mixed_precision():
        train(config, shards=arm_shards, folder=folder)
    costs = {"train_s": time.perf_counter() - started}
    cases, started = make_prompts(budget, job.prompts), time.perf_counter()
    points = [(step, OPTIONS["reference_guidance_scale"], cases) for step in budget.evaluated_steps]
    points += [(budget.steps, scale, cases[::3]) for scale in budget.curve]
    width = ShardIndex.open(arm_shards, "train").read(0).tensors["target_tokens"].shape[-1]
    facts: dict[str, Any] = {}
    evaluations = []
    for step, scale, chosen in points:
        models = build_models(config, width)
        facts |= _load_averages(models, config, folder / "checkpoints" / f"step-{step:06d}")
        options = {"reference_guidance_scale": scale, "num_inference_steps": budget.inference_steps}
        records = make_records(place, config, models.transformer, chosen, options, folder / "clips" / f"{step}-{scale:g}.jsonl")
        evaluations.append({"step": step, "reference_guidance": scale, "records": records})
    costs |= {"evaluate_s": time.perf_counter() - started, "clips": sum(len(chosen) for _, _, chosen in points)}
    facts["separability"] = measure_references(place, config, build_models(config, width).transformer, models.transformer)
    facts |= {"costs": costs, "evaluations": evaluations, "complete": True}
    record = describe(job, budget, config, arm_shards, folder) | facts
    write_json(place.result(job), record)
    track(place, job, record, folder)
    shutil.rmtree(folder)


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
    ema = Ema(models, config.training.optimizer.ema_decay)
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


def make_records(
    place: Place, config: RunConfig, transformer: Any, cases: list[Case], options: dict[str, Any], file: Path
) -> list[dict[str, Any]]:
    """Makes and reads the clips that are not yet in ``file``; what `rate_clip` says of each."""
    pipeline = RefAlignPipeline.from_pretrained(
        str(place.start), transformer=transformer.eval(), scheduler=make_scheduler("euler", config.objective.shift)
    )
    pipeline.max_sequence_length = config.models.max_text_tokens
    pipeline.set_progress_bar_config(disable=True)
    if torch.cuda.is_available():
        pipeline.to("cuda")
    with mixed_precision():
        return [rate_clip(record) for record in run_benchmark(pipeline, cases, file, options=options)]


def rate_clip(record: dict[str, Any]) -> dict[str, Any]:
    """The scores of one clip from the benchmark's record of it; None where there is nothing to score.

    ``fidelity`` decides; ``chance`` is what it would be against another's looks.
    """
    right, fates = record["right"], record["fates"] if record["subjects"] > 1 else []
    named = [each for each, is_named in zip(right, record["named"], strict=True) if is_named]
    return {
        "key": record["key"],
        "fidelity": _mean(each[name] for each in right for name in HIDDEN_ATTRIBUTES),
        "chance": _mean(each[name] for each in record["chance"] for name in HIDDEN_ATTRIBUTES),
        "text": _mean(each[name] for each in named for name in SPOKEN_ATTRIBUTES),
        "action": _mean(each["action"] for each in right),
        "confusion": _mean(fate in CONFUSED for fate in fates),
        "copy_paste": _mean(record["copy_paste"]),
    }


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def measure_references(place: Place, config: RunConfig, before: Any, after: Any) -> dict[str, Any]:
    """Separability of held-out subjects by block, in the start's Transformer and in the trained one."""
    index = ShardIndex.open(place.shards["own"], "validation")
    references = collect_references(index, *_REFERENCES)
    if references is None:
        return {}
    options = {"max_text_tokens": config.models.max_text_tokens, "picture_block": 0}
    sides = {"before": before, "after": after}
    told = {name: describe_blocks(each.cpu().eval(), references, index, **options) for name, each in sides.items()}
    return {name: [block.model_dump() for block in each.blocks] for name, each in told.items()}


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
