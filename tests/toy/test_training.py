"""Muon over kernels finds a minimum, a training resumes from its file, and products are rounded only where that is fast."""

import pytest
import torch
from torch import nn

from workshop.weights.training import Muon, TrainingState, autocast_where_fast, make_optimizers, train


def test_muon_fits_a_convolution_that_a_shrinking_step_can_reach():
    torch.manual_seed(0)
    goal, fitted = torch.nn.Conv2d(8, 8, 3), torch.nn.Conv2d(8, 8, 3)
    pixels = torch.randn(4, 8, 8, 8)
    matrices, others = (optimizer.param_groups[0]["params"] for optimizer in make_optimizers(fitted))
    assert [tuple(parameter.shape) for parameter in matrices] == [(8, 8, 3, 3)] and len(others) == 1
    fitted.bias.data.copy_(goal.bias.data)
    optimizer, losses = Muon(matrices, lr=0.05), []
    for step in range(80):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 80)
        loss = (fitted(pixels) - goal(pixels)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.05 * losses[0]


def test_a_training_resumed_from_its_file_is_the_uninterrupted_one(tmp_path):
    def make():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
        return TrainingState(model, make_optimizers(model))

    def run(state, checkpoint, end):
        def make_loss(step):
            pixels = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step))
            loss = state.model(pixels).square().mean()
            return loss, {"loss": loss.detach()}

        exports = []
        train(
            state, make_loss, lambda step: 1 - step / 10, lambda averaged: exports.append(averaged),
            steps=end, checkpoint=checkpoint, clip_norm=1.0, save_every=3,
        )  # fmt: skip
        assert exports[-1] is state.averaged and state.step == end
        return {**state.model.state_dict(), **{f"averaged.{k}": v for k, v in state.averaged.state_dict().items()}}

    parts = tmp_path / "deep" / "state.pt"
    run(make(), parts, 4)
    whole, resumed = run(make(), tmp_path / "whole.pt", 8), run(make(), parts, 8)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not torch.equal(whole["0.weight"], whole["averaged.0.weight"])


@pytest.mark.parametrize(
    ("found", "dtype"),
    [
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
        ({"avx2": True, "avx512_bf16": False}, torch.float32),
    ],
)
def test_products_are_rounded_only_where_the_processor_multiplies_bfloat16(
    found: dict[str, bool], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    with autocast_where_fast():
        assert (torch.eye(2) @ torch.eye(2)).dtype == dtype
