"""Curation against a plain script: the same models and functions, with and without Ray, plans and commits around them.

    python benchmarks/curation.py

Measured side by side, interleaved, on the subjects step and the shards step together, from an early committed part to a late one
(start-up, model loading and the end, when an actor has nothing left to do, are left out). References from other clips are not
sought, so that the script and the pipeline encode the same pictures:

* efficiency: the sequential script on one core, over twice the pipeline with two actors;
* ceiling: what the machine's cores leave of that: one such script alone, over as many of them side by side as there are cores;
* against_all_threads: the sequential script with all threads, over the pipeline with two actors;
* overhead: the pipeline with one actor of one thread over the bare sum of decoding, detecting and encoding, less 1; Ray's own
  processes, which efficiency counts in full, may use the other core;
* doubled: time and peak memory of the pipeline on twice the videos, over those on the videos.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from recording import describe_machine, write_result
from whole_run import measure as measure_command

ROOT = Path(__file__).resolve().parents[1]
VIDEOS_PER_PART, SAMPLES_PER_SHARD = 24, 24
WARM_UP = 3
"""Commits before the clock starts: by then all actors have loaded their models."""
MEMORY_EVERY_S = 10


def make_config(videos: Path, threads: int, actors: int) -> Any:
    """The toy preset on a folder, in small parts."""
    from refalign.config import apply_overrides
    from refalign.config.presets import load_preset

    return apply_overrides(load_preset("toy"), _assignments(videos, threads, actors))


def _assignments(videos: Path, threads: int, actors: int) -> list[str]:
    return [
        f"input.path={videos}",
        f"curation.videos_per_part={VIDEOS_PER_PART}",
        f"shards.samples_per_shard={SAMPLES_PER_SHARD}",
        "pairs.min_similarity=1.0",
        "pairs.max_similarity=1.0",
        f"cluster.threads={threads}",
        *(f"cluster.{step}.{setting}" for step in ("subjects", "shards") for setting in (f"max_actors={actors}", "cpus=1")),
    ]


def run_sequential(videos: Path, threads: int) -> dict[str, float]:
    """Seconds of a plain loop over videos, then over their clips, and of its decoding, detecting and encoding alone."""
    import pyarrow as pa
    import torch

    from refalign.io.tables import CLIP_SCHEMA
    from refalign.io.video import ClipSpec, read_clips
    from refalign.shards.encode import FrozenEncoders, make_reference
    from refalign.stages.subjects import SubjectsWorker, list_input

    torch.set_num_threads(threads)
    config = make_config(videos, threads, 1)
    plan, _, _ = list_input(config, str(videos))
    work = [video for part in plan.values() for video in part]
    curator, encoders = SubjectsWorker(config), FrozenEncoders(config)
    sizes = config.video.height_px, config.video.width_px, encoders.grid.token_px
    bare = Stopwatch()
    bare.wrap(curator.detector, "track", "detect")
    bare.wrap(curator.encoder, "embed", "detect")
    bare.wrap(encoders, "encode", "encode")
    curator.curate_video(work[0].source, work[0].video_id)  # loads what is loaded lazily
    bare.seconds.clear()
    began = time.perf_counter()
    rows = [row for video in work for row in curator.curate_video(video.source, video.video_id)[0]]
    pa.Table.from_pylist([asdict(row) for row in rows], schema=CLIP_SCHEMA)
    for row in rows:
        spec = ClipSpec(row.start_s, row.crop_xyxy_px)
        with bare.timing("decode"):
            (frames,) = read_clips(row.video_path, [spec], config.video, config.curation)
        references = [make_reference(subject.crop_png, *sizes) for subject in row.subjects]
        encoders.encode(frames, row.caption, references)
    total = time.perf_counter() - began
    with bare.timing("decode"):  # the decode pass of the subjects step is inside its loop; this one stands for it
        for row in rows:
            spec = ClipSpec(row.start_s, row.crop_xyxy_px)
            read_clips(row.video_path, [spec], config.video, config.curation)
    return {"videos": len(work), "clips": len(rows), "seconds": total, "bare_seconds": sum(bare.seconds.values()), **bare.seconds}


class Stopwatch:
    """Seconds spent in chosen calls, by label."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timing(self, label: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[label] = self.seconds.get(label, 0.0) + time.perf_counter() - began

    def wrap(self, owner: Any, method: str, label: str) -> None:
        """Times every call of a method of one object."""
        original = getattr(owner, method)

        def timed(*arguments: Any, **options: Any) -> Any:
            with self.timing(label):
                return original(*arguments, **options)

        setattr(owner, method, timed)


