import itertools

import pytest
import torch
from safetensors.torch import load_file

from refalign.objective import reference_alignment as module
from refalign.objective.reference_alignment import push_floor, reference_alignment
from tests.oracles import losses
from tests.oracles.parity import PARITY


def make_tokens(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens that share a direction, as real ones do: few cosines lie at the kink of the relu."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(shape[-1], generator=generator)
    return tuple(torch.randn(*shape, generator=generator) + common for _ in range(2))


@pytest.mark.parametrize("case", range(8))
def test_alignment_matches_published_numbers(case):
    numbers = load_file(PARITY / "ra_loss.safetensors")
    projected, targets = numbers[f"{case}.student"][None], numbers[f"{case}.teacher"][None]
    pull_margin, push_margin = numbers[f"{case}.margins"].tolist()
    mask = torch.ones(projected.shape[:2], dtype=torch.bool)
    terms = reference_alignment(projected, targets, mask, pull_margin=pull_margin, push_margin=push_margin)
    torch.testing.assert_close(terms.pull, numbers[f"{case}.pull"], rtol=0, atol=1e-6)
    torch.testing.assert_close(terms.push, numbers[f"{case}.push"], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("margins", "switches"), itertools.product([(0.0, 1.0), (0.2, 0.8)], range(4)))
def test_push_equals_loops(margins, switches):
    projected, targets = make_tokens(4, 3, 5, 6)
    mask = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 1, 0], [0, 0, 0]]).bool()
    weight = torch.rand(4, 3, 5, generator=torch.Generator().manual_seed(1)) if switches & 1 else None
    subjects = torch.tensor([[0, 0, 1]] * 4) if switches & 2 else None
    terms = reference_alignment(
        projected, targets, mask, token_weight=weight, subject_index=subjects, pull_margin=margins[0], push_margin=margins[1]
    )
    pull, push = losses.pull_push(projected, targets, mask, weight, subjects, *margins)
    torch.testing.assert_close(terms.pull.tolist(), pull, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(terms.push.tolist(), push, rtol=1e-5, atol=1e-6)
    assert terms.pull[3] == terms.push[3] == terms.push[2] == 0 < terms.pull[2]


@pytest.mark.parametrize("margins", [(0.0, 1.0), (0.2, 0.8)])
@pytest.mark.parametrize("rows", [7, 2**20])
def test_block_form_equals_dense_form_in_value_and_gradient(margins, rows, monkeypatch):
    monkeypatch.setattr(module, "_SIMILARITIES_AT_ONCE", rows * 60)
    projected, targets = make_tokens(3, 60, 32)
    dense_input = projected.double().requires_grad_()
    pull, push = losses.dense_pull_push(dense_input, targets.double(), *margins)
    (2 * pull + 3 * push).backward()
    block_input = projected.clone().requires_grad_()
    terms = reference_alignment(
        block_input[None], targets[None], torch.ones(1, 3).bool(), pull_margin=margins[0], push_margin=margins[1]
    )
    (2 * terms.pull + 3 * terms.push).sum().backward()
    assert float(terms.pull.detach()) == pytest.approx(pull.item(), rel=1e-5)
    assert float(terms.push.detach()) == pytest.approx(push.item(), rel=1e-5)
    gap = (block_input.grad - dense_input.grad).norm() / dense_input.grad.norm()
    assert gap <= 1e-5


def test_gradient_equals_dense_form_with_all_switches():
    projected, targets = make_tokens(2, 3, 4, 5)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    weight = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(2))
    subjects = torch.tensor([[0, 0, 1], [0, 1, 2]])
    upstream = torch.tensor([[1.0, 3.0], [2.0, -1.0]])  # of pull and push, by sample

    dense_input = projected.double().requires_grad_()
    pull, push = losses.dense_weighted_pull_push(dense_input, targets.double(), mask, weight.double(), subjects, 0.2, 0.9)
    (upstream[0] * pull + upstream[1] * push).sum().backward()
    block_input = projected.clone().requires_grad_()
    switches = {"token_weight": weight, "subject_index": subjects, "pull_margin": 0.2, "push_margin": 0.9}
    terms = reference_alignment(block_input, targets, mask, **switches)
    (upstream[0] * terms.pull + upstream[1] * terms.push).sum().backward()
    torch.testing.assert_close(block_input.grad.double(), dense_input.grad, rtol=1e-4, atol=1e-7)


