"""Trains the toy's text encoder and Transformers with the project's training step, on samples drawn once (`refalign.toy.pool`).

    python -m refalign.toy.train_transformer base   --work runs/toy_weights
    python -m refalign.toy.train_transformer stage1 --work runs/toy_weights
    python -m refalign.toy.train_transformer twin   --work runs/toy_weights   # stage1 without alignment, same draws

``base``: text to video without references, Transformer and text encoder together, from scratch. ``stage1``: from there, with
references and the RA loss; the text encoder is frozen. Each trains on single frames first, then on clips. Interrupted, it goes on
from its checkpoint in ``--work``.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from refalign.config import ObjectiveConfig, StageConfig, TrainingConfig
from refalign.exports import write_export_settings
from refalign.models.projector import Projectors
from refalign.models.wan import RefAlignTransformer, load_transformer
from refalign.objective.flow_matching import TrainingSchedule, make_training_schedule
from refalign.presets import load_preset
from refalign.toy import WEIGHTS_FOLDER
from refalign.toy.initial_weights import make_text_encoder, make_tokenizer, make_transformer, save_half
from refalign.toy.optim import autocast_where_fast
from refalign.toy.pool import Pool, encode_captions, load_or_make_pool
from refalign.toy.scenes import NUM_DRAWINGS
from refalign.training.batch import NUM_TIMESTEPS, Batch
from refalign.training.models import TrainedModels
from refalign.training.optim import Ema, make_optimizer, set_learning_rate
from refalign.training.step import train_step

PEAK, WARMUP, CLIP_NORM, AVERAGE_DECAY = 2e-3, 50, 1.0, 0.998
TEXT_DROPPED, REFERENCES_DROPPED = 0.15, 0.1
SIZE_SHARES = (0.35, 0.4, 0.25)
"""Of the steps, by the number of subjects of their samples: a batch holds samples of one size."""
LOG_EVERY, SAVE_EVERY = 25, 100


@dataclass(frozen=True)
class Phase:
    """Steps on samples of one kind.

    Attributes:
        counts: samples drawn with one, two and three subjects.
        peak: highest learning rate, over ``PEAK``; it is held for half of the steps and then falls in a line to ``floor`` of it.
    """

    drawings: int
    steps: int
    batch: int
    counts: tuple[int, int, int]
    peak: float = 1.0
    floor: float = 0.05


@dataclass(frozen=True)
class Recipe:
    """One model of the three."""

    phases: tuple[Phase, ...]
    with_references: bool
    aligned: bool = False


FRAMES, CLIPS = (5000, 5500, 3500), (3000, 3500, 2500)
BASE = (Phase(1, 750, 64, FRAMES, floor=0.3), Phase(NUM_DRAWINGS, 250, 32, CLIPS, peak=0.5))
STAGE1 = (Phase(1, 900, 64, FRAMES, floor=0.3), Phase(NUM_DRAWINGS, 200, 32, CLIPS, peak=0.5))
RECIPES = {
    "base": Recipe(BASE, with_references=False),
    "stage1": Recipe(STAGE1, with_references=True, aligned=True),
    "twin": Recipe(STAGE1, with_references=True),
}


class ToyModels(TrainedModels):
    """Transformer and projectors, and the text encoder between token ids and the Transformer."""

    def __init__(self, transformer: RefAlignTransformer, projectors: Projectors | None, text: nn.Module, *, frozen: bool) -> None:
        super().__init__(transformer, projectors)
        self.text = text
        self.text.requires_grad_(not frozen)

    def embed_text(self, prompt_embeds: Tensor) -> Tensor:
        """Token ids [B, L] -> [B, L, D], zeros beyond each prompt's own tokens."""
        mask = prompt_embeds != 0
        return self.text(input_ids=prompt_embeds, attention_mask=mask).last_hidden_state * mask[..., None]


