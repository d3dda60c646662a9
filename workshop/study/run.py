"""One job of the study: trains, evaluates at several steps, writes one JSON. A job with its JSON is done and never made again.

Until then the training folder holds the checkpoints and the records of generated clips.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.recording import describe_machine
from refalign.config import RunConfig
from refalign.evaluation import separability
from refalign.generation.pipeline import RefAlignPipeline, make_scheduler
from refalign.io.writing import write_json
from refalign.shards.reader import ShardIndex
from refalign.toy.identities import LIKENESSES
from refalign.training.checkpoint import load_checkpoint
from refalign.training.loop import train
from refalign.training.models import build_models
from refalign.training.optim import Ema
from refalign.training.records import read_records
from workshop.judging.benchmark import run_benchmark
from workshop.judging.cases import Case, make_benchmark, make_cases
from workshop.study.arms import ARMS, PRIMARY, Budget, Job, make_config
from workshop.study.results import PRESET_GUIDANCE, Clip, Evaluation, Result, load_result, rate_clip
from workshop.weights.training import autocast_where_fast


@dataclass(frozen=True)
class Place:
    """Where a study reads and writes."""

    output: Path
    start: Path  # base weights in the diffusers layout
    shards: dict[str, Path]  # by `workshop.study.targets.Kind`

    def result(self, job: Job) -> Path:
        return self.output / "results" / f"{job.name}.json"


def is_done(place: Place, job: Job) -> bool:
    """Whether the job's JSON is there and whole."""
    return load_result(place.result(job)) is not None


def run_job(place: Place, base: RunConfig, job: Job, budget: Budget) -> None:
    """Does what is left of a job."""
    if is_done(place, job):
        return
    shards, folder = place.shards[ARMS[job.arm].targets], place.output / "runs" / job.name
    config = make_config(base, job, budget, str(place.start))
    started = time.perf_counter()
    with mixed_precision():
        train(config, shards=shards, folder=folder)
    trained = time.perf_counter()
    cases, index = make_prompts(budget, job.prompts), ShardIndex.open(shards, "train")
    points = [(step, PRESET_GUIDANCE, cases) for step in budget.evaluated_steps]
    points += [(budget.steps, scale, cases[::3]) for scale in budget.curve]
    width = index.read(0).tensors["target_tokens"].shape[-1]
    evaluations = []
    for step, scale, chosen in points:
        models = build_models(config, width)
        ema = Ema(models, config.training.optimizer.ema_decay)
        load_checkpoint(folder / "checkpoints" / f"step-{step:06d}", models, None, ema)
        digest = digest_weights(dict(models.transformer.named_parameters()))
        parameters = dict(models.named_parameters())
        for name, weight in ema.weights.items():
            parameters[name].data.copy_(weight)
        options = {"reference_guidance_scale": scale, "num_inference_steps": budget.inference_steps}
        clips = make_clips(place, config, models.transformer, chosen, options, folder / "clips" / f"{step}-{scale:g}.jsonl")
        evaluations.append(Evaluation(step=step, reference_guidance=scale, records=clips))
    evaluate_s, made = time.perf_counter() - trained, sum(len(chosen) for _, _, chosen in points)
    records = read_records(folder / "metrics.jsonl")
    result = Result(
        job=job,
        budget=budget,
        primary=PRIMARY,
        shard_digest=index.digest,
        objective=config.objective.model_dump(),
        step_s=float(np.median([record["step_s"] for record in records if "step_s" in record])),
        validation={name: float(str(value)) for name, value in records[-1].items() if name.startswith("validation/")},
        machine=describe_machine(),
        transformer_sha256=digest,
        separability=measure_references(place, config, build_models(config, width).transformer, models.transformer),
        costs={"train_s": trained - started, "evaluate_s": evaluate_s, "clips": made},
        evaluations=evaluations,
        complete=True,
    )
    write_json(place.result(job), result.model_dump())
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


def digest_weights(weights: dict[str, Tensor]) -> str:
    """sha256 over names and bytes."""
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        digest.update(name.encode() + weight.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def make_clips(
    place: Place, config: RunConfig, transformer: Any, cases: list[Case], options: dict[str, float], file: Path
) -> list[Clip]:
    """Makes and scores the clips whose records are not yet in ``file``; the scores of all."""
    pipeline = RefAlignPipeline.from_pretrained(
        str(place.start), transformer=transformer.eval(), scheduler=make_scheduler("euler", config.objective.shift)
    )
    pipeline.max_sequence_length = config.models.max_text_tokens
    pipeline.set_progress_bar_config(disable=True)
    if torch.cuda.is_available():
        pipeline.to("cuda")
    with mixed_precision():
        return [rate_clip(record) for record in run_benchmark(pipeline, cases, file, options=options)]


def measure_references(place: Place, config: RunConfig, before: Any, after: Any) -> dict[str, list[dict[str, float]]]:
    """Separability of held-out subjects by block, in the Transformer before and after training."""
    index = ShardIndex.open(place.shards["own"], "validation")
    references = separability.collect_references(index, max_subjects=24, per_subject=3)
    if references is None:
        return {}
    options = {"max_text_tokens": config.models.max_text_tokens, "picture_block": 0}
    sides = {"before": before.cpu().eval(), "after": after.cpu().eval()}
    told = {name: separability.describe(each, references, index, **options) for name, each in sides.items()}
    return {name: [block.model_dump() for block in each.blocks] for name, each in told.items()}
