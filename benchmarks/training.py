"""What training costs beside the mathematics, at the toy's size on a CPU; every pair of ways is interleaved step by step.

* our step (prefetching, sums over ranks, statistics, the record) over a bare forward, backward, clip and AdamW: aim at most 1.03;
* the share of our loop's time that waits for data;
* samples/s against the published way, which runs VAE, text and vision encoder inside every step: aim at least 2 times;
* with ``--launchers``: median step of two ranks under Ray Train over that under torchrun, in turns.

uv run benchmarks/training.py [--rounds 20] [--launchers 2]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from random_shards import Made, write_shards
from recording import describe_machine, write_result

from refalign.config import RunConfig, set_values
from refalign.config.presets import load_preset
from refalign.models.loading import load_grid
from refalign.shards.encode import FrozenEncoders, ReferencePicture, make_reference
from refalign.shards.reader import Prefetcher, ShardIndex
from refalign.training.batch import Batch
from refalign.training.loop import Run, _advance, start_run
from refalign.training.optim import clip_gradients, learning_rate_at, locate_step, set_learning_rate
from refalign.training.records import read_records
from refalign.training.step import train_step

ROOT = Path(__file__).resolve().parents[1]
SAMPLES, REFERENCES = 16, 2
WARM_UP = 3
Clip = tuple[np.ndarray, str, list[ReferencePicture]]


def make_clip(config: RunConfig, number: int) -> Clip:
    """Frames, caption and references of noise: encoders take as long for them as for anything else."""
    draw = np.random.default_rng(number)
    video = config.video
    frames = draw.integers(0, 256, (video.num_frames, video.height_px, video.width_px, 3), dtype=np.uint8)
    token_px, pictures = load_grid(config.models).token_px, []
    for _ in range(REFERENCES):
        crop = Image.fromarray(draw.integers(0, 256, (40, 40, 4), dtype=np.uint8), "RGBA")
        path = Path(tempfile.gettempdir()) / f"crop-{os.getpid()}.png"
        crop.save(path)
        pictures.append(make_reference(path.read_bytes(), video.height_px, video.width_px, token_px))
        path.unlink()
    return frames, f"a blue creature number {number} walks over a field", pictures


def encode_clips(clips: list[Clip], encoders: FrozenEncoders) -> Iterator[Made]:
    """Samples of the clips."""
    for number, (frames, caption, pictures) in enumerate(clips):
        said = {"kind": "in_pair", "clip_id": str(number)}
        infos = [{"subject_index": place, "subject_id": f"{number}-{place}", **said} for place in range(len(pictures))]
        yield f"s{number:03d}", encoders.encode(frames, caption, pictures), {"references": infos}


def take_bare_step(run: Run, step: int, batches: list[Batch]) -> None:
    """What no trainer can leave out."""
    training = run.config.training
    for batch in batches:
        options: dict[str, Any] = {"objective": run.config.objective, "global_batch_size": training.global_batch}
        train_step(run.models, batch, run.schedule, **options).terms.total.backward()
    clip_gradients(run.models, training.optimizer.clip_grad_norm)
    set_learning_rate(run.optimizer, learning_rate_at(locate_step(training, step), training))
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)


def encode_step(encoders: FrozenEncoders, clips: list[Clip], index: ShardIndex, batches: list[Batch]) -> None:
    """What the published trainer adds to a step: each of its samples is encoded again."""
    places = {entry.key: number for number, entry in enumerate(index.entries)}
    for key in (key for batch in batches for key in batch.keys):
        encoders.encode(*clips[places[key]])


def compare_steps(config: RunConfig, shards: Path, clips: list[Clip], encoders: FrozenEncoders, rounds: int) -> dict[str, Any]:
    """Bare, ours and published, one step of each in turns that begin with another one every time."""
    with tempfile.TemporaryDirectory() as work:
        runs = {name: start_run(config, shards, Path(work) / name) for name in ("bare", "ours", "published")}
        last = rounds + WARM_UP
        prefetcher = Prefetcher(runs["ours"].maker.make_step, 1, last)
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for step in range(1, last + 1):
            batches = runs["bare"].maker.make_step(step)
            names = list(runs)
            for name in names[step % 3 :] + names[: step % 3]:
                start_s = time.perf_counter()
                if name == "ours":
                    _advance(runs[name], step, prefetcher, is_last=False)
                else:
                    if name == "published":
                        encode_step(encoders, clips, runs[name].maker.index, batches)
                    take_bare_step(runs[name], step, batches)
                seconds[name].append(time.perf_counter() - start_s)
        prefetcher.close()
        records = read_records(Path(work) / "ours" / "metrics.jsonl")[WARM_UP:]
    timed = {name: values[WARM_UP:] for name, values in seconds.items()}
    ratios = {
        "ours_over_bare": [ours / bare for ours, bare in zip(timed["ours"], timed["bare"], strict=True)],
        "speedup_over_published": [slow / ours for slow, ours in zip(timed["published"], timed["ours"], strict=True)],
    }
    return {
        "seconds": {name: describe(values) for name, values in timed.items()},
        **{name: describe(values) for name, values in ratios.items()},
        "data_wait_share": describe([record["data_wait_share"] for record in records]),
    }


def compare_launchers(config: RunConfig, shards: Path, turns: int) -> dict[str, Any]:
    """Median step of two ranks, the same recipe under each launcher in turns; starting up is left out."""
    from refalign.pipeline.ray_data import connect
    from refalign.training.launch import launch_on_ray, make_settings, train_rank

    config = set_values(config, {"training.parallel.ranks": 2, "training.micro_batch": 4})
    steps: dict[str, list[float]] = {"torchrun": [], "ray": []}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with tempfile.TemporaryDirectory() as work, connect(config.cluster):
        for turn in range(turns):
            for name in steps:
                folder = Path(work) / f"{name}-{turn}"
                folder.mkdir()
                settings = make_settings(config, shards, folder)
                if name == "ray":
                    launch_on_ray(train_rank, settings)
                else:
                    (folder / "launch.json").write_text(settings.model_dump_json())
                    module = ["-m", "refalign.training.launch", str(folder / "launch.json")]
                    subprocess.run([*command, *module], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
                records = read_records(folder / "metrics.jsonl")
                steps[name] += [record["step_s"] for record in records if "step_s" in record][WARM_UP:]
    ratio = statistics.median(steps["ray"]) / statistics.median(steps["torchrun"])
    return {"step_s": {name: describe(values) for name, values in steps.items()}, "ray_over_torchrun": round(ratio, 4)}


def describe(values: list[float]) -> dict[str, float]:
    """Median with the quartiles around it."""
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": round(middle, 4), "q1": round(low, 4), "q3": round(high, 4)}


def main() -> None:
    """Makes shards of noise, then measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--launchers", type=int, default=0, metavar="TURNS", help="also compare Ray Train with torchrun")
    parser.add_argument("--dry", action="store_true", help="print the figures without keeping them")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    machine = describe_machine()
    config = load_preset("toy_from_base")
    stage = config.training.stages[0].model_copy(update={"steps": arguments.rounds + WARM_UP})
    never = {"training.validation.every": 10**6, "training.checkpoint.every": 10**6}
    config = set_values(config, {**never, "training.stages": (stage,)})
    encoders = FrozenEncoders(config)
    clips = [make_clip(config, number) for number in range(SAMPLES)]
    with tempfile.TemporaryDirectory() as work:
        shards = write_shards(Path(work) / "shards", {"train-000000.tar": encode_clips(clips, encoders)})
        figures = {"samples_per_step": config.training.global_batch, "references": REFERENCES}
        figures |= compare_steps(config, shards, clips, encoders, arguments.rounds)
        if arguments.launchers:
            figures |= compare_launchers(config, shards, arguments.launchers)
    if arguments.dry:
        print(json.dumps({"machine": machine, **figures}, indent=2))
    else:
        write_result("training", figures, machine)


if __name__ == "__main__":
    main()
