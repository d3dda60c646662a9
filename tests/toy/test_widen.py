"""A wider Transformer computes what the narrow one did, and learns with what is new; stage 1 follows its base."""

import pytest
import torch
from diffusers import WanTransformer3DModel

from refalign.models.projector import Projectors
from refalign.toy.initial_weights import make_transformer, save_half
from refalign.toy.rebase import rebase
from refalign.toy.widen import widen, widen_projector


@pytest.fixture(scope="module")
def pair():
    """(narrow, wide, inputs)"""
    torch.manual_seed(0)
    wide = make_transformer()
    narrow = WanTransformer3DModel.from_config({**wide.config, "num_attention_heads": 4, "ffn_dim": 512})
    inputs = torch.randn(2, 16, 3, 12, 12), torch.tensor([300.0, 800.0]), torch.randn(2, 20, narrow.config.text_dim)
    return narrow, widen(narrow, wide), inputs


def test_a_wider_transformer_computes_nearly_the_same(pair):
    narrow, wide, inputs = pair
    with torch.no_grad():
        before, after, other = (model(*inputs, return_dict=False)[0] for model in (narrow, wide, make_transformer(seed=5)))
    size = before.square().mean()
    assert (after - before).square().mean() < 0.05 * size < 0.1 * (other - before).square().mean()


def test_everything_new_learns(pair):
    narrow, wide, inputs = pair
    sizes = {name: parameter.shape for name, parameter in narrow.named_parameters()}
    optimizer = torch.optim.SGD(wide.parameters(), lr=1e-2)
    for _ in range(2):  # what nobody reads yet is told nothing in the first step
        optimizer.zero_grad()
        wide(*inputs, return_dict=False)[0].square().mean().backward()
        optimizer.step()
    for name, parameter in wide.named_parameters():
        new = torch.ones_like(parameter, dtype=torch.bool)
        new[tuple(slice(size) for size in sizes[name])] = False
        assert not new.any() or parameter.grad[new].any(), name


def test_a_wider_projector_gives_the_same_tokens():
    narrow, wide = (Projectors.make_refalign([1], width, 16) for width in (8, 12))
    wide.load_state_dict({name: widen_projector(name, was, wide.state_dict()[name]) for name, was in narrow.state_dict().items()})
    tokens = torch.randn(2, 3, 4, 12)
    torch.testing.assert_close(wide((tokens,)), narrow((tokens[..., :8],)))


def test_stage_1_follows_its_base(tmp_path):
    places = [tmp_path / name for name in ("stage1", "before", "after")]
    for seed, place in enumerate(places):
        save_half(make_transformer(seed), place)
    stage1, before, after = (WanTransformer3DModel.from_pretrained(place).state_dict() for place in places)
    rebase(*places)
    moved = WanTransformer3DModel.from_pretrained(places[0]).state_dict()
    for name, tensor in moved.items():
        torch.testing.assert_close(tensor, stage1[name] + after[name] - before[name], atol=2e-3, rtol=2e-3)
