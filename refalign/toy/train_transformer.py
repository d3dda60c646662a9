"""Trains the toy's text encoder and Transformer with the project's own pipeline and training loop.

    python -m refalign.toy.train_transformer base   --work runs/toy_weights --steps 5600
    python -m refalign.toy.train_transformer stage1 --work runs/toy_weights --steps 4000

``base``: text to video without references, Transformer and text encoder together, from scratch. ``stage1``: the recipe's first
stage from there, with references and reference alignment; the text encoder is frozen. Both read the same shards, made by the
ordinary steps from a world of sprites of the split ``train``. Interrupted, either goes on where it stood, as long as ``--work``
is there; without it, ``--init`` goes on from the weights in ``--output``, with new moments of the optimizer.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
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
from refalign.toy.optim import autocast_where_fast, multiplies_bfloat16
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


def build_joint(config: RunConfig, vision_width: int, *, text_encoder: Path | None, frozen: bool = False) -> JointModels:
    """The models, with a new text encoder or that of a folder; the rows of its vocabulary stay: the shards hold them."""
    from transformers import UMT5EncoderModel

    models = build_models(config, vision_width)
    if text_encoder is None:
        text = make_text_encoder(len(make_tokenizer()))
    else:
        text = UMT5EncoderModel.from_pretrained(text_encoder, dtype=torch.float32).eval()
    (text if frozen else text.shared).requires_grad_(False)
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


def make_settings(weights: Path, work: Path, world_seed: int) -> dict[str, Any]:
    """What the shards are made with, beyond the toy preset; another seed gives other videos of the same creatures."""
    return {
        "input.world_videos": 12000,
        "input.world_seed": world_seed,
        "input.world_split": "train",
        "models.base": str(work / "raw_base"),
        "models.vision_encoder": str(weights / "dinov3"),
        "models.detector": str(weights / "detector"),
        "models.encoder_dtype": "bfloat16" if multiplies_bfloat16() else "float32",
        "curation.videos_per_part": 50,
        "shards.samples_per_shard": 128,
        "cluster.subjects.max_actors": 2,
        "cluster.shards.max_actors": 2,
    }


def make_stages(name: str, steps: int, learning_rate: float, image_share: float, **both: Any) -> tuple[StageConfig, ...]:
    """First images, at the peak learning rate, then clips, with a falling one.

    Words and references tell what is to be seen in one frame already, and one frame costs half as much.

    Args:
        both: further settings of either stage.
    """
    images = round(image_share * steps)
    stages = []
    if images:
        stages.append(StageConfig(name=f"{name}_images", steps=images, learning_rate=learning_rate, latent_frames=1, **both))
    if images < steps:
        stages.append(StageConfig(name=name, steps=steps - images, learning_rate=learning_rate, schedule="cosine", **both))
    return tuple(stages)


def make_config(settings: dict[str, Any], stages: tuple[StageConfig, ...], **training: Any) -> RunConfig:
    """The toy preset on the large world, with other stages."""
    recipe = {
        "stages": stages,
        "start_from": None,
        "global_batch": 32,
        "micro_batch": 32,
        "optimizer": "muon",
        "compile": True,
        "warmup_steps": 200,
        "ema_decay": 0.995,
        "checkpoint_every": 500,
        "validate_every": 500,
        "validation_samples": 64,
        "keep_checkpoints": 1,
    }
    config = apply_overrides(load_preset("toy_from_base"), _as_assignments(settings))
    return config.model_copy(update={"training": config.training.model_copy(update=recipe | training)})


def make_shards(settings: dict[str, Any], work: Path) -> Path:
    """Runs the pipeline as far as the shards; steps that are done are skipped."""
    chosen = [part for text in _as_assignments(settings) for part in ("--set", text)]
    for name in ("subjects", "pairs", "shards"):
        script = str(PIPELINES / f"{name}.py")
        subprocess.run([sys.executable, script, "--preset", "toy_from_base", "--output", str(work), *chosen], check=True)
    return work / json.loads((work / "summary.json").read_text())["folders"]["shards"]


def _as_assignments(settings: dict[str, Any]) -> list[str]:
    return [f"{name}={value}" for name, value in settings.items()]


def run_training(config: RunConfig, shards: Path, folder: Path, build: Callable[..., JointModels]) -> None:
    """Trains in this process, with matrix products in bfloat16.

    Attention by plain matrix products: torch's fused kernel spends more time in its bfloat16 backward pass than all the rest of
    the step takes (measured on one core, 144 tokens: 0.51 of 1.16 s).
    """

    def log(step: int, numbers: dict[str, float]) -> None:
        if step % 100 == 0:
            shown = {name: value for name, value in numbers.items() if name.startswith(("total", "flow", "pull", "push", "val"))}
            print(f"step {step} " + " ".join(f"{name} {value:.4f}" for name, value in shown.items()), flush=True)

    # Without the cache: it would keep the first step's weights in bfloat16 for as long as this context lasts.
    with autocast_where_fast(cache_enabled=False), sdpa_kernel(SDPBackend.MATH):
        train(config, shards=shards, folder=folder, log=log, build=build)


def load_averages(config: RunConfig, folder: Path, build: Callable[..., JointModels]) -> JointModels:
    """The models of a ``base`` run as ``build`` makes them, with the averaged weights of its newest checkpoint."""
    models = build(config, 1)
    ema = Ema(models, config.training.ema_decay)
    checkpoint = latest_checkpoint(folder / "checkpoints")
    assert checkpoint is not None, f"{folder}: no checkpoint yet"
    load_checkpoint(checkpoint, models, None, ema)
    parameters = dict(models.named_parameters())
    for name, average in ema.weights.items():
        parameters[name].data.copy_(average)
    return models


def train_base(
    weights: Path,
    work: Path,
    steps: int,
    output: Path,
    *,
    init: bool,
    image_share: float,
    world_seed: int,
    freeze_text: bool = False,
) -> None:
    """Text to video, from scratch or from ``output``; writes ``wan/transformer`` and ``wan/text_encoder`` there.

    Args:
        freeze_text: the text encoder of ``output`` stays as it is.
    """
    make_raw_base(weights, work / "raw_base")
    stages = make_stages("base", steps, 1.5e-3, image_share)
    settings = make_settings(weights, work, world_seed)
    start = copy_start(output / "wan", work / "base_start") if init else None
    config = make_config(settings, stages, start_from=start, drop_text=0.0, drop_references=0.9, drop_both=0.1)
    config = config.model_copy(update={"objective": config.objective.model_copy(update={"alignment": "none"})})
    build = partial(build_joint, text_encoder=output / "wan" / "text_encoder" if init else None, frozen=freeze_text)
    run_training(config, make_shards(settings, work), work / "base", build)
    export_base(config, work, output, build)


def export_base(config: RunConfig, work: Path, output: Path, build: Callable[..., JointModels]) -> None:
    """Writes the averaged weights of the newest checkpoint in half precision."""
    models = load_averages(config, work / "base", build)
    save_half(models.transformer, output / "wan" / "transformer")
    save_half(models.text, output / "wan" / "text_encoder")
    write_export_settings(output / "wan", load_preset("toy_from_base"), base_is_copied=True)


def copy_start(model: Path, start: Path) -> str:
    """A folder to start from as a training run leaves it, of a model's Transformer."""
    shutil.copytree(model / "transformer", start / "export" / "transformer", dirs_exist_ok=True)
    return str(start)


