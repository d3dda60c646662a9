"""One forward pass: what is and is not differentiated, and that no split of the batch changes it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from make_shards import VISION_WIDTH, make_config, write_shards

from refalign.config import RunConfig
from refalign.objective.flow_matching import make_training_schedule
from refalign.shards.reader import ShardIndex
from refalign.training.batch import BatchMaker
from refalign.training.models import TrainedModels, build_models, prepare_blocks
from refalign.training.step import train_step

KEEP_ALL = {"dropout": {"text": 0.0, "references": 0.0, "both": 0.0}}


def make_models(config: RunConfig) -> TrainedModels:
    return build_models(config, VISION_WIDTH)


def run(models: TrainedModels, config: RunConfig, shards: Path) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Loss terms and gradients of step 1 over all its forward passes."""
    models.zero_grad()
    totals: dict[str, Any] = {}
    for batch in BatchMaker(ShardIndex.open(shards, "train"), config).make_step(1):
        size = config.training.global_batch
        terms = train_step(models, batch, make_training_schedule(), objective=config.objective, global_batch_size=size).terms
        terms.total.backward()
        for name, term in terms._asdict().items():
            totals[name] = totals.get(name, 0.0) + float(term.detach())
    return totals, {name: p.grad.clone() for name, p in models.named_parameters() if p.grad is not None}


def with_objective(config: RunConfig, **values: Any) -> RunConfig:
    return config.model_copy(update={"objective": config.objective.model_copy(update=values)})


@pytest.fixture()
def config(base: Path) -> RunConfig:
    return make_config(base, global_batch=8, micro_batch=8, **KEEP_ALL)


def test_the_terms_add_up(config: RunConfig, shards: Path) -> None:
    terms, gradients = run(make_models(config), config, shards)
    assert terms["total"] == pytest.approx(terms["flow_matching"] + terms["alignment"], rel=1e-6)
    assert terms["scored_fraction"] == 1.0 and 0 < terms["pull"] < 2 and terms["push"] > 0 and terms["push_floor"] > 0
    assert any(name.startswith("projectors.") and gradient.abs().max() > 0 for name, gradient in gradients.items())


def test_two_by_four_accumulated_is_eight(base: Path, shards: Path) -> None:
    results = []
    for micro_batch in (8, 4, 1):
        config = make_config(base, global_batch=8, micro_batch=micro_batch)
        results.append(run(make_models(config), config, shards))
    for terms, gradients in results[1:]:
        assert terms == pytest.approx(results[0][0], rel=1e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, results[0][1][name], rtol=1e-4, atol=1e-6)


def test_dropped_references_contribute_nothing_and_still_count(base: Path, shards: Path) -> None:
    config = make_config(base, global_batch=8, micro_batch=8, dropout={"text": 0.0, "references": 1.0, "both": 0.0})
    models = make_models(config)
    terms, gradients = run(models, config, shards)
    assert terms["alignment"] == terms["pull"] == terms["push"] == terms["scored_fraction"] == 0
    assert not any(gradient.any() for name, gradient in gradients.items() if name.startswith("projectors."))
    plain = with_objective(config, alignment="none")
    assert run(make_models(plain), plain, shards)[0]["total"] == pytest.approx(terms["total"], rel=1e-6)


def test_with_stop_gradient_the_transformer_feels_flow_matching_alone(config: RunConfig, shards: Path) -> None:
    stopped = with_objective(config, stop_gradient=True)
    terms, gradients = run(make_models(stopped), stopped, shards)
    plain = with_objective(config, alignment="none")
    _, plain_gradients = run(make_models(plain), plain, shards)
    assert terms["alignment"] > 0
    for name, gradient in plain_gradients.items():
        assert torch.equal(gradients[name], gradient), name
    aligned = run(make_models(config), config, shards)[1]
    assert any(not torch.allclose(aligned[name], gradient) for name, gradient in plain_gradients.items())


def test_every_switch_of_the_objective_changes_the_loss_and_nothing_breaks(config: RunConfig, shards: Path) -> None:
    models = make_models(config)
    default, _ = run(models, config, shards)
    weights = [{"token_weight": "foreground"}, {"token_weight": "padding"}]
    factors = [{"push_coefficient": 0.0}, {"coefficient": 0.5}, {"gate_power": 0.0}]
    for switch in (*weights, *factors, {"pull_margin": 0.5}, {"push_margin": 0.9}):
        terms, _ = run(models, with_objective(config, **switch), shards)
        assert terms["alignment"] != pytest.approx(default["alignment"], rel=1e-4), switch
        assert terms["flow_matching"] == pytest.approx(default["flow_matching"], rel=1e-6)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_activation_checkpointing_changes_no_gradient(mode: str, base: Path, shards: Path) -> None:
    config = make_config(base)
    plain = run(make_models(config), config, shards)[1]
    models = make_models(config)
    prepare_blocks(models.transformer, make_config(base, activation_checkpointing=mode).training)
    again = run(models, config, shards)[1]
    assert all(torch.equal(again[name], gradient) for name, gradient in plain.items())


def test_the_old_switch_of_activation_checkpointing_is_read(base: Path) -> None:
    modes = [make_config(base, activation_checkpointing=value).training.activation_checkpointing for value in (True, False)]
    assert modes == ["full", "none"]


@pytest.mark.parametrize("mode", ["none", "selective"])
def test_compiled_blocks_give_the_same_gradients(mode: str, base: Path, shards: Path, monkeypatch) -> None:
    """With the backend that traces and differentiates as the real one but generates no code, which takes minutes."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    config = make_config(base)
    plain = run(make_models(config), config, shards)[1]
    models = make_models(config)
    names = [name for name, _ in models.named_parameters()]
    prepare_blocks(models.transformer, make_config(base, compile=True, activation_checkpointing=mode).training)
    assert [name for name, _ in models.named_parameters()] == names
    again = run(models, config, shards)[1]
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-4, atol=1e-6)


def test_repa_aligns_one_block_of_the_video_with_its_own_frames(config: RunConfig, tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", frame_tokens=True)
    repa = config.model_copy(
        update={
            "objective": config.objective.model_copy(update={"alignment": "repa", "coefficient": 0.5}),
            "shards": config.shards.model_copy(update={"frame_tokens": True}),
        }
    )
    models = make_models(repa)
    assert models.projectors is not None and models.projectors.block_indices == (1,)
    terms, gradients = run(models, repa, shards)
    assert terms["total"] == pytest.approx(terms["flow_matching"] + terms["alignment"], rel=1e-6)
    assert -0.5 <= terms["alignment"] <= 0.5 and terms["alignment"] != 0 and terms["pull"] == terms["push"] == 0
    plain = with_objective(config, alignment="none")
    plain_terms, plain_gradients = run(make_models(plain), plain, shards)
    assert terms["flow_matching"] == pytest.approx(plain_terms["flow_matching"], rel=1e-6)
    assert not torch.equal(gradients["transformer.patch_embedding.weight"], plain_gradients["transformer.patch_embedding.weight"])
    stopped = with_objective(repa, stop_gradient=True)
    stopped_gradients = run(make_models(stopped), stopped, shards)[1]
    assert all(torch.equal(stopped_gradients[name], gradient) for name, gradient in plain_gradients.items())
