"""The optimizers that a setting can choose."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from make_shards import make_config

from refalign.errors import ConfigError
from refalign.training.models import Ranks, _make_mesh
from refalign.training.optim import make_optimizer, orthogonalise, set_learning_rate


@pytest.mark.skipif(importlib.util.find_spec("torchao") is not None, reason="torchao is here")
def test_adamw8bit_without_torchao_says_what_to_do() -> None:
    training = make_config("none", optimizer={"name": "adamw8bit"}).training
    with pytest.raises(
        ConfigError, match=r"optimizer\.name=adamw8bit needs torchao.*install it, or set training\.optimizer\.name=adamw\."
    ):
        make_optimizer(torch.nn.Linear(2, 2), training)


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")
def test_adamw8bit_learns_and_is_saved_like_adamw() -> None:
    torch.manual_seed(0)
    module, data = torch.nn.Linear(64, 64), torch.randn(32, 64)
    optimizer = make_optimizer(module, make_config("none", optimizer={"name": "adamw8bit"}).training)
    names = {name for state in optimizer.state.values() for name in state}
    assert names == {"step", "exp_avg", "exp_avg_sq"}
    losses = []
    for _ in range(20):
        set_learning_rate(optimizer, 1e-2)
        loss = (module(data) - data).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]
    assert {name for state in optimizer.state.values() for name in state} == names


def test_orthogonalise_brings_singular_values_to_about_one() -> None:
    torch.manual_seed(0)
    for shape in ((2, 12, 40), (2, 40, 12)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
        assert values.min() > 0.5 and values.max() < 1.4


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest() -> None:
    """The first step of each, from the formulas: without momentum so far, U V^T of the gradient, and its sign."""
    torch.manual_seed(0)
    module = torch.nn.ModuleDict({"outer": torch.nn.ModuleDict({"blocks": torch.nn.Linear(6, 4)}), "head": torch.nn.Linear(6, 4)})
    before = {name: each.detach().clone() for name, each in module.named_parameters()}
    gradients = {name: torch.randn_like(each) for name, each in module.named_parameters()}
    for name, each in module.named_parameters():
        each.grad = gradients[name].clone()
    optimizer = make_optimizer(module, make_config("none", optimizer={"name": "muon", "weight_decay": 0.1}).training)
    set_learning_rate(optimizer, 1e-2)
    optimizer.step()
    for name, each in module.named_parameters():
        if name == "outer.blocks.weight":
            u, _, v = torch.linalg.svd(gradients[name], full_matrices=False)
            direction, tolerance = u @ v * 0.8 * 6**0.5, 0.8 * 6**0.5 * 0.35  # singular values of 0.7 to 1.2 for 1
        else:
            direction, tolerance = gradients[name].sign(), 1e-3
        step = (before[name] * (1 - 1e-2 * 0.1) - each.detach()) / 1e-2
        torch.testing.assert_close(step, direction, rtol=0, atol=tolerance)


def test_replicas_must_divide_the_ranks() -> None:
    assert _make_mesh(None, Ranks(0, 6, torch.device("cpu"))) is None
    assert _make_mesh(6, Ranks(0, 6, torch.device("cpu"))) is None
    with pytest.raises(ConfigError, match="shards_per_replica=4 does not divide 6 ranks"):
        _make_mesh(4, Ranks(0, 6, torch.device("cpu")))
