"""Whole runs in this process: resuming, stages, learning, refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from make_shards import make_config, write_shards
from safetensors.torch import load_file

from refalign.config import RunConfig, StageConfig
from refalign.errors import ArtifactError, ConfigError, NonFiniteLoss
from refalign.training.batch import BatchMaker
from refalign.training.checkpoint import check_resumable, latest_checkpoint, load_state
from refalign.training.loop import start_run, take_step, train, validate
from refalign.training.models import TrainedModels
from refalign.training.optim import learning_rate_at, locate_step, make_optimizer
from refalign.training.preemption import Preempted
from refalign.training.records import read_records

TIMES = ("step_s", "data_wait_s", "data_wait_share", "tokens_per_s", "tflops_per_rank", "peak_memory_bytes")


class Stop(Exception):
    """Stands for whatever ends a process in the middle of a run."""


def stop_in(step: int):
    """Ends a run in its ``step``-th step, counted from where it began, before that step changes a weight."""
    asked: list[None] = []

    def notice() -> bool:
        asked.append(None)
        if len(asked) == step:
            raise Stop
        return False

    return notice


def load_lines(folder: Path) -> list[dict[str, Any]]:
    records = read_records(folder / "metrics.jsonl")
    return [{name: value for name, value in record.items() if name not in TIMES} for record in records]


def load_export(folder: Path) -> bytes:
    return (folder / "export" / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()


@pytest.fixture()
def config(base: Path) -> RunConfig:
    return make_config(base, optimizer={"ema_decay": 0.5})


def test_a_stop_gradient_run_ends_with_the_transformer_of_a_run_without_alignment(
    base: Path, shards: Path, tmp_path: Path
) -> None:
    """Clipped hard, so that the projectors' gradients would show in the Transformer if they were clipped together."""
    exports = {}
    for alignment, stopped in (("none", False), ("reference_alignment", True), ("reference_alignment", False)):
        config = make_config(base, optimizer={"clip_grad_norm": 0.01})
        objective = config.objective.model_copy(update={"alignment": alignment, "stop_gradient": stopped})
        folder = tmp_path / f"{alignment}-{stopped}"
        train(config.model_copy(update={"objective": objective}), shards=shards, folder=folder)
        exports[alignment, stopped] = load_export(folder)
    assert exports["none", False] == exports["reference_alignment", True] != exports["reference_alignment", False]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_stopped_and_resumed_is_uninterrupted_bit_for_bit(base: Path, shards: Path, tmp_path: Path, optimizer: str) -> None:
    config = make_config(base, optimizer={"ema_decay": 0.5, "name": optimizer})
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(config, shards=shards, folder=whole).resumed_from == 0
    # Before any checkpoint; inside the first stage; inside the second; each but the last with a line that no checkpoint covers.
    for steps, saved in ((2, None), (4, "step-000002"), (4, "step-000004"), (3, "step-000006")):
        with pytest.raises(Stop):
            train(config, shards=shards, folder=parts, notice=stop_in(steps))
        checkpoint = latest_checkpoint(parts / "checkpoints")
        assert (checkpoint and checkpoint.name) == saved
    assert train(config, shards=shards, folder=parts).resumed_from == 6
    assert load_lines(parts) == load_lines(whole)
    assert [line["step"] for line in load_lines(parts)] == list(range(8))
    assert load_export(parts) == load_export(whole)
    assert (parts / "projectors.safetensors").read_bytes() == (whole / "projectors.safetensors").read_bytes()


