"""Adapters: what is trained, what a checkpoint holds, and that stock diffusers opens what is exported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from make_shards import CHANNELS, FRAMES, SIZE, TEXT_WIDTH, make_config
from safetensors.torch import load_file

from refalign.config import RunConfig, apply_overrides
from refalign.errors import ConfigError
from refalign.models.lora import FILE_NAME
from refalign.models.wan import RefAlignTransformer, load_transformer
from refalign.training.checkpoint import latest_checkpoint
from refalign.training.export import export_model
from refalign.training.launch import make_settings, run_rank, train_rank
from refalign.training.loop import start_run, take_step, train
from refalign.training.records import read_records

LORA = {"lora": {"rank": 2, "alpha": 6}}


class Stop(Exception):
    """Stands for whatever ends a process in the middle of a run."""


@pytest.fixture()
def config(base: Path) -> RunConfig:
    return make_config(base, optimizer={"ema_decay": 0.5}, **LORA)


def make_inputs() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(1, CHANNELS, FRAMES, SIZE, SIZE, generator=draw),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 6, TEXT_WIDTH, generator=draw),
    }


@torch.no_grad()
def run_stock(model: WanTransformer3DModel) -> torch.Tensor:
    return model(**make_inputs()).sample


@torch.no_grad()
def run_with_references(model: RefAlignTransformer) -> torch.Tensor:
    latents, timestep, text = make_inputs().values()
    references = torch.randn(1, 2, CHANNELS, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    return model(latents, timestep, text, references).velocity


def test_stock_diffusers_gets_the_trained_model_from_base_and_adapters(config: RunConfig, shards: Path, tmp_path: Path) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    run = start_run(config, shards, tmp_path)
    for step in (1, 2, 3):
        take_step(run, step, run.maker.make_step(step))
    folder = export_model(tmp_path, config, run.models, run.ema, run.ranks)
    assert run.ema is not None
    with run.ema.applied():
        trained = run_with_references(run.models.transformer)
    merged = load_transformer(str(folder))
    torch.testing.assert_close(run_with_references(merged), trained, rtol=1e-5, atol=1e-6)
    ours = RefAlignTransformer.from_pretrained(config.models.base, subfolder="transformer")
    ours.load_lora_adapter(str(tmp_path / "lora"), weight_name=FILE_NAME)
    torch.testing.assert_close(run_with_references(ours), trained, rtol=1e-5, atol=1e-6)

    stock = WanTransformer3DModel.from_pretrained(config.models.base, subfolder="transformer")
    before = run_stock(stock)
    parts = {"tokenizer": None, "text_encoder": None, "vae": None, "scheduler": FlowMatchEulerDiscreteScheduler()}
    WanPipeline(**parts, transformer=stock).load_lora_weights(str(tmp_path / "lora"))
    expected = run_stock(WanTransformer3DModel.from_pretrained(folder, subfolder="transformer"))
    torch.testing.assert_close(run_stock(stock), expected, rtol=1e-5, atol=1e-6)
    assert (expected - before).abs().max() > 1e-3


def test_only_adapters_and_projectors_are_trained(config: RunConfig, base: Path, shards: Path, tmp_path: Path) -> None:
    run = start_run(config, shards, tmp_path)
    assert run.ema is not None
    trained = {name for name, parameter in run.models.named_parameters() if parameter.requires_grad}
    assert set(run.ema.weights) == trained
    assert all("lora_" in name or name.startswith("projectors.") for name in trained)
    assert sum("lora_A" in name for name in trained) == 2 * 2 * 4  # blocks, attentions, layers
    before = {name: parameter.detach().clone() for name, parameter in run.models.named_parameters()}
    for step in (1, 2):
        take_step(run, step, run.maker.make_step(step))
    for name, parameter in run.models.named_parameters():
        assert torch.equal(before[name], parameter) != (name in trained), name
    original = load_file(base / "transformer" / "diffusion_pytorch_model.safetensors")
    frozen = run.models.transformer.get_parameter("blocks.1.attn2.to_out.0.base_layer.weight")
    assert torch.equal(frozen, original["blocks.1.attn2.to_out.0.weight"])


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(config: RunConfig, shards: Path, tmp_path: Path) -> None:
    asked: list[None] = []

    def stop() -> bool:
        asked.append(None)
        if len(asked) == 5:
            raise Stop
        return False

    train(config, shards=shards, folder=tmp_path / "whole")
    with pytest.raises(Stop):
        train(config, shards=shards, folder=tmp_path / "parts", notice=stop)
    assert train(config, shards=shards, folder=tmp_path / "parts").resumed_from == 4
    for file in ("export/transformer/diffusion_pytorch_model.safetensors", "lora/pytorch_lora_weights.safetensors"):
        assert (tmp_path / "parts" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    checkpoint = latest_checkpoint(tmp_path / "whole" / "checkpoints")
    assert checkpoint is not None
    saved = (checkpoint / ".metadata").read_bytes()
    assert b"lora_B.default.weight" in saved and b"base_layer" not in saved


def test_all_kinds_of_layers_can_have_adapters(base: Path, shards: Path, tmp_path: Path) -> None:
    targets = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
    config = make_config(base, lora={"rank": 3, "targets": targets})
    export = train(config, shards=shards, folder=tmp_path).export
    adapters = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    assert len(adapters) == 2 * 2 * (2 * 4 + 2)
    assert adapters["transformer.blocks.0.ffn.net.2.lora_A.weight"].shape == (3, 32)
    assert set(load_file(f"{export}/transformer/diffusion_pytorch_model.safetensors")) == set(
        load_file(base / "transformer" / "diffusion_pytorch_model.safetensors")
    )


def test_a_layer_that_can_have_none_is_refused(base: Path) -> None:
    with pytest.raises(ConfigError, match=r"training\.lora\.targets\.0.*'patch_embedding'"):
        apply_overrides(make_config(base), ['training.lora.targets=["patch_embedding"]'])


def test_without_peft_the_message_says_what_to_do(config: RunConfig, shards: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"lora\.rank needs peft.*or set training\.lora\.rank=null"):
        start_run(config, shards, tmp_path)


def test_one_rank_is_two_ranks(config: RunConfig, base: Path, shards: Path, tmp_path: Path) -> None:
    """Frozen and trained weights are sharded together; in bfloat16 the frozen ones are kept in it."""
    rounded = make_config(base, precision="bfloat16", **LORA)
    launches = []
    for name, settings in (("exact", config), ("rounded", rounded)):
        run_rank(train_rank, make_settings(settings, shards, tmp_path / f"{name}-one"))
        launches.append(tmp_path / f"{name}.json")
        launches[-1].write_text(make_settings(settings, shards, tmp_path / f"{name}-two").model_dump_json())
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        + [str(Path(__file__).with_name("ranks_program.py")), "--with-peft", *map(str, launches)],
        check=True,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    for name, tolerance in (("exact", 1e-5), ("rounded", 2e-2)):
        one, two = (read_records(tmp_path / f"{name}-{ranks}" / "metrics.jsonl") for ranks in ("one", "two"))
        assert [line["step"] for line in one] == [line["step"] for line in two] == list(range(8))
        for mine, theirs in zip(one, two, strict=True):
            for term in (key for key in mine if key in ("total", "grad_norm", "pull") or key.startswith("validation/")):
                assert theirs[term] == pytest.approx(mine[term], rel=tolerance, abs=1e-6), (name, mine["step"], term)
    weights = [load_file(tmp_path / f"exact-{ranks}" / "lora" / FILE_NAME) for ranks in ("one", "two")]
    for key, weight in weights[0].items():
        torch.testing.assert_close(weights[1][key], weight, rtol=1e-3, atol=1e-5)
