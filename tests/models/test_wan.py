import json

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from refalign.errors import ArtifactError, GeometryError
from refalign.models.projector import Projectors
from refalign.models.wan import RefAlignTransformer, load_transformer
from refalign.objective.flow_matching import alignment_gate, flow_matching_loss
from refalign.objective.reference_alignment import reference_alignment
from refalign.objective.total import total_loss

WAN_1_3B = {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960, "text_dim": 4096}
WAN_14B = {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824, "text_dim": 4096}
TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 3,
    "ffn_dim": 32,
    "text_dim": 8,
    "freq_dim": 16,
    "rope_max_seq_len": 32,
}


@pytest.fixture(scope="module")
def transformer() -> RefAlignTransformer:
    torch.manual_seed(0)
    return RefAlignTransformer(**TINY)


def make_inputs(num_samples: int = 2, num_references: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "latents": torch.randn(num_samples, 16, 2, 4, 6, generator=generator),
        "timestep": torch.linspace(200, 900, num_samples),
        "prompt_embeds": torch.randn(num_samples, 5, 8, generator=generator),
        "reference_latents": torch.randn(num_samples, num_references, 16, 4, 6, generator=generator),
    }


def take(inputs: dict[str, torch.Tensor], index: int, references: list[int] | None = None) -> dict[str, torch.Tensor]:
    """One sample of a batch, with some of its references."""
    sample = {name: each[index : index + 1] for name, each in inputs.items()}
    if references is not None:
        sample["reference_latents"] = sample["reference_latents"][:, references]
    return sample


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("config", "expected"), [(WAN_1_3B, 1_418_996_800), (WAN_14B, 14_288_491_584)])
def test_real_wan_builds_on_meta_with_the_base_models_parameters(config, expected):
    with torch.device("meta"):
        ours, stock = RefAlignTransformer(**config), WanTransformer3DModel(**config)
    shapes = [{name: tuple(each.shape) for name, each in model.named_parameters()} for model in (ours, stock)]
    assert shapes[0] == shapes[1]
    assert sum(each.numel() for each in ours.parameters()) == expected


