"""Trains the toy's text encoder and Transformer with the project's own pipeline and training loop.

    python -m refalign.toy.train_transformer base   --work runs/toy_weights --steps 10000
    python -m refalign.toy.train_transformer stage1 --work runs/toy_weights --steps 4000

``base``: text to video without references, Transformer and text encoder together, from scratch. ``stage1``: the recipe's first
stage from there, with references and reference alignment; the text encoder is frozen. Both read the same shards, made by the
ordinary steps from a world of sprites of the split ``train``. Interrupted, either goes on where it stood.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from refalign.config import RunConfig, StageConfig, apply_overrides
from refalign.exports import write_export_settings
from refalign.presets import load_preset
from refalign.toy import WEIGHTS_FOLDER
from refalign.toy.initial_weights import make_text_encoder, make_tokenizer, make_transformer, save_half
from refalign.training.checkpoint import latest_checkpoint, load_checkpoint
from refalign.training.loop import train
from refalign.training.models import TrainedModels, build_models
from refalign.training.optim import Ema

BASE_PARTS = ("vae", "tokenizer", "scheduler", "model_index.json")
PIPELINES = Path(__file__).parents[2] / "pipelines"


class JointModels(TrainedModels):
    """Transformer and projectors, and the text encoder between the stored token embeddings and the Transformer."""

    def __init__(self, models: TrainedModels, text: nn.Module) -> None:
        super().__init__(models.transformer, models.projectors)
        self.text = text

    def embed_text(self, prompt_embeds: Tensor) -> Tensor:
        """Runs the encoder over each prompt's own tokens; [B, L, D], zeros beyond them."""
        mask = prompt_embeds.any(-1)
        return self.text(inputs_embeds=prompt_embeds, attention_mask=mask).last_hidden_state * mask[..., None]


def build_joint(config: RunConfig, vision_width: int, *, text_encoder: Path | None) -> JointModels:
    """The models of ``base`` (a new text encoder, trained) or ``stage1`` (that of ``text_encoder``, frozen)."""
    from transformers import UMT5EncoderModel

    models = build_models(config, vision_width)
    if text_encoder is not None:
        text = UMT5EncoderModel.from_pretrained(text_encoder, dtype=torch.float32).eval().requires_grad_(False)
    else:
        text = make_text_encoder(len(make_tokenizer()))
        text.shared.requires_grad_(False)  # the shards hold its rows
    return JointModels(models, text)


def make_raw_base(weights: Path, folder: Path) -> Path:
    """A base model whose text encoder has no layers: its output is the plain embedding of each token.

    Shards made with it serve a text encoder that is still in training.
    """
    text = make_text_encoder(len(make_tokenizer()))
    text.encoder.block = nn.ModuleList()
    text.config.num_layers = 0
    save_half(text, folder / "text_encoder")
    save_half(make_transformer(), folder / "transformer")
    for part in BASE_PARTS:
        source, target = weights / "wan" / part, folder / part
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True)
        else:
            shutil.copyfile(source, target)
    return folder


def make_settings(weights: Path, work: Path) -> dict[str, Any]:
    """What the shards are made with, beyond the toy preset."""
    return {
        "input.world_videos": 5000,
        "input.world_seed": 1000,
        "input.world_split": "train",
        "models.base": str(work / "raw_base"),
        "models.vision_encoder": str(weights / "dinov3"),
        "models.detector": str(weights / "detector"),
        "curation.videos_per_part": 50,
        "shards.samples_per_shard": 128,
        "cluster.subjects.max_actors": 2,
        "cluster.shards.max_actors": 2,
    }


def make_config(settings: dict[str, Any], stage: StageConfig, **training: Any) -> RunConfig:
    """The toy preset on the large world, with one stage."""
    recipe = {
        "stages": (stage,),
        "start_from": None,
        "global_batch": 16,
        "micro_batch": 16,
        "warmup_steps": 200,
        "ema_decay": 0.995,
        "checkpoint_every": 500,
        "validate_every": 500,
        "validation_samples": 64,
        "keep_checkpoints": 1,
    }
    config = apply_overrides(load_preset("toy"), _as_assignments(settings))
    return config.model_copy(update={"training": config.training.model_copy(update=recipe | training)})


def make_shards(settings: dict[str, Any], work: Path) -> Path:
    """Runs the pipeline as far as the shards; steps that are done are skipped."""
    chosen = [part for text in _as_assignments(settings) for part in ("--set", text)]
    for name in ("subjects", "pairs", "shards"):
        script = str(PIPELINES / f"{name}.py")
        subprocess.run([sys.executable, script, "--preset", "toy", "--output", str(work), *chosen], check=True)
    return work / json.loads((work / "summary.json").read_text())["folders"]["shards"]


