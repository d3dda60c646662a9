import argparse
import importlib.util
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from refalign.errors import ArtifactError
from refalign.models import convert
from refalign.models.convert import convert_official, convert_to_official, load_official
from refalign.models.projector import Projectors
from refalign.models.wan import load_transformer
from refalign.objective.reference_alignment import reference_alignment
from refalign.toy import WEIGHTS_FOLDER
from tests.oracles.parity import PARITY_HEADS, load_numbers, make_inputs, make_targets, write_official


@pytest.fixture(scope="module")
def official(tmp_path_factory) -> Path:
    return write_official(tmp_path_factory.mktemp("official") / "dit.safetensors")


@pytest.mark.parametrize("route", ["load_official", "folder"])
def test_forward_matches_published_numbers(official, route, tmp_path):
    if route == "load_official":
        transformer, projectors = load_official(official, num_attention_heads=PARITY_HEADS)
    else:
        convert_official(official, tmp_path, num_attention_heads=PARITY_HEADS)
        transformer, projectors = load_transformer(str(tmp_path)), Projectors.load(tmp_path / "projectors.safetensors")
    expected, inputs = load_numbers("out."), make_inputs()
    output = transformer(**inputs, alignment_blocks=tuple(range(9)))
    torch.testing.assert_close(output.velocity, expected["velocity"], rtol=0, atol=2e-5)
    projected = projectors(output.reference_tokens)
    torch.testing.assert_close(torch.stack(projected).flatten(2, 3)[:, 0], expected["projected"], rtol=0, atol=2e-5)
    terms = [reference_alignment(each, make_targets(), torch.ones(1, 2).bool()) for each in projected]
    pull, push = (torch.stack(each).mean(0) for each in zip(*terms, strict=True))
    torch.testing.assert_close(pull + push, expected["loss_ra"], rtol=0, atol=1e-5)
    torch.testing.assert_close(push, expected["loss_push"], rtol=0, atol=1e-5)
    inputs.pop("reference_latents")
    torch.testing.assert_close(transformer(**inputs).velocity, expected["velocity_null_reference"], rtol=0, atol=2e-5)


def test_there_and_back_is_identity(official, tmp_path):
    summary = convert_official(official, tmp_path / "diffusers", num_attention_heads=PARITY_HEADS)
    assert summary.startswith("10 layers of width 48") and "projectors of blocks (0, 1" in summary
    convert_to_official(tmp_path / "diffusers", tmp_path / "back")
    before, after = load_file(official), load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_shards_are_read_and_written_a_few_tensors_at_a_time(official, tmp_path, monkeypatch):
    weights = load_file(official)
    (tmp_path / "shards").mkdir()
    for number in range(3):
        part = {f"pipe.dit.{name}": each for index, (name, each) in enumerate(weights.items()) if index % 3 == number}
        save_file(part, tmp_path / "shards" / f"model-{number}.safetensors")
    monkeypatch.setattr(convert, "_MAX_FILE_BYTES", 100_000)
    convert_official(tmp_path / "shards", tmp_path / "out", num_attention_heads=PARITY_HEADS)
    files = sorted((tmp_path / "out" / "transformer").glob("*.safetensors"))
    assert len(files) > 5 and all(file.stat().st_size < 120_000 for file in files)
    stock = WanTransformer3DModel.from_pretrained(tmp_path / "out" / "transformer")
    whole, _ = load_official(official, num_attention_heads=PARITY_HEADS)
    assert all(torch.equal(each, stock.state_dict()[name]) for name, each in whole.state_dict().items())


def test_names_are_those_of_diffusers_own_conversion(official):
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    ours = {
        name: convert.official_name(name) for name in load_official(official, num_attention_heads=PARITY_HEADS)[0].state_dict()
    }
    assert convert_wan_transformer_to_diffusers({theirs: theirs for theirs in ours.values()}) == ours


def test_released_weights_without_projectors_convert(official, tmp_path):
    weights = {name: each for name, each in load_file(official).items() if "input_mlp" not in name}
    save_file(weights, tmp_path / "released.safetensors")
    transformer, projectors = load_official(tmp_path / "released.safetensors", num_attention_heads=PARITY_HEADS)
    assert projectors is None and all(each.device.type == "cpu" for each in transformer.state_dict().values())
    assert "no projectors" in convert_official(tmp_path / "released.safetensors", tmp_path, num_attention_heads=PARITY_HEADS)
    assert not (tmp_path / "projectors.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("blocks.3.cross_attn.k.bias"), "1 missing: blocks.3.cross_attn.k.bias"),
        (lambda weights: weights.pop("time_embedding.0.weight"), "time_embedding.0.weight' is not in it"),
        (lambda weights: weights.pop("patch_embedding.weight"), "not the weights of a Wan Transformer"),
        (
            lambda weights: weights.pop("blocks.2.input_mlp.proj.2.weight"),
            "not a set of projectors .*Missing key.*blocks.2.proj.2.weight",
        ),
        (lambda weights: weights.update({"img_emb.proj.0.weight": torch.zeros(3)}), "1 unexpected: img_emb.proj.0.weight"),
        (
            lambda weights: weights.update({"head.head.bias": weights["head.head.bias"].int()}),
            "1 not of floating point: head.head.bias",
        ),
        (
            lambda weights: weights.update({"blocks.1.ffn.2.weight": torch.zeros(48, 95)}),
            r"1 of another shape: blocks.1.ffn.2.weight \[48, 95\] instead of \[48, 96\]",
        ),
    ],
)
def test_wrong_weights_are_refused_before_anything_is_written(official, tmp_path, change, message):
    weights = load_file(official)
    change(weights)
    save_file(weights, tmp_path / "wrong.safetensors")
    with pytest.raises(ArtifactError, match=message):
        convert_official(tmp_path / "wrong.safetensors", tmp_path / "out", num_attention_heads=PARITY_HEADS)
    assert not (tmp_path / "out").exists()


def test_unreadable_absent_and_misread_files_are_refused(official, tmp_path):
    with pytest.raises(ArtifactError, match="no safetensors file there"):
        load_official(tmp_path / "absent.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(official.read_bytes()[:1000])
    with pytest.raises(ArtifactError, match="not a readable safetensors file"):
        load_official(tmp_path / "cut.safetensors")
    with pytest.raises(ArtifactError, match="width 48 does not divide into 0 heads; give num_attention_heads"):
        load_official(official)


def test_verify_makes_a_clip(tmp_path):
    convert_to_official(WEIGHTS_FOLDER / "wan", tmp_path / "official")
    spec = importlib.util.spec_from_file_location("convert_command", Path(__file__).parents[2] / "pipelines" / "convert.py")
    command = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(command)
    sizes = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 2, "num_attention_heads": 4}
    paths = {"source": str(tmp_path / "official"), "folder": str(tmp_path / "out"), "base": str(WEIGHTS_FOLDER / "wan")}
    rest = {"aesthetic": False, "to_official": False, "verify": True, "reference": [], "prompt": "a red fox"}
    command.convert(argparse.Namespace(**sizes, **paths, **rest))
    assert (tmp_path / "out" / "verify.mp4").stat().st_size > 0
