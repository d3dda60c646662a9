"""Runs under Ray Train. Each test starts workers that import diffusers: there are few.

Ray is not imported here: it reads how to authenticate when it is imported, and the fixture decides that.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path

import psutil
import pytest
from make_shards import make_config, write_shards

from refalign.config import StageConfig, set_values
from refalign.errors import ArtifactError
from refalign.pipeline.steps import Step
from refalign.training.check import check_training
from refalign.training.checkpoint import latest_checkpoint
from refalign.training.launch import make_settings, run_rank, run_training, train_rank
from refalign.training.records import read_records


def kill_a_rank_after(step: int, path: Path, killed: list[int]) -> None:
    """Waits until ``step`` is recorded and the checkpoint of step 10 written, which happens beside the steps.

    Then SIGKILLs a rank of this process's own Ray and of no other on the machine.
    """

    def is_due() -> bool:
        checkpoint = latest_checkpoint(path.parent / "checkpoints")
        return (
            any(record["step"] >= step for record in read_records(path))
            and checkpoint is not None
            and checkpoint.name >= "step-000010"
        )

    while not is_due():
        time.sleep(0.1)
    ranks = [p for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in " ".join(p.cmdline())]
    ranks[0].kill()
    killed.append(ranks[0].pid)


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("num_workers", [1, pytest.param(2, marks=pytest.mark.heavy)])
def test_a_killed_rank_leaves_the_curve_of_an_unbroken_run(num_workers: int, base: Path, shards: Path, tmp_path: Path) -> None:
    stages = (StageConfig(name="only", steps=40, learning_rate=1e-3),)
    config = make_config(
        base, stages=stages, parallel={"ranks": num_workers}, micro_batch=2, checkpoint={"every": 5}, validation={"every": 40}
    )
    config = set_values(config, {"cluster.train.cpus": 0.25})
    step = Step.make(tmp_path, "train", config)
    killed: list[int] = []
    waiting = (12, step.folder / "metrics.jsonl", killed)
    killer = threading.Thread(target=kill_a_rank_after, args=waiting, daemon=True)
    killer.start()
    manifest = run_training(config, step=step, shards=shards, progress=False)
    killer.join()
    assert len(killed) == 1 and manifest.resumed_from >= 10
    assert not (step.folder / "ray").exists() and not (step.folder / "failure.json").exists()
    run_rank(train_rank, make_settings(config, shards, tmp_path / "one"))
    expected = read_records(tmp_path / "one" / "metrics.jsonl")
    lines = read_records(step.folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(41))
    if num_workers == 1:
        assert [line.get("total") for line in lines] == [line.get("total") for line in expected]
    for mine, theirs in list(zip(lines, expected, strict=True))[1:21]:
        assert mine["total"] == pytest.approx(theirs["total"], rel=1e-5)


@pytest.mark.usefixtures("ray_cluster")
def test_our_own_error_comes_back_as_itself(base: Path, tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards")
    for shard in (shards / "parts").glob("train-00000[12].tar"):
        shard.write_bytes(bytes(shard.stat().st_size))
    config = make_config(base)
    step = Step.make(tmp_path, "train", config)
    with pytest.raises(ArtifactError, match=r"train-00000\d\.tar: sample train\d+ is damaged"):
        run_training(config, step=step, shards=shards, progress=False)
    assert step.load_manifest() is None


@pytest.mark.usefixtures("ray_cluster")
def test_a_check_runs_where_the_run_would_and_leaves_no_trace(base: Path, shards: Path, tmp_path: Path) -> None:
    config = make_config(base)
    step = Step.make(tmp_path, "train", config)
    found = check_training(config, step=step, shards=shards)
    assert found.ranks == 1 and found.step_s > 0 and found.estimate.peak < found.available_bytes
    assert not list(tmp_path.iterdir())
