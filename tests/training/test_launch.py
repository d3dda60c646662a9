"""The step around a run, in process; and two ranks under torchrun."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from make_shards import make_config, write_shards
from safetensors.torch import load_file

from refalign.config import RunConfig, StageConfig
from refalign.io.writing import write_json
from refalign.pipeline.steps import Step
from refalign.training.earlier import describe_earlier, find_earlier, go_on_from
from refalign.training.launch import launch_in_process, make_settings, run_rank, run_training, train_rank
from refalign.training.records import read_records

TERMS = ("total", "flow_matching", "alignment", "pull", "push", "push_floor", "scored_fraction", "grad_norm")


def run(config: RunConfig, output: Path, shards: Path) -> tuple[dict[str, Any], Path]:
    step = Step.make(output, "train", config)
    manifest = run_training(config, step=step, shards=shards, progress=False, launch=launch_in_process)
    return step.commit(manifest.model_dump(mode="json")), step.folder


def test_the_manifest_says_what_happened(base: Path, shards: Path, tmp_path: Path) -> None:
    manifest, folder = run(make_config(base, optimizer={"ema_decay": 0.5}), tmp_path, shards)
    lines = read_records(folder / "metrics.jsonl")
    assert (manifest["steps"], manifest["samples"], manifest["stages"]) == (7, 28, ["stage1", "stage2"])
    assert manifest["loss"]["total"] == {"first": lines[1]["total"], "last": lines[-1]["total"]}
    assert manifest["validation"]["pull"] == {"first": lines[0]["validation/pull"], "last": lines[-1]["validation/pull"]}
    assert (manifest["weights"], manifest["shard_digest"], manifest["resumed_from"]) == ("average", "d1", 0)
    for name in ("checkpoint", "export", "metrics"):
        assert (folder / manifest[name]).exists()
    assert 0 <= manifest["data_wait_fraction"] < 1


def test_an_interrupted_run_goes_on_where_its_checkpoint_stands(base: Path, tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards")
    damaged = shards / "parts" / "train-000000.tar"
    whole = damaged.read_bytes()
    damaged.write_bytes(bytes(len(whole)))  # nothing can be read: the run ends in its first step
    config = make_config(base)
    with pytest.raises(Exception, match=r"train-000000\.tar: sample .* is damaged"):
        run(config, tmp_path, shards)
    assert Step.make(tmp_path, "train", config).load_manifest() is None
    damaged.write_bytes(whole)
    assert run(config, tmp_path, shards)[0]["steps"] == 7


def test_one_rank_is_two_ranks_and_a_run_goes_on_with_another_number(base: Path, shards: Path, tmp_path: Path) -> None:
    """FSDP2 over gloo; one torchrun for all claims, since each of its ranks imports diffusers.

    The third run has replicas of one rank each, recomputes, and measures the terms' gradients: none of it changes a number.
    """
    config = make_config(base, optimizer={"ema_decay": 0.5}, micro_batch=2)
    run_rank(train_rank, make_settings(config, shards, tmp_path / "one"))
    shutil.copytree(tmp_path / "one", tmp_path / "resumed")
    for step in ("step-000006", "step-000007"):
        shutil.rmtree(tmp_path / "resumed" / "checkpoints" / step)
    knobs = {
        "parallel": {"shards_per_replica": 1},
        "activation_checkpointing": "selective",
        "validation": {"gradient_norms_every": 2},
    }
    replicated = make_config(base, optimizer={"ema_decay": 0.5}, micro_batch=2, **knobs)
    # And one in which two ranks share the tokens of each sample; those of the video end on the first or on the second.
    stages = (StageConfig(name="only", steps=20, learning_rate=2e-3, cross_pair_fraction=0.5),)
    odd = {"stages": stages, "global_batch": 3, "micro_batch": 3}  # three samples cannot be dealt to two ranks
    run_rank(train_rank, make_settings(make_config(base, **odd), shards, tmp_path / "whole"))
    split = make_config(base, **odd, parallel={"ranks": 2, "context": 2}, activation_checkpointing="full")
    muon = make_config(base, optimizer={"name": "muon"}, micro_batch=2)  # its matrices are gathered for their update
    run_rank(train_rank, make_settings(muon, shards, tmp_path / "one-muon"))
    launches = []
    runs = (("two", config), ("resumed", config), ("replicated", replicated), ("split", split), ("two-muon", muon))
    for name, settings in runs:
        path = tmp_path / f"{name}.json"
        path.write_text(make_settings(settings, shards, tmp_path / name).model_dump_json())
        launches.append(str(path))
    program = Path(__file__).with_name("ranks_program.py")
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program), *launches],
        check=True,
        timeout=800,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    one = read_records(tmp_path / "one" / "metrics.jsonl")
    for name in ("two", "resumed", "replicated"):
        other = read_records(tmp_path / name / "metrics.jsonl")
        assert [line["step"] for line in other] == list(range(8))
        for mine, theirs in zip(one, other, strict=True):
            for term in (key for key in mine if key in TERMS or key.startswith("validation/")):
                assert theirs[term] == pytest.approx(mine[term], rel=1e-5, abs=1e-7), (name, mine["step"], term)
        weights = [
            load_file(tmp_path / run / "export" / "transformer" / "diffusion_pytorch_model.safetensors") for run in ("one", name)
        ]
        for key, weight in weights[0].items():
            torch.testing.assert_close(weights[1][key], weight, rtol=1e-3, atol=1e-5)
    assert all(("grad_norm/alignment" in line) == (line["step"] in (2, 4, 6)) for line in other)
    for pair in (("whole", "split"), ("one-muon", "two-muon")):
        whole, shared = (read_records(tmp_path / name / "metrics.jsonl") for name in pair)
        for mine, theirs in zip(whole, shared, strict=True):
            for term in (key for key in mine if key in TERMS or key.startswith("validation/")):
                assert theirs[term] == pytest.approx(mine[term], rel=1e-5, abs=1e-7), (mine["step"], term)
    # And back: what two ranks saved, one rank loads.
    for step in ("step-000006", "step-000007"):
        shutil.rmtree(tmp_path / "two" / "checkpoints" / step)
    assert run_rank(train_rank, make_settings(config, shards, tmp_path / "two")).resumed_from == 4
    last = read_records(tmp_path / "two" / "metrics.jsonl")[-1]
    assert last["total"] == pytest.approx(one[-1]["total"], rel=1e-5)


def test_bfloat16_on_one_rank_is_sharded_code_with_float32_weights(base: Path, shards: Path, tmp_path: Path) -> None:
    exact = run_rank(train_rank, make_settings(make_config(base), shards, tmp_path / "exact"))
    config = make_config(base, precision="bfloat16", activation_checkpointing=True)
    assert run_rank(train_rank, make_settings(config, shards, tmp_path / "rounded")).resumed_from == exact.resumed_from == 0
    lines = [read_records(tmp_path / name / "metrics.jsonl") for name in ("exact", "rounded")]
    for mine, theirs in zip(*lines, strict=True):
        for term in ("total", "pull", "validation/total"):
            if term in mine:
                assert theirs[term] == pytest.approx(mine[term], rel=0.02)
    assert lines[0][1]["total"] != lines[1][1]["total"]
    saved = load_file(tmp_path / "rounded" / "export" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {weight.dtype for weight in saved.values()} == {torch.bfloat16}
    projectors = load_file(tmp_path / "rounded" / "projectors.safetensors")
    assert {weight.dtype for weight in projectors.values()} == {torch.float32}


def test_a_longer_constant_schedule_goes_on_from_the_shorter_one(base: Path, shards: Path, tmp_path: Path) -> None:
    """The last stage grows from 3 to 5 steps: the result is that of 5 steps at once."""

    def with_steps(count: int, **changes: Any) -> RunConfig:
        config = make_config(base, optimizer={"ema_decay": 0.5}, **changes)
        *first, last = config.training.stages
        stages = (*first, last.model_copy(update={"steps": count}))
        return config.model_copy(update={"training": config.training.model_copy(update={"stages": stages})})

    def prepare(config: RunConfig, output: Path) -> Step:
        step = Step.make(output, "train", config)
        step.folder.mkdir(parents=True)
        return step

    shorter, longer = with_steps(3), with_steps(5, validation={"every": 2})
    _, old = run(shorter, tmp_path / "grown", shards)
    step = prepare(longer, tmp_path / "grown")
    (earlier,) = find_earlier(step.folder, longer, shards)
    assert earlier.folder == old and earlier.steps == 7 and earlier.is_beginning
    go_on_from(earlier, step.folder)
    manifest, grown = run(longer, tmp_path / "grown", shards)
    whole_manifest, whole = run(longer, tmp_path / "whole", shards)
    assert manifest["resumed_from"] == 7 and manifest["steps"] == whole_manifest["steps"] == 9
    name = "export/transformer/diffusion_pytorch_model.safetensors"
    assert (grown / name).read_bytes() == (whole / name).read_bytes()
    lines = [[line["total"] for line in read_records(folder / "metrics.jsonl") if line["step"]] for folder in (grown, whole)]
    assert lines[0] == lines[1] and len(lines[0]) == 9


def test_a_training_says_how_it_differs_from_an_earlier_one(base: Path, shards: Path, tmp_path: Path) -> None:
    run(make_config(base), tmp_path, shards)
    config = make_config(base)
    changed = [
        ({"stages": (config.training.stages[0],)}, "training.stages: 2 -> 1 stages"),
        ({"optimizer": {"weight_decay": 0.5}}, "training.optimizer.weight_decay: 0.01 -> 0.5"),
        (
            {"stages": (config.training.stages[0].model_copy(update={"learning_rate": 0.1}), config.training.stages[1])},
            "training.stages.0.learning_rate: 0.002 -> 0.1",
        ),
        (
            {"stages": tuple(stage.model_copy(update={"schedule": "cosine"}) for stage in config.training.stages)},
            "training.stages.0.schedule: constant -> cosine; training.stages.1.schedule: constant -> cosine",
        ),
    ]
    for changes, message in changed:
        (earlier,) = find_earlier(tmp_path / "train-new", make_config(base, **changes), shards)
        assert not earlier.is_beginning
        said = describe_earlier(earlier)
        assert f"has 7 steps but differs: {message}." in said and f"training.start_from={earlier.folder}" in said
    (earlier,) = find_earlier(tmp_path / "train-new", config, shards.with_name("others"))
    assert earlier.differences == ("shards: shards -> others",) and not earlier.is_beginning
    shutil.copytree(shards, tmp_path / "taken down" / shards.name)
    manifest = Step.open(shards).load_manifest() or {}
    write_json(tmp_path / "taken down" / shards.name / "manifest.json", {**manifest, "digest": "others"})
    (earlier,) = find_earlier(tmp_path / "train-new", config, tmp_path / "taken down" / shards.name)
    assert earlier.differences == (f"samples: {manifest['digest']} -> others",) and not earlier.is_beginning
    assert not find_earlier(tmp_path / "empty" / "train-new", config, shards)
