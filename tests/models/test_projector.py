import pytest
import torch
from safetensors.torch import save_file

from refalign.errors import ArtifactError
from refalign.models.projector import Projectors


@pytest.mark.parametrize("make", [lambda: Projectors.make_refalign((0, 4, 7), 12, 5), lambda: Projectors.make_repa(3, 12, 5)])
def test_saved_projectors_come_back(make, tmp_path):
    projectors = make()
    projectors.save(tmp_path / "projectors.safetensors")
    again = Projectors.load(tmp_path / "projectors.safetensors")
    assert again.block_indices == projectors.block_indices
    tokens = tuple(torch.randn(2, 3, 4, 12) for _ in projectors.block_indices)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(projectors(tokens), again(tokens), strict=True))
    assert all(each.requires_grad for each in again.parameters())


def test_refalign_projector_is_the_published_one():
    projector = Projectors.make_refalign(range(9), 48, 24).blocks["0"]
    assert [tuple(each.shape) for each in projector.parameters()] == [(24, 48), (24, 24)]


def test_stop_gradient_reaches_projectors_only():
    projectors = Projectors.make_refalign((0,), 6, 4)
    tokens = torch.randn(1, 2, 3, 6, requires_grad=True)
    projectors((tokens,), stop_gradient=True)[0].sum().backward()
    assert tokens.grad is None and all(each.grad is not None for each in projectors.parameters())


def test_other_files_are_refused(tmp_path):
    with pytest.raises(ArtifactError, match="no such file of projectors"):
        Projectors.load(tmp_path / "absent.safetensors")
    save_file({"blocks.0.attn1.to_q.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(ArtifactError, match="not a set of projectors"):
        Projectors.load(tmp_path / "other.safetensors")
    save_file(
        {"blocks.0.proj.0.weight": torch.zeros(2, 2), "blocks.1.proj.0.weight": torch.zeros(3, 2)}, tmp_path / "odd.safetensors"
    )
    with pytest.raises(ArtifactError, match="not a set of projectors"):
        Projectors.load(tmp_path / "odd.safetensors")