def _as_assignments(settings: dict[str, Any]) -> list[str]:
    return [f"{name}={value}" for name, value in settings.items()]


def run_training(config: RunConfig, shards: Path, folder: Path, text_encoder: Path | None) -> None:
    """Trains in this process, with matrix products in bfloat16.

    Attention by plain matrix products: torch's fused kernel spends more time in its bfloat16 backward pass than all the rest of
    the step takes (measured on one core, 144 tokens: 0.51 of 1.16 s).
    """

    def log(step: int, numbers: dict[str, float]) -> None:
        if step % 100 == 0:
            shown = {name: value for name, value in numbers.items() if name.startswith(("total", "flow", "pull", "push", "val"))}
            print(f"step {step} " + " ".join(f"{name} {value:.4f}" for name, value in shown.items()), flush=True)

    # Without the cache: it would keep the first step's weights in bfloat16 for as long as this context lasts.
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False), sdpa_kernel(SDPBackend.MATH):
        train(config, shards=shards, folder=folder, log=log, build=partial(build_joint, text_encoder=text_encoder))


def load_averages(config: RunConfig, folder: Path) -> JointModels:
    """The averaged weights of the newest checkpoint of a ``base`` run."""
    models = build_joint(config, 1, text_encoder=None)
    ema = Ema(models, config.training.ema_decay)
    checkpoint = latest_checkpoint(folder / "checkpoints")
    assert checkpoint is not None, f"{folder}: no checkpoint yet"
    load_checkpoint(checkpoint, models, None, ema)
    parameters = dict(models.named_parameters())
    for name, average in ema.weights.items():
        parameters[name].data.copy_(average)
    return models


def train_base(weights: Path, work: Path, steps: int, output: Path) -> None:
    """Text to video from scratch; writes ``wan/transformer`` and ``wan/text_encoder``."""
    make_raw_base(weights, work / "raw_base")
    stage = StageConfig(name="base", steps=steps, learning_rate=1e-3, schedule="cosine")
    settings = make_settings(weights, work)
    config = make_config(settings, stage, drop_text=0.0, drop_references=0.9, drop_both=0.1)
    config = config.model_copy(update={"objective": config.objective.model_copy(update={"alignment": "none"})})
    run_training(config, make_shards(settings, work), work / "base", None)
    export_base(config, work, output)


def export_base(config: RunConfig, work: Path, output: Path) -> None:
    """Writes the averaged weights of the newest checkpoint in half precision."""
    models = load_averages(config, work / "base")
    save_half(models.transformer, output / "wan" / "transformer")
    save_half(models.text, output / "wan" / "text_encoder")
    write_export_settings(output / "wan", load_preset("toy"), base_is_copied=True)


def train_stage1(weights: Path, work: Path, steps: int, output: Path) -> None:
    """The recipe's first stage from the shipped base; writes ``stage1/export/transformer`` and its projectors."""
    from safetensors.torch import load_file, save_file

    stage = StageConfig(name="stage1", steps=steps, learning_rate=8e-4, schedule="cosine", cross_pair_fraction=0.5)
    settings = make_settings(weights, work)
    shards = make_shards(settings, work)
    start = work / "stage1_start"
    shutil.copytree(weights / "wan" / "transformer", start / "export" / "transformer", dirs_exist_ok=True)
    config = make_config(settings, stage, start_from=str(start))
    run_training(config, shards, work / "stage1", weights / "wan" / "text_encoder")

    from refalign.models.wan import load_transformer

    save_half(load_transformer(str(work / "stage1" / "export")), output / "stage1" / "export" / "transformer")
    halves = {name: tensor.half() for name, tensor in load_file(work / "stage1" / "projectors.safetensors").items()}
    save_file(halves, output / "stage1" / "projectors.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("base", "stage1"))
    parser.add_argument("--steps", type=int, required=True, help="total number of optimizer steps, of 16 clips each")
    parser.add_argument("--work", type=Path, default=Path("runs/toy_weights"), help="shards and checkpoints")
    parser.add_argument("--weights", type=Path, default=WEIGHTS_FOLDER, help="the models to build on")
    parser.add_argument("--output", type=Path, default=WEIGHTS_FOLDER)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    run = train_base if arguments.stage == "base" else train_stage1
    run(arguments.weights, arguments.work.resolve(), arguments.steps, arguments.output)


if __name__ == "__main__":
    main()