def run_pipeline(videos: Path, output: Path, *, actors: int) -> dict[str, float]:
    """Seconds per clip at a steady pace, summed over the steps, and the peak memory of all processes."""
    shutil.rmtree(output, ignore_errors=True)
    peaks_gib = []
    for step in ("subjects", "pairs", "shards"):
        flags = [part for text in _assignments(videos, 1, actors) for part in ("--set", text)]
        command = [sys.executable, f"pipelines/{step}.py", "--preset", "toy", "--output", str(output), *flags]
        peaks_gib.append(measure_command(command, MEMORY_EVERY_S)[1])
    counted = (("subjects", "clips"), ("shards", "samples"))
    seconds = {step: _seconds_between_commits(output, step, count, actors) for step, count in counted}
    return {"seconds_per_clip": sum(seconds.values()), "peak_gib": max(peaks_gib)}


def _seconds_between_commits(output: Path, step: str, counted: str, actors: int) -> float:
    """Seconds per clip from the commit that ends the warm-up to the last before an actor has nothing left to do."""
    commits = sorted(output.glob(f"{step}-*/parts/*.json"), key=lambda path: path.stat().st_mtime)
    commits = commits[WARM_UP - 1 : len(commits) - actors + 1]
    counts = [json.loads(path.read_text())[counted] for path in commits]
    sizes = [count if isinstance(count, int) else len(count) for count in counts]
    return (commits[-1].stat().st_mtime - commits[0].stat().st_mtime) / sum(sizes[1:])


def start_sequential(videos: Path, threads: int, cores: set[int]) -> subprocess.Popen[str]:
    """`run_sequential` in a process of its own on some cores."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    command = [sys.executable, __file__, "--sequential", str(videos), "--threads", str(threads)]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    os.sched_setaffinity(process.pid, cores)
    return process


def finish_sequential(process: subprocess.Popen[str]) -> dict[str, float]:
    """What `run_sequential` measured there."""
    said, _ = process.communicate()
    assert process.returncode == 0, f"{process.args} ended with {process.returncode}"
    return json.loads(said.splitlines()[-1])


def draw_videos(folder: Path, count: int) -> Path:
    from refalign.toy.videos import write_world

    write_world(folder, num_videos=count, seed=7, split="heldout")
    return folder


def measure(folder: Path, videos: int, rounds: int) -> dict[str, Any]:
    """All ways in turn, round by round."""
    once, twice = draw_videos(folder / "once", videos), draw_videos(folder / "twice", 2 * videos)
    cores = os.sched_getaffinity(0)
    one = {min(cores)}
    rows: list[dict[str, float]] = []
    for _ in range(rounds):
        sequential = finish_sequential(start_sequential(once, 1, one))
        beside = [finish_sequential(each) for each in [start_sequential(once, 1, {core}) for core in cores]]
        threaded = finish_sequential(start_sequential(once, len(cores), cores))
        both = run_pipeline(once, folder / "out", actors=2)
        single = run_pipeline(once, folder / "out", actors=1)
        doubled = run_pipeline(twice, folder / "out", actors=2)
        per_clip = sequential["seconds"] / sequential["clips"]
        rows.append(
            {
                "efficiency": per_clip / (len(cores) * both["seconds_per_clip"]),
                "ceiling": sequential["seconds"] / statistics.mean(each["seconds"] for each in beside),
                "against_all_threads": threaded["seconds"] / threaded["clips"] / both["seconds_per_clip"],
                "overhead": single["seconds_per_clip"] / (sequential["bare_seconds"] / sequential["clips"]) - 1,
                "doubled_time": 2 * doubled["seconds_per_clip"] / both["seconds_per_clip"],
                "doubled_memory": doubled["peak_gib"] / both["peak_gib"],
                "sequential_seconds": sequential["seconds"],
                "pipeline_seconds": both["seconds_per_clip"] * sequential["clips"],
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return {
        name: {"median": round(statistics.median(values), 3), "low": round(min(values), 3), "high": round(max(values), 3)}
        for name in rows[0]
        for values in [[row[name] for row in rows]]
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=720)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("runs/bench_curation"))
    parser.add_argument("--sequential", type=Path, help="only the plain script over this folder; used by itself")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.sequential:
        print(json.dumps(run_sequential(arguments.sequential, arguments.threads)))
        return
    machine = describe_machine()
    folder = arguments.folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    write_result("curation", {"videos": arguments.videos, **measure(folder, arguments.videos, arguments.rounds)}, machine)


if __name__ == "__main__":
    main()
