"""The memory estimate against what torch's allocator reports, and the refusal."""

from __future__ import annotations

import gc
import json
import shutil
from dataclasses import replace
from pathlib import Path

import make_shards
import pytest
import torch
from make_shards import make_config, write_shards

from refalign.config import RunConfig
from refalign.errors import ConfigError
from refalign.estimates.compute import ModelSizes, PassSizes
from refalign.estimates.memory import MemoryEstimate, check_memory, estimate_memory
from refalign.shards.reader import ShardIndex
from refalign.training.launch import _join_single_group
from refalign.training.loop import start_run, take_step
from refalign.training.models import build_models
from refalign.training.preflight import estimate_for, load_shapes


def write_base(folder: Path, width: int, layers: int) -> Path:
    from diffusers import WanTransformer3DModel

    WanTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=width // 4,
        in_channels=4,
        out_channels=4,
        text_dim=12,
        freq_dim=64,
        ffn_dim=4 * width,
        num_layers=layers,
        rope_max_seq_len=64,
    ).save_pretrained(folder / "transformer")
    return folder


def measure_peak(config: RunConfig, shards: Path, folder: Path) -> int:
    """Most bytes alive at once over start and two steps, by the allocator's own record."""
    gc.collect()  # what earlier tests left would count as freed
    options = {"activities": [torch.profiler.ProfilerActivity.CPU], "profile_memory": True}
    with _join_single_group(config), torch.profiler.profile(**options) as profile:
        run = start_run(config, shards, folder)
        for step in (1, 2):
            take_step(run, step, run.maker.make_step(step))
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize(
    ("width", "layers", "size", "frames", "settings"),
    [
        (64, 3, 16, 3, {"optimizer": {"ema_decay": 0.5}}),
        (128, 4, 16, 3, {"optimizer": {"ema_decay": 0.5}, "activation_checkpointing": "selective"}),
        (128, 4, 16, 3, {"precision": "bfloat16"}),
        (256, 6, 8, 4, {"optimizer": {"ema_decay": 0.5}, "activation_checkpointing": "full", "precision": "bfloat16"}),
        (128, 4, 16, 3, {"optimizer": {"ema_decay": 0.5}, "lora": {"rank": 8}}),
        (128, 4, 16, 3, {"optimizer": {"ema_decay": 0.5}, "lora": {"rank": 8}, "activation_checkpointing": "selective"}),
        (
            256,
            4,
            16,
            3,
            {"precision": "bfloat16", "lora": {"rank": 16, "targets": ("to_q", "to_k", "ffn.net.0.proj", "ffn.net.2")}},
        ),
    ],
)
def test_the_estimate_is_within_15_percent_of_the_measured_peak(
    width: int, layers: int, size: int, frames: int, settings: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("SIZE", size), ("TOKENS", (size // 2) ** 2), ("FRAMES", frames)):
        monkeypatch.setattr(make_shards, name, value)
    base = write_base(tmp_path / "base", width, layers)
    shards = write_shards(tmp_path / "shards")
    keep = {"dropout": {"references": 0.0, "both": 0.0}}
    config = make_config(base, global_batch=8, micro_batch=2, **keep, **settings)
    index = ShardIndex.open(shards, "train")
    transformer = json.loads((base / "transformer" / "config.json").read_text())
    estimate = estimate_for(config, index, load_shapes(index, config.models), transformer, 1, "cpu")
    # No checkpoint is on its way while it is measured.
    assert estimate.peak - estimate.staged == pytest.approx(measure_peak(config, shards, tmp_path / "run"), rel=0.15)


def write_encoder(folder: Path, width: int, layers: int) -> Path:
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers, "num_attention_heads": 4}
    DINOv3ViTModel(DINOv3ViTConfig(**sizes, num_register_tokens=4)).save_pretrained(folder)
    return folder


def test_the_estimate_knows_the_vision_encoder_where_targets_are_computed(base: Path, tmp_path: Path) -> None:
    """An encoder that takes most of the memory, and counts only where it is loaded."""
    shards = {name: write_shards(tmp_path / name, pictures=name == "pictures") for name in ("pictures", "tokens")}
    config = make_config(base, global_batch=8, micro_batch=4, dropout={"references": 0.0, "both": 0.0})
    models = config.models.model_copy(update={"vision_encoder": str(write_encoder(tmp_path / "encoder", 192, 4))})
    config = config.model_copy(update={"models": models})
    transformer = json.loads((base / "transformer" / "config.json").read_text())
    peaks = {}
    for name, folder in shards.items():
        index = ShardIndex.open(folder, "train")
        peaks[name] = estimate_for(config, index, load_shapes(index, config.models), transformer, 1, "cpu")
    assert peaks["tokens"].encoder == 0 and "encoder" in peaks["pictures"].describe()
    assert peaks["pictures"].encoder > 3 * peaks["tokens"].peak
    ours = peaks["pictures"].peak - peaks["pictures"].staged
    assert ours == pytest.approx(measure_peak(config, shards["pictures"], tmp_path / "run"), rel=0.15)


@pytest.mark.parametrize("alignment", ["none", "reference_alignment"])
@pytest.mark.parametrize("lora", [{}, {"lora": {"rank": 3}}, {"lora": {"rank": 2, "targets": ("to_k", "ffn.net.0.proj")}}])
def test_parameters_are_counted_without_building_the_model(lora: dict, alignment: str, base: Path) -> None:
    config = make_config(base, **lora)
    config = config.model_copy(update={"objective": config.objective.model_copy(update={"alignment": alignment})})
    models = build_models(config, vision_width=10)
    sizes = ModelSizes.of(dict(models.transformer.config), config, 10)
    assert sizes.parameters == sum(parameter.numel() for parameter in models.parameters())
    assert sizes.trained_parameters == sum(each.numel() for each in models.parameters() if each.requires_grad)
    of_block = sum(parameter.numel() for parameter in models.transformer.blocks[0].parameters())
    assert sizes.block_parameters + sizes.block_adapters == of_block


WAN_1_3B = ModelSizes(1536, 8960, 30, 12, 4096, 256, 64, 64, 4, 9, (1536, 768, 1024), 1024)
PUBLISHED = PassSizes(samples=1, video_tokens=21 * 1560, references=3, reference_tokens=1560, text_tokens=512)


def estimate_1_3b(num_ranks: int = 8, **training) -> MemoryEstimate:
    recipe = make_config("none", global_batch=num_ranks, micro_batch=1, precision="bfloat16", **training).training
    return estimate_memory(WAN_1_3B, PUBLISHED, recipe, num_ranks=num_ranks, device_type="cuda")


def test_what_takes_the_space_follows_the_settings() -> None:
    plain, selective, full = (estimate_1_3b(activation_checkpointing=mode) for mode in ("none", "selective", "full"))
    assert plain.activations > 2 * selective.activations > 4 * full.activations
    assert estimate_1_3b(optimizer={"ema_decay": 0.9}).average == plain.weights
    assert estimate_1_3b(16).weights == plain.weights / 2
    assert estimate_1_3b(16, parallel={"shards_per_replica": 8}).weights == plain.weights
    assert estimate_1_3b(optimizer={"name": "adamw8bit"}).moments == plain.moments / 4
    assert 1.41e9 < WAN_1_3B.parameters - WAN_1_3B.projector_parameters < 1.43e9


def test_a_run_that_cannot_fit_is_refused_with_advice() -> None:
    training = make_config("none", micro_batch=2, optimizer={"ema_decay": 0.5}).training
    estimate = replace(estimate_1_3b(), peak=90e9)
    check_memory(estimate, 100e9, training, num_ranks=2, device_type="cuda")
    with pytest.raises(ConfigError, match=r"a rank needs 83\.8 GiB .*; its GPU has 89\.4 GiB, of which 82\.3 GiB") as caught:
        check_memory(estimate, 96e9, training, num_ranks=2, device_type="cuda")
    for advice in ("activation_checkpointing=full", "precision=bfloat16", "micro_batch=1", "ema_decay=0", "more ranks than 2"):
        assert advice in str(caught.value)


def test_a_real_run_is_refused_before_its_weights_are_read(base: Path, shards: Path, tmp_path: Path, monkeypatch) -> None:
    empty = tmp_path / "base"
    shutil.copytree(base, empty, ignore=shutil.ignore_patterns("*.safetensors"))
    monkeypatch.setattr("refalign.training.preflight.memory_of_worker", lambda device, ranks: 1000.0)
    with pytest.raises(ConfigError, match="its share of the host has 1000.0 B"):
        start_run(make_config(empty), shards, tmp_path / "run")
    assert not (tmp_path / "run").exists()
