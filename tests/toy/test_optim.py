"""Muon's update is orthogonal, and it finds a minimum."""

import torch

from refalign.toy.optim import Muon, orthogonalise, split_parameters


def test_orthogonalise_brings_singular_values_to_about_one():
    torch.manual_seed(0)
    for shape in ((12, 40), (40, 12)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
        assert values.min() > 0.5 and values.max() < 1.4


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
