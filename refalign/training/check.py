"""``pipelines/train.py --check``: what a run would meet, found out in minutes and without touching the run's folder.

On the ranks that would train: the output folder, the tracking server, memory, and two real optimizer steps. A run repeats
the checks that cost nothing.
"""

from __future__ import annotations

import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from refalign.config import RunConfig
from refalign.errors import ArtifactError
from refalign.io.storage import describe_bytes
from refalign.pipeline.steps import Step
from refalign.tracking.client import check_server
from refalign.training.launch import Notice, RankWork, Settings, launch_on_ray, make_settings


def check_training(
    config: RunConfig,
    *,
    step: Step,
    shards: Path,
    tracking_uri: str | None,
    launch: Callable[[Settings, RunConfig, RankWork], dict[str, Any]] = launch_on_ray,
) -> dict[str, Any]:
    """Runs all checks, prints a line for each, and returns what was found.

    Args:
        step: the training step; the check works in a folder beside it.
        tracking_uri: as the run would use it; only servers are asked.

    Raises:
        RefAlignError: the first check that failed, with the way out.
    """
    from refalign.training.preflight import check_before_start

    index = check_before_start(config, shards, step.folder)
    print(f"shards      {len(index)} samples, digest {index.digest} ({shards})", flush=True)
    folder = step.folder.with_name(f"{step.folder.name}-check")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        settings = make_settings(config, shards, folder) | {"tracking_uri": tracking_uri}
        found = launch(settings, config, check_rank)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"folder      {step.folder.parent} can be written and is one folder on {', '.join(found['hosts'])}")
    print(f"tracking    {found['tracking']}")
    print(f"checkpoint  {check_checkpoints(config, step.folder)}")
    print(f"memory      a rank needs {found['estimate']}; it has {describe_bytes(found['available_bytes'])}")
    measured = f", fullest so far {describe_bytes(found['peak_bytes'])}" if found["peak_bytes"] else ""
    print(f"step        {found['step_s']:.2f} s, and {found['data_wait_s']:.2f} s of waiting for data{measured}")
    print(f"recipe      {found['steps']} steps on {found['ranks']} ranks: about {found['hours']:.2f} h", flush=True)
    return found


def check_checkpoints(config: RunConfig, folder: Path) -> str:
    """What the run would resume from.

    Raises:
        ArtifactError: the newest checkpoint is damaged and the run would stop at it, or all are.
    """
    import torch

    from refalign.training.checkpoint import find_intact
    from refalign.training.models import Ranks

    fall_back = config.training.checkpoint.on_damaged == "fall_back"
    found = find_intact(folder / "checkpoints", Ranks(0, 1, torch.device("cpu")), fall_back=fall_back)
    return f"{found.name} is whole; the run resumes from it" if found else "none; the run starts at its first step"


def check_rank(config: RunConfig, settings: Settings, notice: Notice | None = None) -> dict[str, Any]:
    """One rank's part; all ranks call it and return the same.

    Raises:
        ArtifactError: the folder is not shared.
        BackendUnavailable: the tracking server does not answer from here.
        ConfigError: the run does not fit.
    """
    import torch

    from refalign.estimates.memory import memory_of_worker
    from refalign.training.loop import start_run, take_step
    from refalign.training.models import Ranks, load_transformer_config
    from refalign.training.optim import count_steps
    from refalign.training.preflight import estimate_for, load_shapes

    torch.set_num_threads(config.cluster.threads)
    ranks, folder, shards = Ranks.current(), Path(settings["folder"]), Path(settings["shards"])
    hosts = check_folder(folder, ranks)
    tracking = check_server(settings["tracking_uri"])
    run = start_run(config, shards, folder / "run")
    steps = count_steps(config.training)
    index = run.maker.index
    shapes = load_shapes(index, config.models)
    estimate = estimate_for(config, index, shapes, load_transformer_config(config), ranks.size, ranks.device.type)
    record: dict[str, Any] = {}
    wait_s = 0.0
    for step in range(1, min(2, steps) + 1):  # the first one also starts libraries and fills caches
        start_s = time.perf_counter()
        batches = run.maker.make_step(step)
        wait_s = time.perf_counter() - start_s
        record = take_step(run, step, batches)
    on_gpu = ranks.device.type == "cuda"
    peak = max(ranks.gather(torch.cuda.max_memory_allocated() if on_gpu else 0))
    seconds = max(ranks.gather(record["step_s"]))
    wait_s = max(0.0, max(ranks.gather(wait_s)) - seconds)  # batches are made while the step before runs
    return {
        "hosts": hosts,
        "tracking": tracking,
        "ranks": ranks.size,
        "estimate": estimate.describe(),
        "estimate_bytes": estimate.peak,
        "available_bytes": min(ranks.gather(memory_of_worker(ranks.device, ranks.count_on_host()))),
        "peak_bytes": peak,
        "step_s": seconds,
        "data_wait_s": wait_s,
        "steps": steps,
        "hours": steps * (seconds + wait_s) / 3600,
    }


def check_folder(folder: Path, ranks: Any) -> list[str]:
    """Every rank writes a file and sees those of all others; returns the machines.

    Raises:
        ArtifactError: the folder cannot be written, or is another one elsewhere.
    """
    host = socket.gethostname()
    problem = ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"rank-{ranks.rank}").write_text(host)
    except OSError as error:
        problem = f"rank {ranks.rank} on {host} cannot write ({error})"
    hosts = ranks.gather(host)
    missing = [f"rank {rank} on {hosts[rank]}" for rank in range(ranks.size) if not (folder / f"rank-{rank}").is_file()]
    if missing and not problem:
        problem = f"rank {ranks.rank} on {host} does not see what {missing[0]} wrote"
    problems = [each for each in ranks.gather(problem) if each]
    if problems:
        raise ArtifactError(
            f"{folder.parent}: {problems[0]}; ranks on several machines need one shared folder (NFS or the like): "
            "give it with --output."
        )
    return sorted(set(hosts))
