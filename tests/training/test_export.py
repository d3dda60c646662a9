"""The exported folder is what stock diffusers opens, and holds nothing of the training."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from make_shards import make_config
from safetensors.torch import load_file

from refalign.config import RunConfig
from refalign.errors import ArtifactError
from refalign.generation.pipeline import RefAlignPipeline
from refalign.generation.settings import check_digests
from refalign.training.export import export_model
from refalign.training.loop import Run, start_run, take_step


@pytest.fixture()
def run(base: Path, shards: Path, tmp_path: Path) -> Run:
    run = start_run(make_config(base, optimizer={"ema_decay": 0.5}), shards, tmp_path)
    take_step(run, 1, run.maker.make_step(1))
    return run


def test_stock_diffusers_opens_the_averaged_weights(run: Run, tmp_path: Path) -> None:
    trained = {name: parameter.detach().clone() for name, parameter in run.models.named_parameters()}
    folder = export_model(tmp_path, run.config, run.models, run.ema, run.ranks)
    assert run.ema is not None and folder == tmp_path / "export"
    stock = WanTransformer3DModel.from_pretrained(folder, subfolder="transformer")
    weights = dict(stock.named_parameters())
    assert len(weights) == sum(name.startswith("transformer.") for name in run.ema.weights)
    for name, weight in weights.items():
        assert torch.equal(weight, run.ema.weights[f"transformer.{name}"])
    assert all(torch.equal(parameter, trained[name]) for name, parameter in run.models.named_parameters())
    assert json.loads((folder / "transformer" / "config.json").read_text())["_class_name"] == "WanTransformer3DModel"


def test_projectors_lie_beside_the_export_never_inside(run: Run, tmp_path: Path) -> None:
    folder = export_model(tmp_path, run.config, run.models, run.ema, run.ranks)
    assert {path.name for path in folder.iterdir()} == {
        "transformer", "vae", "text_encoder", "tokenizer", "scheduler", "model_index.json", "refalign.json"
    }  # fmt: skip
    weights = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    assert not any("proj." in name and "blocks" in name and name.startswith("projectors") for name in weights)
    assert set(load_file(tmp_path / "projectors.safetensors")) == {
        f"blocks.{block}.proj.{layer}.weight" for block in (0, 1) for layer in (0, 2)
    }


def test_overwritten_bytes_of_an_export_are_noticed_wherever_they_are(run: Run, tmp_path: Path) -> None:
    folder = export_model(tmp_path, run.config, run.models, run.ema, run.ranks)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "refalign.json")
    rng = random.Random(0)
    check_digests(folder)
    for number in range(20):
        path = files[number % len(files)]
        whole = path.read_bytes()
        at = rng.randrange(len(whole))
        path.write_bytes(whole[:at] + bytes([255 - whole[at]]) + whole[at + 1 :])
        with pytest.raises(ArtifactError, match=rf"{path.name}: damaged, its bytes are not those that were exported"):
            RefAlignPipeline.from_pretrained(str(folder))
        path.write_bytes(whole)
    files[0].unlink()
    with pytest.raises(ArtifactError, match=f"{files[0].name}: missing"):
        check_digests(folder)


def with_base(config: RunConfig, **changes: str) -> RunConfig:
    return config.model_copy(update={"models": config.models.model_copy(update=changes)})


def test_a_base_from_the_hub_is_named_not_copied(run: Run, tmp_path: Path) -> None:
    config = with_base(run.config, base="Wan-AI/Wan2.1-T2V-1.3B-Diffusers", base_revision="abc")
    folder = export_model(tmp_path, config, run.models, run.ema, run.ranks)
    assert {path.name for path in folder.iterdir()} == {"transformer", "refalign.json"}
    recorded = json.loads((folder / "refalign.json").read_text())
    assert (recorded["base"], recorded["base_revision"]) == ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "abc")
    assert recorded["generation"]["num_frames"] == config.video.num_frames


def test_an_incomplete_base_is_refused_and_leaves_no_export(run: Run, tmp_path: Path) -> None:
    (tmp_path / "half" / "transformer").mkdir(parents=True)
    config = with_base(run.config, base=str(tmp_path / "half"))
    with pytest.raises(ArtifactError, match=r"half/vae: missing in models\.base"):
        export_model(tmp_path, config, run.models, run.ema, run.ranks)
    assert not (tmp_path / "export").exists()


def test_a_bfloat16_run_exports_bfloat16(base: Path, shards: Path, tmp_path: Path) -> None:
    config: RunConfig = make_config(base)
    run = start_run(config, shards, tmp_path)
    run.models.compute_dtype = torch.bfloat16
    folder = export_model(tmp_path, config, run.models, None, run.ranks)
    weights = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