def train_stage1(weights: Path, work: Path, steps: int, output: Path, *, init: bool, image_share: float, world_seed: int) -> None:
    """The recipe's first stage from the base, or from ``output``; writes ``stage1/export/transformer`` and projectors there.

    Unlike the recipe, every second reference is from another clip, and the text is dropped for three samples in ten: what a
    reference has in common with its clip is then its subject alone, and it is often the only one to tell it.
    """
    from safetensors.torch import load_file, save_file

    stages = make_stages("stage1", steps, 1.5e-3, image_share, cross_pair_fraction=0.5)
    settings = make_settings(weights, work, world_seed)
    shards = make_shards(settings, work)
    start = str(output / "stage1") if init else copy_start(weights / "wan", work / "stage1_start")
    build = partial(build_joint, text_encoder=weights / "wan" / "text_encoder", frozen=True)
    run_training(make_config(settings, stages, start_from=start, drop_text=0.3), shards, work / "stage1", build)

    from refalign.models.wan import load_transformer

    save_half(load_transformer(str(work / "stage1" / "export")), output / "stage1" / "export" / "transformer")
    halves = {name: tensor.half() for name, tensor in load_file(work / "stage1" / "projectors.safetensors").items()}
    save_file(halves, output / "stage1" / "projectors.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("base", "stage1"))
    parser.add_argument("--steps", type=int, required=True, help="total number of optimizer steps, of 32 samples each")
    parser.add_argument("--image-share", type=float, default=0.7, help="share of the steps, the first ones, on single frames")
    parser.add_argument("--work", type=Path, default=Path("runs/toy_weights"), help="shards and checkpoints")
    parser.add_argument("--world-seed", type=int, default=2000, help="which videos; needs a --work of its own")
    parser.add_argument("--weights", type=Path, default=WEIGHTS_FOLDER, help="the models to build on")
    parser.add_argument("--output", type=Path, default=WEIGHTS_FOLDER)
    parser.add_argument("--init", action="store_true", help="go on from the weights in --output")
    parser.add_argument("--freeze-text", action="store_true", help="base with --init: train its Transformer alone")
    arguments = parser.parse_args()
    if arguments.freeze_text and not (arguments.init and arguments.stage == "base"):
        parser.error("--freeze-text goes with base --init; stage1 never trains the text encoder")
    torch.set_num_threads(1)
    places = arguments.weights, arguments.work.resolve(), arguments.steps, arguments.output.resolve()
    options = {name: getattr(arguments, name) for name in ("init", "image_share", "world_seed")}
    if arguments.stage == "base":
        train_base(*places, **options, freeze_text=arguments.freeze_text)
    else:
        train_stage1(*places, **options)


if __name__ == "__main__":
    main()