def test_saved_model_opens_in_stock_diffusers_and_tells_no_path(transformer, tmp_path):
    transformer.save_pretrained(tmp_path / "transformer")
    again = load_transformer(str(tmp_path))
    again.save_pretrained(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["_class_name"] == "WanTransformer3DModel" and "_name_or_path" not in config
    stock = WanTransformer3DModel.from_pretrained(tmp_path / "again")
    assert type(stock) is WanTransformer3DModel
    ours, theirs = transformer.state_dict(), stock.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    close(again(**make_inputs()).velocity, transformer(**make_inputs()).velocity)


def test_incomplete_weights_are_refused_rather_than_made_up(transformer, tmp_path):
    transformer.save_pretrained(tmp_path / "transformer")
    file = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["blocks.1.ffn.net.2.weight"]
    save_file(weights, file)
    with pytest.raises(ArtifactError, match="1 weights are missing .* the first: blocks.1.ffn.net.2.weight"):
        load_transformer(str(tmp_path))
    file.unlink()
    with pytest.raises(ArtifactError, match="cannot be loaded"):
        load_transformer(str(tmp_path))


def test_samples_of_a_batch_do_not_touch_each_other(transformer):
    inputs = make_inputs(3)
    whole = transformer(**inputs, alignment_blocks=(0, 2))
    for index in range(3):
        alone = transformer(**take(inputs, index), alignment_blocks=(0, 2))
        close(whole.velocity[index], alone.velocity[0])
        close(whole.reference_tokens[1][index], alone.reference_tokens[1][0])
        close(whole.video_tokens[1][index], alone.video_tokens[1][0])


def test_references_skip_text_cross_attention(transformer):
    inputs = make_inputs()
    other = inputs | {"prompt_embeds": inputs["prompt_embeds"] + 1}
    first, second = (transformer(**each, alignment_blocks=(0, 1)) for each in (inputs, other))
    assert torch.equal(first.reference_tokens[0], second.reference_tokens[0])  # one block: text cannot have reached them
    assert not torch.equal(first.reference_tokens[1], second.reference_tokens[1])  # later it can, through the video
    assert not torch.equal(first.video_tokens[0], second.video_tokens[0])


def test_no_reference_is_one_attended_zero_frame(transformer):
    inputs = make_inputs()
    given = inputs.pop("reference_latents")
    none = transformer(**inputs, alignment_blocks=(1,))
    zeros = transformer(**inputs, reference_latents=torch.zeros_like(given[:, :1]), alignment_blocks=(1,))
    masked = transformer(**inputs, reference_latents=given, reference_mask=torch.zeros(2, 2).bool(), alignment_blocks=(1,))
    assert torch.equal(none.velocity, zeros.velocity) and torch.equal(none.velocity, masked.velocity)
    assert none.reference_tokens[0].shape[1] == 1 and masked.reference_tokens[0].shape[1] == 2


def test_masked_references_are_as_if_absent(transformer):
    inputs = make_inputs(2, 3)
    mask = torch.tensor([[True, False, True], [False, True, True]])
    output = transformer(**inputs, reference_mask=mask, alignment_blocks=(1,))
    for index, kept in enumerate([[0, 2], [1, 2]]):
        alone = transformer(**take(inputs, index, kept), alignment_blocks=(1,))
        close(output.velocity[index], alone.velocity[0])
        close(output.reference_tokens[0][index, kept], alone.reference_tokens[0][0])
    assert not output.reference_tokens[0][0, 1].any() and not output.reference_tokens[0][1, 0].any()


def test_dropped_and_kept_single_references_share_a_batch(transformer):
    inputs = make_inputs(2, 1)
    output = transformer(**inputs, reference_mask=torch.tensor([[False], [True]]))
    dropped = take(inputs, 0) | {"reference_latents": None}
    close(output.velocity[0], transformer(**dropped).velocity[0])
    close(output.velocity[1], transformer(**take(inputs, 1)).velocity[0])


def test_ragged_masks_and_absent_blocks_are_refused(transformer):
    with pytest.raises(GeometryError, match=r"attend \[1, 2\] reference frames"):
        transformer(**make_inputs(), reference_mask=torch.tensor([[True, True], [False, True]]))
    with pytest.raises(GeometryError, match="block 3 was asked for; the last block is 2"):
        transformer(**make_inputs(), alignment_blocks=(0, 3))


def test_image_to_video_model_is_refused():
    with pytest.raises(ArtifactError, match="text-to-video"), torch.device("meta"):
        RefAlignTransformer(**TINY, image_dim=16, added_kv_proj_dim=24)


def test_activation_checkpointing_changes_no_gradient(transformer):
    gradients = []
    for enable in (transformer.disable_gradient_checkpointing, transformer.enable_gradient_checkpointing):
        enable()
        transformer.zero_grad()
        output = transformer(**make_inputs(), alignment_blocks=(0, 2))
        (output.velocity.square().mean() + output.reference_tokens[0].square().mean()).backward()
        gradients.append([each.grad.clone() for each in transformer.parameters()])
    transformer.disable_gradient_checkpointing()
    assert all(torch.equal(plain, recomputed) for plain, recomputed in zip(*gradients, strict=True))


def test_weights_in_bfloat16_take_float32_inputs(transformer, tmp_path):
    transformer.save_pretrained(tmp_path / "transformer")
    half = load_transformer(str(tmp_path), dtype=torch.bfloat16)
    inputs = make_inputs()
    output = half(**inputs)
    assert output.velocity.dtype == torch.bfloat16
    torch.testing.assert_close(output.velocity.float(), transformer(**inputs).velocity, rtol=0.1, atol=0.1)


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_sharded_per_block_gives_the_same_output_and_gradient(transformer, process_group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    sharded = RefAlignTransformer(**TINY)
    sharded.load_state_dict(transformer.state_dict())
    sharded.enable_gradient_checkpointing()
    mesh = init_device_mesh("cpu", (1,))
    for block in sharded.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    gradients = []
    for model in (transformer, sharded):
        model.zero_grad()
        output = model(**make_inputs(), alignment_blocks=(0, 2))
        (output.velocity.square().mean() + output.reference_tokens[1].square().mean()).backward()
        gradients.append([getattr(each.grad, "full_tensor", lambda each=each: each.grad)() for each in model.parameters()])
    for plain, gathered in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, gathered)


def dit_gradients(transformer: RefAlignTransformer, alignment: str) -> list[torch.Tensor]:
    """The Transformer's gradient: of plain flow matching, or of the objective with or without the stop-gradient."""
    inputs, blocks = make_inputs(), (0, 1)
    torch.manual_seed(0)
    projectors = Projectors.make_refalign(blocks, transformer.width, 10)
    transformer.zero_grad()
    output = transformer(**inputs, alignment_blocks=() if alignment == "plain" else blocks)
    flow = flow_matching_loss(output.velocity, torch.ones_like(output.velocity), torch.tensor([0.5, 1.5]))
    if alignment == "plain":
        loss = flow.sum() / 2
    elif alignment == "none":
        loss = total_loss(flow, global_batch_size=2).total
    else:
        targets, mask = torch.randn(2, 2, 6, 10, generator=torch.Generator().manual_seed(3)), torch.ones(2, 2).bool()
        projected = projectors(output.reference_tokens, stop_gradient=alignment == "stopped")
        terms = [reference_alignment(each, targets, mask) for each in projected]
        loss = total_loss(flow, global_batch_size=2, blocks=terms, gate=alignment_gate(inputs["timestep"])).total
    loss.backward()
    if alignment in ("stopped", "full"):
        assert all(each.grad is not None and each.grad.any() for each in projectors.parameters())
    return [each.grad.clone() for each in transformer.parameters()]


@pytest.mark.parametrize("control", ["none", "stopped"])
def test_without_alignment_or_with_stop_gradient_the_gradient_is_flow_matchings_bit_for_bit(transformer, control):
    plain = dit_gradients(transformer, "plain")
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(dit_gradients(transformer, control), plain, strict=True))
    assert any(not torch.equal(ours, theirs) for ours, theirs in zip(dit_gradients(transformer, "full"), plain, strict=True))
