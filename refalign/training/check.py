"""``pipelines/train.py --check``: what a run would meet, found out in minutes and without touching the run's folder.

On the ranks that would train: the output folder, the tracking server, memory, and two real optimizer steps. A run repeats
the checks that cost nothing.
"""

from __future__ import annotations

import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from refalign.config import RunConfig
from refalign.errors import ArtifactError
from refalign.io.storage import describe_bytes
from refalign.pipeline.steps import Step
from refalign.tracking.client import check_server
from refalign.training.launch import LaunchSettings, Notice, RankWork, launch_on_ray, make_settings

if TYPE_CHECKING:
    from refalign.estimates.memory import MemoryEstimate
    from refalign.training.models import Ranks


@dataclass(frozen=True)
class Findings:
    """What the ranks found; of numbers that differ, those of the slowest or smallest rank."""

    hosts: list[str]
    tracking: str
    ranks: int
    estimate: MemoryEstimate
    available_bytes: float
    peak_bytes: int  # measured, 0 on a CPU
    step_s: float
    data_wait_s: float  # beside the step
    steps: int  # of the recipe

    @property
    def hours(self) -> float:
        return self.steps * (self.step_s + self.data_wait_s) / 3600


def check_training(
    config: RunConfig,
    *,
    step: Step,
    shards: Path,
    launch: Callable[[RankWork[Findings], LaunchSettings], Findings] = launch_on_ray,
) -> Findings:
    """Runs all checks, prints a line for each, and returns what was found.

    Args:
        step: the training step; the check works in a folder beside it.

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
        found = launch(check_rank, make_settings(config, shards, folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"folder      {step.folder.parent} can be written and is one folder on {', '.join(found.hosts)}")
    print(f"tracking    {found.tracking}")
    print(f"checkpoint  {check_checkpoints(config, step.folder)}")
    print(f"memory      a rank needs {found.estimate.describe()}; it has {describe_bytes(found.available_bytes)}")
    measured = f", fullest so far {describe_bytes(found.peak_bytes)}" if found.peak_bytes else ""
    print(f"step        {found.step_s:.2f} s, and {found.data_wait_s:.2f} s of waiting for data{measured}")
    print(f"recipe      {found.steps} steps on {found.ranks} ranks: about {found.hours:.2f} h", flush=True)
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


def check_rank(settings: LaunchSettings, notice: Notice | None = None) -> Findings:
    """One rank's part; all ranks call it and return the same.

    Raises:
        ArtifactError: the folder is not shared.
        BackendUnavailable: the tracking server does not answer from here.
        ConfigError: the run does not fit.
    """
    import torch

    from refalign.estimates.memory import memory_of_worker
    from refalign.training.loop import start_run, take_step
    from refalign.training.models import Ranks

    config = settings.config
    torch.set_num_threads(config.cluster.threads)
    ranks = Ranks.current()
    hosts = check_folder(settings.folder, ranks)
    tracking = check_server(config.tracking.uri)
    run = start_run(config, settings.shards, settings.folder / "run")
    steps = config.training.total_steps
    step_s = wait_s = 0.0
    for step in range(1, min(2, steps) + 1):  # the first one also starts libraries and fills caches
        start_s = time.perf_counter()
        batches = run.maker.make_step(step)
        wait_s = time.perf_counter() - start_s
        step_s = take_step(run, step, batches)["step_s"]
    peak = torch.cuda.max_memory_allocated() if ranks.device.type == "cuda" else 0
    step_s, wait_s = max(ranks.gather(step_s)), max(ranks.gather(wait_s))
    return Findings(
        hosts=hosts,
        tracking=tracking,
        ranks=ranks.size,
        estimate=run.estimate,
        available_bytes=min(ranks.gather(memory_of_worker(ranks.device, ranks.count_on_host()))),
        peak_bytes=max(ranks.gather(peak)),
        step_s=step_s,
        data_wait_s=max(0.0, wait_s - step_s),  # a run makes batches during the step before
        steps=steps,
    )


def check_folder(folder: Path, ranks: Ranks) -> list[str]:
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
    if problems := [each for each in ranks.gather(problem) if each]:
        raise ArtifactError(
            f"{folder.parent}: {problems[0]}; ranks on several machines need one shared folder (NFS or the like): "
            "give it with --output."
        )
    return sorted(set(hosts))
