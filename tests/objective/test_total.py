import pytest
import torch

from refalign.objective.baselines import repa
from refalign.objective.flow_matching import alignment_gate, flow_matching_loss
from refalign.objective.reference_alignment import AlignmentTerms, push_floor, reference_alignment
from refalign.objective.total import total_loss
from tests.oracles import losses


def make_samples(num_samples: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(num_samples, *shape, generator=generator)  # noqa: E731
    return {
        "velocity": draw(2, 2, 3, 3),
        "target": draw(2, 2, 3, 3),
        "timestep": 1000 * torch.rand(num_samples, generator=generator),
        "projected": draw(2, 3, 6, 8) + 0.5,
        "targets": draw(3, 6, 8) + 0.5,
        "mask": torch.rand(num_samples, 3, generator=generator) > 0.3,
    }


def objective(samples: dict[str, torch.Tensor], global_batch_size: int):
    """The whole objective with two aligned blocks."""
    flow = flow_matching_loss(samples["velocity"], samples["target"], torch.ones(len(samples["mask"])))
    blocks = [reference_alignment(samples["projected"][:, j], samples["targets"], samples["mask"]) for j in range(2)]
    return total_loss(
        flow,
        global_batch_size=global_batch_size,
        blocks=blocks,
        gate=alignment_gate(samples["timestep"]),
        alignment_mask=samples["mask"],
        push_floor=push_floor(samples["targets"], samples["mask"]),
    )


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_any_split_of_the_batch_adds_up_to_the_whole(parts):
    samples = make_samples(8)
    whole = objective(samples, 8)
    pieces = [objective({name: each.chunk(parts)[n] for name, each in samples.items()}, 8) for n in range(parts)]
    for name in whole._fields:
        total = sum(getattr(piece, name) for piece in pieces)
        torch.testing.assert_close(total, getattr(whole, name), rtol=1e-6, atol=1e-7, msg=name)


def test_gradients_of_split_batches_add_up_to_the_whole():
    gradients = []
    for parts in (1, 4):
        samples = make_samples(8)
        leaf = samples["projected"].requires_grad_()
        for n in range(parts):
            objective({name: each.chunk(parts)[n] for name, each in samples.items()}, 8).total.backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-8)


def test_total_is_the_formula():
    flow, gate = torch.tensor([1.0, 3.0]), torch.tensor([0.5, 0.0])
    blocks = [
        AlignmentTerms(torch.tensor([2.0, 9.0]), torch.tensor([1.0, 9.0])),
        AlignmentTerms(torch.tensor([4.0, 9.0]), torch.tensor([3.0, 9.0])),
    ]
    terms = total_loss(flow, global_batch_size=2, blocks=blocks, gate=gate, alignment_weight=2.0, push_weight=0.5)
    assert float(terms.flow_matching) == 2.0
    assert float(terms.pull) == (3 + 9) / 2 and float(terms.push) == (2 + 9) / 2
    assert float(terms.alignment) == 2.0 * 0.5 * (3 + 0.5 * 2) / 2
    assert float(terms.total) == float(terms.flow_matching) + float(terms.alignment)


def test_dropped_references_count_as_samples():
    samples = make_samples(2)
    samples["mask"] = torch.tensor([[True, True, True], [False, False, False]])
    first = {name: each[:1] for name, each in samples.items()}
    torch.testing.assert_close(objective(samples, 2).pull, objective(first, 1).pull / 2)
    assert float(objective(samples, 2).scored_fraction) == 0.5


def test_permuting_pairs_of_reference_and_target_leaves_the_objective_unchanged():
    samples = make_samples(4)
    order = torch.tensor([2, 0, 1])
    permuted = samples | {
        "projected": samples["projected"][:, :, order],
        "targets": samples["targets"][:, order],
        "mask": samples["mask"][:, order],
    }
    for ours, theirs in zip(objective(samples, 4), objective(permuted, 4), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_without_alignment_the_total_is_flow_matching_alone():
    flow = torch.rand(3, requires_grad=True)
    terms = total_loss(flow, global_batch_size=3)
    assert torch.equal(terms.total, flow.sum() / 3)
    assert float(terms.pull) == float(terms.push) == float(terms.alignment) == 0


def test_repa_equals_loops():
    projected, targets = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(repa(projected, targets).tolist(), losses.repa(projected, targets), rtol=1e-5, atol=1e-6)
    frame_mask = torch.tensor([[True, False, True], [False, False, False]])
    masked = repa(projected, targets, frame_mask)
    torch.testing.assert_close(masked[:1].tolist(), losses.repa(projected[:1, [0, 2]], targets[:1, [0, 2]]), rtol=1e-5, atol=1e-6)
    assert masked[1] == 0


def test_repa_enters_the_total_without_a_gate():
    terms = total_loss(torch.ones(2), global_batch_size=2, baseline=torch.tensor([-1.0, -0.5]), alignment_weight=0.5)
    assert float(terms.total) == 1 + 0.5 * -0.75
