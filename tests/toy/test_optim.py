"""Muon over kernels finds a minimum, a training resumes from its file, and products are rounded only where that is fast."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from refalign.toy.optim import Muon, TrainingState, autocast_where_fast, make_optimizers, split_parameters


def test_muon_fits_a_convolution_that_a_shrinking_step_can_reach():
    torch.manual_seed(0)
    goal, fitted = torch.nn.Conv2d(8, 8, 3), torch.nn.Conv2d(8, 8, 3)
    pixels = torch.randn(4, 8, 8, 8)
    matrices, others = split_parameters(fitted)
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

    def run(state, end):
        while state.step < end:
            pixels = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(state.step))
            state.model(pixels).square().mean().backward()
            state.advance(1 - state.step / 10)
        return {**state.model.state_dict(), **{f"averaged.{k}": v for k, v in state.averaged.state_dict().items()}}

    first, second = make(), make()
    run(first, 4)
    first.save(tmp_path / "deep" / "state.pt")
    second.load(tmp_path / "deep" / "state.pt")
    whole, resumed = run(make(), 8), run(second, 8)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not torch.equal(whole["0.weight"], whole["averaged.0.weight"])


def test_a_training_may_start_from_exported_weights(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    state = TrainingState(model, make_optimizers(model))
    exported = {name: torch.randn(tensor.shape).half() for name, tensor in model.state_dict().items()}
    exported["1.num_batches_tracked"] = torch.tensor(7)
    save_file(exported, tmp_path / "model.safetensors")
    state.load(tmp_path)
    assert state.step == 0
    for name, tensor in exported.items():
        assert torch.equal(state.model.state_dict()[name], tensor.to(state.model.state_dict()[name].dtype)), name
        assert torch.equal(state.averaged.state_dict()[name], state.model.state_dict()[name]), name


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
