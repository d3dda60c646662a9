"""The optimizers that a setting can choose."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from make_shards import make_config

from refalign.errors import ConfigError
from refalign.training.models import Ranks, _make_mesh
from refalign.training.optim import make_optimizer, set_learning_rate


@pytest.mark.skipif(importlib.util.find_spec("torchao") is not None, reason="torchao is here")
def test_adamw8bit_without_torchao_says_what_to_do() -> None:
    training = make_config("none", optimizer="adamw8bit").training
    with pytest.raises(ConfigError, match=r"optimizer=adamw8bit needs torchao.*install it, or set training\.optimizer=adamw"):
        make_optimizer(torch.nn.Linear(2, 2), training)


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")
def test_adamw8bit_learns_and_is_saved_like_adamw() -> None:
    torch.manual_seed(0)
    module, data = torch.nn.Linear(64, 64), torch.randn(32, 64)
    optimizer = make_optimizer(module, make_config("none", optimizer="adamw8bit").training)
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


def test_replicas_must_divide_the_ranks() -> None:
    assert _make_mesh(None, Ranks(0, 6, torch.device("cpu"))) is None
    assert _make_mesh(6, Ranks(0, 6, torch.device("cpu"))) is None
    with pytest.raises(ConfigError, match="shards_per_replica=4 does not divide 6 ranks"):
        _make_mesh(4, Ranks(0, 6, torch.device("cpu")))
