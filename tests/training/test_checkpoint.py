"""Checkpoints written while training goes on: a copy of the moment, committed last, the best one kept."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from make_shards import make_config

from refalign.config import CheckpointConfig, StageConfig
from refalign.errors import ArtifactError
from refalign.training.checkpoint import (
    Checkpointer,
    TrainState,
    best_checkpoint,
    find_intact,
    latest_checkpoint,
    load_checkpoint,
    load_state,
)
from refalign.training.launch import launch_in_process, make_settings, run_rank, train_rank
from refalign.training.models import Ranks
from refalign.training.optim import Ema, make_optimizer
from refalign.training.records import read_records

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
ALONE = Ranks(0, 1, torch.device("cpu"))


def make_checkpointer(folder: Path, **options: Any) -> Checkpointer:
    return Checkpointer(folder, ALONE, CheckpointConfig(**options))


def make_state(step: int, validation_total: float | None = None) -> TrainState:
    return TrainState(step, "only", step, 0, "d1", 1, validation_total=validation_total)


def make_trained() -> tuple[torch.nn.Module, torch.optim.Optimizer, Ema]:
    module = torch.nn.Linear(3, 2)
    return module, make_optimizer(module, make_config("none").training), Ema(module, 0.5)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_is_the_moment_of_the_call(tmp_path: Path) -> None:
    trained = make_trained()
    module, optimizer, ema = trained
    before = [tensor.detach().clone() for tensor in (module.weight, ema.weights["weight"])]
    checkpointer = make_checkpointer(tmp_path)
    checkpointer.save(make_state(1), *trained)
    with torch.no_grad():  # the next step, while the checkpoint is being written
        for tensor in (module.weight, ema.weights["weight"], optimizer.state[module.weight]["exp_avg"]):
            tensor.fill_(7.0)
    checkpointer.wait()
    load_checkpoint(tmp_path / "step-000001", *trained)
    assert torch.equal(module.weight, before[0]) and torch.equal(ema.weights["weight"], before[1])
    assert not optimizer.state[module.weight]["exp_avg"].any()


def test_a_crash_before_the_commit_leaves_the_older_checkpoint(tmp_path: Path, monkeypatch) -> None:
    trained = make_trained()
    checkpointer = make_checkpointer(tmp_path)
    checkpointer.save(make_state(1), *trained)
    checkpointer.wait()
    in_flight: list[Future] = []
    real = dcp.async_save

    def fail_later(*arguments: Any, **options: Any) -> Future:
        real(*arguments, **options).result()
        in_flight.append(Future())
        return in_flight[-1]

    monkeypatch.setattr(dcp, "async_save", fail_later)
    checkpointer.save(make_state(2), *trained)
    assert (tmp_path / "step-000002" / ".metadata").is_file()
    assert latest_checkpoint(tmp_path) == tmp_path / "step-000001"
    in_flight[0].set_exception(OSError("No space left on device"))
    with pytest.raises(ArtifactError, match=r"could not be written \(OSError: No space left.*resumes from the one before"):
        checkpointer.save(make_state(3), *trained)
    assert latest_checkpoint(tmp_path) == tmp_path / "step-000001"
    monkeypatch.undo()
    checkpointer.save(make_state(2), *trained)  # the resumed run, over what was left
    checkpointer.close()
    assert latest_checkpoint(tmp_path) == tmp_path / "step-000002"


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    trained = make_trained()
    checkpointer = make_checkpointer(tmp_path)
    for step, total in ((1, 0.9), (2, 0.5), (3, None), (4, 0.7), (5, None)):
        checkpointer.save(make_state(step, total), *trained)
    checkpointer.wait()
    assert names(tmp_path) == ["step-000002", "step-000004", "step-000005"]
    assert best_checkpoint(tmp_path) == tmp_path / "step-000002"
    plain = make_checkpointer(tmp_path, keep_best=False)
    plain.save(make_state(6, 0.4), *trained)
    plain.wait()
    assert names(tmp_path) == ["step-000005", "step-000006"]


def test_overwritten_bytes_are_noticed_wherever_they_are(tmp_path: Path, capsys) -> None:
    trained = make_trained()
    checkpointer = make_checkpointer(tmp_path)
    for step in (1, 2):
        checkpointer.save(make_state(step), *trained)
    checkpointer.close()
    first, second = (tmp_path / f"step-{step:06d}" for step in (1, 2))
    files = sorted(path for path in second.iterdir() if path.name != "state.json")
    assert {path.name for path in files} == set(load_state(second).files) and len(files) >= 2
    assert find_intact(tmp_path, ALONE, fall_back=False) == second
    rng = random.Random(0)
    for _ in range(20):
        path = rng.choice(files)
        whole = path.read_bytes()
        start = rng.randrange(len(whole))
        damaged = whole[:start] + bytes(255 - byte for byte in whole[start : start + 400]) + whole[start + 400 :]
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError, match=rf"{path.name}: damaged.*checkpoint.on_damaged=fall_back"):
            find_intact(tmp_path, ALONE, fall_back=False)
        assert find_intact(tmp_path, ALONE, fall_back=True) == first
        assert f"{path.name}: damaged" in capsys.readouterr().err
        path.write_bytes(whole)
    for fault in (lambda: files[0].unlink(), lambda: (second / "state.json").write_text("{")):
        fault()
        assert find_intact(tmp_path, ALONE, fall_back=True) == first
    (first / ".metadata").write_bytes(b"")
    with pytest.raises(ArtifactError, match="No checkpoint before it is whole"):
        find_intact(tmp_path, ALONE, fall_back=True)
    assert find_intact(tmp_path / "none", ALONE, fall_back=True) is None


def test_foreign_names_and_an_older_damaged_state_stop_nobody(tmp_path: Path) -> None:
    trained = make_trained()
    checkpointer = make_checkpointer(tmp_path, keep=3)
    checkpointer.save(make_state(1, 0.5), *trained)
    checkpointer.wait()
    shutil.copytree(tmp_path / "step-000001", tmp_path / "step-000001.bak")
    (tmp_path / "step-000001" / "state.json").write_text("{}")
    checkpointer.save(make_state(2, 0.7), *trained)
    checkpointer.close()
    assert latest_checkpoint(tmp_path) == best_checkpoint(tmp_path) == tmp_path / "step-000002"
    assert "step-000001.bak" in names(tmp_path)


def test_a_checkpoint_of_an_older_version_has_no_validation(tmp_path: Path) -> None:
    checkpointer = make_checkpointer(tmp_path)
    checkpointer.save(make_state(1), *make_trained())
    checkpointer.close()
    path = tmp_path / "step-000001" / "state.json"
    state = json.loads(path.read_text())
    del state["validation_total"], state["files"]
    path.write_text(json.dumps(state))
    assert best_checkpoint(tmp_path) is None and find_intact(tmp_path, ALONE, fall_back=False) == path.parent


def wait_for_step(step: int, folder: Path) -> None:
    for _ in range(3000):
        if any(record["step"] >= step for record in read_records(folder / "metrics.jsonl")):
            return
        time.sleep(0.05)
    raise AssertionError(f"{folder}: no step {step}")


def test_sigterm_to_one_of_two_ranks_saves_and_ends_both_with_143(base: Path, shards: Path, tmp_path: Path) -> None:
    """The processes torchrun would start, with their environment, so that each one's exit code is seen."""
    stages = (StageConfig(name="only", steps=150, learning_rate=1e-3),)
    keep = {"micro_batch": 2, "checkpoint": {"every": 1000}, "validation": {"every": 1000}}
    settings = make_settings(make_config(base, stages=stages, **keep), shards, tmp_path / "run")
    (tmp_path / "launch.json").write_text(settings.model_dump_json())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    common["PYTHONPATH"] = str(Path(__file__).parents[2])
    command = [sys.executable, "-m", "refalign.training.launch", str(tmp_path / "launch.json")]
    ranks = [
        subprocess.Popen(command, env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)
    ]
    try:
        wait_for_step(3, tmp_path / "run")
        ranks[1].send_signal(signal.SIGTERM)
        assert [rank.wait(timeout=120) for rank in ranks] == [143, 143]
    finally:
        for rank in ranks:
            rank.kill()
    recorded = read_records(tmp_path / "run" / "metrics.jsonl")
    assert names(tmp_path / "run" / "checkpoints") == [f"step-{recorded[-1]['step']:06d}"]
    result = run_rank(train_rank, settings)
    assert result.resumed_from == recorded[-1]["step"]
    lines = read_records(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(151)) and lines[: len(recorded)] == recorded


class Told(Exception):
    """Stands for the command line's answer to SIGTERM."""


def test_in_one_process_sigterm_takes_its_course_after_the_checkpoint(base: Path, shards: Path, tmp_path: Path) -> None:
    def answer(number: int, frame: Any) -> None:
        raise Told

    stages = (StageConfig(name="only", steps=500, learning_rate=1e-3),)
    config = make_config(base, stages=stages, checkpoint={"every": 1000}, validation={"every": 1000})

    def tell() -> None:
        wait_for_step(3, tmp_path)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, answer)
    threading.Thread(target=tell, daemon=True).start()
    try:
        with pytest.raises(Told):
            launch_in_process(train_rank, make_settings(config, shards, tmp_path))
    finally:
        signal.signal(signal.SIGTERM, before)
    checkpoint = latest_checkpoint(tmp_path / "checkpoints")
    assert checkpoint is not None
    assert int(checkpoint.name.removeprefix("step-")) == read_records(tmp_path / "metrics.jsonl")[-1]["step"]