def build(recipe: Recipe, start: Path, vision_width: int, objective: ObjectiveConfig) -> ToyModels:
    """The models as a training begins: from nothing, or from the base of ``start``."""
    from transformers import UMT5EncoderModel

    if not recipe.with_references:
        transformer = cast(RefAlignTransformer, RefAlignTransformer.from_config(make_transformer().config))
        transformer.load_state_dict(make_transformer().state_dict())
        text = make_text_encoder(len(make_tokenizer()))
        return ToyModels(transformer.train(), None, text, frozen=False)
    text = UMT5EncoderModel.from_pretrained(start / "wan" / "text_encoder", dtype=torch.float32).eval()
    transformer = load_transformer(str(start / "wan")).train()
    torch.manual_seed(0)
    blocks = range(objective.alignment_blocks)
    projectors = Projectors.make_refalign(blocks, transformer.width, vision_width) if recipe.aligned else None
    return ToyModels(transformer, projectors, text, frozen=True)


def make_batch(pool: Pool, phase: Phase, recipe: Recipe, step: int) -> Batch:
    """The samples of one step and all that is random about them: by the step alone: the same for stage 1 and its twin."""
    generator = torch.Generator().manual_seed(step)
    size = 1 + int(torch.multinomial(torch.tensor(SIZE_SHARES), 1, generator=generator))
    low, high = pool.first[size - 1], pool.first[size]
    chosen = torch.randint(low, high, (phase.batch,), generator=generator)
    latents = pool.latents[chosen].float()
    timesteps = torch.randint(0, NUM_TIMESTEPS, (phase.batch,), generator=generator)
    dropped = torch.rand(phase.batch, generator=generator) < TEXT_DROPPED
    tokens = torch.where(dropped[:, None], encode_captions([""]), pool.tokens[chosen])
    without = not recipe.with_references or bool(torch.rand((), generator=generator) < REFERENCES_DROPPED)
    references = pool.reference_latents[size - 1][chosen - low].float()
    targets = pool.targets[size - 1][chosen - low].float()
    if without:
        references, targets, size = torch.zeros_like(references[:, :1]), targets[:, :1], 1
    return Batch(
        latents=latents,
        noise=torch.randn(latents.shape, generator=generator),
        timestep_index=timesteps,
        prompt_embeds=tokens,
        reference_latents=references,
        alignment_mask=torch.full((phase.batch, size), not without),
        subject_index=torch.arange(size).expand(phase.batch, -1),
        keys=(),
        positions=(),
        target_tokens=targets,
    )


def learning_rate_at(phase: Phase, step: int) -> float:
    """Warm-up, constant to half of the phase, then in a line to its floor; ``step`` counts from 1 in the phase."""
    falling = phase.floor + (1 - phase.floor) * 2 * (1 - step / phase.steps)
    return PEAK * phase.peak * min(1.0, step / WARMUP, falling)