def test_told_to_stop_it_saves_the_step_and_goes_on_bit_for_bit(config: RunConfig, shards: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(config, shards=shards, folder=whole)
    asked: list[None] = []

    def notice() -> bool:
        asked.append(None)
        return len(asked) == 3  # in the third step; no checkpoint is due then

    with pytest.raises(Preempted, match="told to stop after step 3, which is saved"):
        train(config, shards=shards, folder=parts, notice=notice)
    assert train(config, shards=shards, folder=parts).resumed_from == 3
    assert load_lines(parts) == load_lines(whole)
    assert load_export(parts) == load_export(whole)


def test_a_finished_run_only_exports_again(config: RunConfig, shards: Path, tmp_path: Path) -> None:
    train(config, shards=shards, folder=tmp_path)
    lines, weights = load_lines(tmp_path), load_export(tmp_path)
    assert train(config, shards=shards, folder=tmp_path).resumed_from == 7
    assert load_lines(tmp_path) == lines and load_export(tmp_path) == weights


def test_a_line_holds_what_a_reader_needs(config: RunConfig, shards: Path, tmp_path: Path) -> None:
    train(config, shards=shards, folder=tmp_path)
    first, *lines = read_records(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in (first, *lines)] == list(range(8)) and "validation/total" in first
    assert [line["stage"] for line in lines] == ["stage1"] * 4 + ["stage2"] * 3
    assert [line["learning_rate"] for line in lines] == [1e-3, 2e-3, 2e-3, 2e-3, 5e-4, 1e-3, 1e-3]
    assert [line["samples_consumed"] for line in lines] == list(range(4, 32, 4))
    assert [line["step"] for line in lines if "validation/total" in line] == [3, 6, 7]
    names = {"total", "flow_matching", "alignment", "pull", "push", "push_floor", "scored_fraction", "grad_norm"}
    assert names | set(TIMES) <= set(lines[0])


def test_loss_falls_on_fixed_noise_and_noise_levels(base: Path, shards: Path, tmp_path: Path) -> None:
    stages = (StageConfig(name="only", steps=120, learning_rate=5e-3),)
    config = make_config(
        base,
        stages=stages,
        global_batch=8,
        micro_batch=8,
        optimizer={"warmup_steps": 5},
        validation={"every": 120},
        checkpoint={"every": 120},
    )
    train(config, shards=shards, folder=tmp_path)
    before, after = (line for line in load_lines(tmp_path) if "validation/total" in line)
    assert after["validation/flow_matching"] < 0.8 * before["validation/flow_matching"]
    assert after["validation/pull"] < 0.8 * before["validation/pull"]
    assert after["validation/push_floor"] == before["validation/push_floor"]


def test_old_checkpoints_are_removed(base: Path, shards: Path, tmp_path: Path) -> None:
    train(make_config(base, checkpoint={"keep": 2}), shards=shards, folder=tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000006", "step-000007"]


def test_an_uncommitted_checkpoint_is_not_seen(config: RunConfig, shards: Path, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        train(config, shards=shards, folder=tmp_path, notice=stop_in(5))
    (tmp_path / "checkpoints" / "step-000004" / "state.json").unlink()
    assert train(config, shards=shards, folder=tmp_path).resumed_from == 2


def test_a_damaged_checkpoint_is_named_with_the_way_out(config: RunConfig, shards: Path, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        train(config, shards=shards, folder=tmp_path, notice=stop_in(3))
    checkpoint = latest_checkpoint(tmp_path / "checkpoints")
    assert checkpoint is not None
    (checkpoint / "__0_0.distcp").unlink()
    with pytest.raises(ArtifactError, match=r"step-000002/__0_0.distcp: missing. No checkpoint before it is whole: restore one"):
        train(config, shards=shards, folder=tmp_path)
    (checkpoint / "state.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"state\.json: damaged"):
        train(config, shards=shards, folder=tmp_path)


def test_resuming_refuses_what_would_change_the_data_order(config: RunConfig, base: Path, shards: Path, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        train(config, shards=shards, folder=tmp_path, notice=stop_in(3))
    with pytest.raises(ArtifactError, match=r"cannot resume.*global_batch was 4, now 8"):
        train(make_config(base, optimizer={"ema_decay": 0.5}, global_batch=8), shards=shards, folder=tmp_path)
    other = write_shards(tmp_path / "other", digest="d2")
    with pytest.raises(ArtifactError, match=r"shard_digest was 'd1', now 'd2'"):
        train(config, shards=other, folder=tmp_path)
    checkpoint = latest_checkpoint(tmp_path / "checkpoints")
    assert checkpoint is not None
    with pytest.raises(ArtifactError, match="seed was 0, now 1"):
        check_resumable(checkpoint, replace(load_state(checkpoint), seed=1))
    state = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps(state | {"schema": 99}))
    with pytest.raises(ArtifactError, match="checkpoint schema 99, this version reads 1"):
        train(config, shards=shards, folder=tmp_path)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_non_finite_step_changes_no_weight_and_names_its_samples(
    where: str, config: RunConfig, shards: Path, tmp_path: Path
) -> None:
    with pytest.raises(Stop):
        train(config, shards=shards, folder=tmp_path, notice=stop_in(3))
    run = start_run(config, shards, tmp_path)
    assert run.step == 2
    batches = BatchMaker(run.maker.index, config).make_step(3)
    if where == "loss":
        batches[0].latents[0, 0, 0, 0, 0] = torch.inf
    else:
        run.models.transformer.proj_out.bias.register_hook(lambda gradient: gradient * torch.nan)
    before = {name: parameter.detach().clone() for name, parameter in run.models.named_parameters()}
    with pytest.raises(NonFiniteLoss, match=r"step 3: .*step-000002") as caught:
        take_step(run, 3, batches)
    suspects = batches[:1] if where == "loss" else batches
    assert all(key in str(caught.value) for batch in suspects for key in batch.keys)
    assert ("total=nan" in str(caught.value)) == (where == "loss")
    assert all(torch.equal(before[name], parameter) for name, parameter in run.models.named_parameters())
    assert run.step == 2


def test_validation_uses_the_average_and_leaves_the_weights_alone(config: RunConfig, shards: Path, tmp_path: Path) -> None:
    run = start_run(config, shards, tmp_path)
    assert run.ema is not None
    at_start = validate(run)
    expected = {name: weight.clone() for name, weight in run.ema.weights.items()}
    for step in (1, 2):
        take_step(run, step, run.maker.make_step(step))
        for name, parameter in run.models.named_parameters():
            expected[name].lerp_(parameter.detach(), 0.5)
    trained = {name: parameter.detach().clone() for name, parameter in run.models.named_parameters()}
    assert validate(run) == validate(run) != at_start
    for name, parameter in run.models.named_parameters():
        assert torch.equal(parameter, trained[name])
        assert torch.equal(run.ema.weights[name], expected[name])


def test_a_run_without_held_out_samples_trains_without_validation(base: Path, tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", train=4, validation=0)
    train(make_config(base), shards=shards, folder=tmp_path / "run")
    assert not any("validation/total" in line for line in load_lines(tmp_path / "run"))


def test_the_recipe_is_walked_in_order() -> None:
    training = make_config("none").training
    places = [(locate_step(training, step).stage.name, locate_step(training, step).step_in_stage) for step in range(1, 8)]
    assert places == [("stage1", 1), ("stage1", 2), ("stage1", 3), ("stage1", 4), ("stage2", 1), ("stage2", 2), ("stage2", 3)]
    assert learning_rate_at(locate_step(training, 5), training) == pytest.approx(5e-4)


def test_a_batch_that_does_not_divide_over_the_ranks_is_refused() -> None:
    from refalign.training.preflight import check_batch_size

    with pytest.raises(ConfigError, match="global_batch=4 does not divide over 3 ranks"):
        check_batch_size(make_config("none").training, 3)


def test_a_cosine_stage_falls_from_its_peak_to_a_hundredth() -> None:
    stage = StageConfig(name="only", steps=10, learning_rate=1.0, schedule="cosine")
    training = make_config("none", stages=(stage,), optimizer={"warmup_steps": 2}).training
    rates = [learning_rate_at(locate_step(training, step), training) for step in range(1, 11)]
    assert rates[:2] == [0.5, 1.0] and rates[-1] == pytest.approx(0.01)
    assert all(after < before for before, after in zip(rates[1:-1], rates[2:], strict=True))
    assert rates[5] == pytest.approx(0.01 + 0.99 * 0.5, abs=1e-9)


def test_a_run_can_start_from_an_earlier_one_with_its_projectors(config: RunConfig, shards: Path, tmp_path: Path) -> None:
    train(config, shards=shards, folder=tmp_path / "first")
    later = config.model_copy(update={"training": config.training.model_copy(update={"start_from": str(tmp_path / "first")})})
    run = start_run(later, shards, tmp_path / "second")
    exported = load_file(tmp_path / "first" / "export" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(weight, exported[name]) for name, weight in run.models.transformer.named_parameters())
    projectors = load_file(tmp_path / "first" / "projectors.safetensors")
    assert run.models.projectors is not None
    assert all(torch.equal(weight, projectors[name]) for name, weight in run.models.projectors.named_parameters())
    fewer = later.model_copy(update={"objective": later.objective.model_copy(update={"alignment_blocks": 1})})
    with pytest.raises(ArtifactError, match="projectors of other blocks or widths than this objective's"):
        start_run(fewer, shards, tmp_path / "third")


class WithText(TrainedModels):
    """A trained stand-in for a text encoder: one matrix."""

    def __init__(self, models: TrainedModels) -> None:
        super().__init__(models.transformer, models.projectors)
        self.text = torch.nn.Linear(12, 12, bias=False)

    def embed_text(self, prompt_embeds: torch.Tensor) -> torch.Tensor:
        return self.text(prompt_embeds)


def test_more_than_the_transformer_can_be_trained(config: RunConfig, shards: Path, tmp_path: Path) -> None:
    run = start_run(config, shards, tmp_path)
    run.models = WithText(run.models)
    run.optimizer = make_optimizer(run.models, config.training)
    before = run.models.text.weight.detach().clone()
    take_step(run, 1, run.maker.make_step(1))
    assert not torch.equal(before, run.models.text.weight)