def test_negatives_are_those_of_the_same_sample():
    projected, targets = make_tokens(3, 2, 6, 8)
    whole = reference_alignment(projected, targets, torch.ones(3, 2).bool())
    for index in range(3):
        alone = reference_alignment(projected[index : index + 1], targets[index : index + 1], torch.ones(1, 2).bool())
        torch.testing.assert_close(whole.push[index], alone.push[0])
        torch.testing.assert_close(whole.pull[index], alone.pull[0])


def test_masked_references_change_nothing():
    projected, targets = make_tokens(1, 3, 6, 8)
    changed = projected.clone()
    changed[:, 1] = torch.nan_to_num(changed[:, 1] * 0)  # what a reference that was not attended looks like
    mask = torch.tensor([[True, False, True]])
    leaf = changed.requires_grad_()
    terms = reference_alignment(leaf, targets, mask)
    without = reference_alignment(projected[:, [0, 2]], targets[:, [0, 2]], torch.ones(1, 2).bool())
    torch.testing.assert_close(tuple(terms), tuple(without))
    sum(terms).sum().backward()
    assert leaf.grad.isfinite().all() and not leaf.grad[:, 1].any()


def test_same_subject_is_no_negative():
    projected, targets = make_tokens(1, 2, 6, 8)
    mask = torch.ones(1, 2).bool()
    assert reference_alignment(projected, targets, mask).push > 0
    assert reference_alignment(projected, targets, mask, subject_index=torch.tensor([[4, 4]])).push == 0


def test_weightless_tokens_are_as_if_absent():
    projected, targets = make_tokens(1, 2, 6, 8)
    weight = torch.ones(1, 2, 6)
    weight[:, :, 4:] = 0
    mask = torch.ones(1, 2).bool()
    weighted = reference_alignment(projected, targets, mask, token_weight=weight)
    cut = reference_alignment(projected[:, :, :4], targets[:, :, :4], mask)
    torch.testing.assert_close(tuple(weighted), tuple(cut))


def test_alignment_is_float32_inside_under_autocast():
    projected, targets = make_tokens(1, 2, 6, 8)
    mask = torch.ones(1, 2).bool()
    with torch.autocast("cpu", torch.bfloat16):
        inside = reference_alignment(projected, targets, mask)
    assert torch.equal(inside.push, reference_alignment(projected, targets, mask).push)
    leaf = projected.bfloat16().requires_grad_()
    terms = reference_alignment(leaf, targets.bfloat16(), mask)
    (terms.pull + terms.push).sum().backward()
    assert terms.push.dtype == torch.float32 and leaf.grad.dtype == torch.bfloat16


def test_no_gradient_reaches_the_targets():
    projected, targets = make_tokens(1, 2, 6, 8)
    leaf, frozen = projected.requires_grad_(), targets.requires_grad_()
    terms = reference_alignment(leaf, frozen, torch.ones(1, 2).bool())
    (terms.pull + terms.push).sum().backward()
    assert leaf.grad is not None and frozen.grad is None


def test_push_floor_is_the_push_of_a_perfect_model():
    _, targets = make_tokens(2, 3, 6, 8)
    mask = torch.ones(2, 3).bool()
    floor = push_floor(targets.requires_grad_(), mask)
    perfect = reference_alignment(3 * targets, targets, mask)
    torch.testing.assert_close(floor, perfect.push)
    assert not floor.requires_grad and (floor > 0).all() and (perfect.pull < 1e-6).all()