class Training:
    """A run that can stop after any hundred steps and go on from its file."""

    def __init__(self, name: str, work: Path, weights: Path, *, compiled: bool) -> None:
        self.recipe, self.name, self.work, self.weights = RECIPES[name], name, work, weights
        preset = load_preset("toy_from_base")
        self.objective = preset.objective.model_copy(
            update={"alignment": "reference_alignment" if self.recipe.aligned else "none"}
        )
        vision_width = json.loads((weights / "dinov3" / "config.json").read_text())["hidden_size"]
        self.models = build(self.recipe, weights, vision_width, self.objective)
        stage = StageConfig(name=name, steps=1, learning_rate=PEAK)
        options = TrainingConfig(stages=(stage,), global_batch=1, micro_batch=1, optimizer="muon")
        self.optimizer = make_optimizer(self.models, options)
        self.average = Ema(self.models, AVERAGE_DECAY)
        self.schedule: TrainingSchedule = make_training_schedule(self.objective.shift, bell=False)
        self.step = 0
        self.checkpoint = work / f"{name}.pt"
        if self.checkpoint.is_file():
            self._load()
        if compiled:
            for block in self.models.transformer.blocks:
                block.forward = torch.compile(block.forward, dynamic=False)

    def run(self) -> None:
        """Trains what is left of every phase."""
        before = 0
        for phase in self.recipe.phases:
            if self.step < before + phase.steps:
                pool = load_or_make_pool(
                    self.work / "pool", self.weights, phase.counts, drawings=phase.drawings, seed=1000 + phase.drawings
                )
                self._run_phase(phase, pool, before)
            before += phase.steps

    def _run_phase(self, phase: Phase, pool: Pool, before: int) -> None:
        started, losses = time.monotonic(), []
        while self.step < before + phase.steps:
            self.step += 1
            batch = make_batch(pool, phase, self.recipe, self.step)
            with autocast_where_fast(cache_enabled=False):
                terms = train_step(
                    self.models, batch, self.schedule, objective=self.objective, global_batch_size=phase.batch
                ).terms
            terms.total.backward()
            nn.utils.clip_grad_norm_([each for each in self.models.parameters() if each.requires_grad], CLIP_NORM)
            set_learning_rate(self.optimizer, learning_rate_at(phase, self.step - before))
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.average.update()
            losses.append([float(value.detach()) for value in (terms.flow_matching, terms.pull, terms.push)])
            if self.step % LOG_EVERY == 0:
                flow, pull, push = np.mean(losses, 0)
                pace = (time.monotonic() - started) / len(losses)
                print(f"{self.name} step {self.step} flow {flow:.4f} pull {pull:.4f} push {push:.4f} {pace:.2f} s", flush=True)
                started, losses = time.monotonic(), []
            if self.step % SAVE_EVERY == 0 or self.step == before + phase.steps:
                self._save()

    def _save(self) -> None:
        state = {
            "models": self.models.state_dict(),
            "average": self.average.weights,
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
        }
        torch.save(state, self.checkpoint.with_suffix(".new"))
        self.checkpoint.with_suffix(".new").replace(self.checkpoint)

    def _load(self) -> None:
        state = torch.load(self.checkpoint, weights_only=True)
        self.models.load_state_dict(state["models"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average.weights = state["average"]
        self.step = int(state["step"])

    def export(self, output: Path) -> None:
        """Writes the averaged weights in half precision where the pipeline looks for them."""
        from safetensors.torch import save_file

        with self.average.applied():
            weights = {name: tensor.clone() for name, tensor in self.models.transformer.state_dict().items()}
            fresh = cast(RefAlignTransformer, RefAlignTransformer.from_config(self.models.transformer.config))
            fresh.load_state_dict(weights)
            if not self.recipe.with_references:
                save_half(fresh, output / "wan" / "transformer")
                text = make_text_encoder(len(make_tokenizer()))
                text.load_state_dict(self.models.text.state_dict())
                save_half(text, output / "wan" / "text_encoder")
                write_export_settings(output / "wan", load_preset("toy_from_base"), base_is_copied=True)
                return
            save_half(fresh, output / self.name / "export" / "transformer")
            if self.models.projectors is not None:
                halves = {name: tensor.half() for name, tensor in self.models.projectors.state_dict().items()}
                save_file(halves, output / self.name / "projectors.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=RECIPES)
    parser.add_argument("--work", type=Path, default=Path("runs/toy_weights"), help="samples and checkpoints")
    parser.add_argument("--weights", type=Path, default=WEIGHTS_FOLDER, help="the models to build on")
    parser.add_argument("--output", type=Path, default=WEIGHTS_FOLDER)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-compile", action="store_true", help="run the blocks as they are")
    parser.add_argument("--export-only", action="store_true", help="write the weights of the checkpoint as it is")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    # The fused kernel's backward pass is slower on a processor than plain matrix products.
    with sdpa_kernel(SDPBackend.MATH):
        training = Training(arguments.model, arguments.work, arguments.weights, compiled=not arguments.no_compile)
        if not arguments.export_only:
            training.run()
    training.export(arguments.output)


if __name__ == "__main__":
    main()
