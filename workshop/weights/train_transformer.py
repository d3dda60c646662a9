"""Trains the toy's text encoder and Transformers with the project's training step, on the samples of `pool`.

    python -m workshop.weights.train_transformer base
    python -m workshop.weights.train_transformer stage1
    python -m workshop.weights.train_transformer early    # the first 550 steps of stage1, for the default run to go on from
    python -m workshop.weights.train_transformer twin     # stage1 without alignment, same draws

``base``: text to video without references, Transformer and text encoder together, from random weights. ``stage1``: continues it
with references and the RA loss; the text encoder is frozen. Each trains on single frames first, then on clips. Samples are kept
beside ``--checkpoint``.
"""

from __future__ import annotations

import copy
import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import UMT5EncoderModel

from refalign.config import ObjectiveConfig, OptimizerConfig, StageConfig, TrainingConfig
from refalign.config.presets import load_preset
from refalign.generation.settings import write_export_settings
from refalign.models.projector import Projectors
from refalign.models.wan import RefAlignTransformer, load_transformer
from refalign.objective.flow_matching import TrainingSchedule, make_training_schedule
from refalign.toy import WEIGHTS_FOLDER
from refalign.toy.scenes import NUM_DRAWINGS
from refalign.training.batch import NUM_TIMESTEPS, Batch
from refalign.training.models import TrainedModels
from refalign.training.optim import make_optimizer, set_learning_rate
from refalign.training.step import train_step
from workshop.weights.initial_weights import make_text_encoder, make_tokenizer, make_transformer, save_half
from workshop.weights.pool import Pool, encode_captions, load_or_make_pool
from workshop.weights.training import TrainingState, autocast_where_fast, make_parser, train

PEAK, WARMUP, CLIP_NORM, AVERAGE_DECAY = 2e-3, 50, 1.0, 0.998
TEXT_DROPPED = 0.15
SIZE_SHARES = (0.35, 0.4, 0.25)
"""Of the steps, by the number of subjects of their samples: a batch holds samples of one size."""
_load_pool = functools.lru_cache(1)(load_or_make_pool)


@dataclass(frozen=True)
class Phase:
    """Steps on samples of one kind."""

    drawings: int
    steps: int
    batch: int
    counts: tuple[int, int, int]  # of the samples with one, two and three subjects
    peak: float = 1.0  # learning rate over ``PEAK``; held for half of the steps, then it falls linearly to ``floor`` of itself
    floor: float = 0.05
    without: float = 0.1  # share of the steps with a zero frame in place of references (or of nothing, in a recipe without)


@dataclass(frozen=True)
class Recipe:
    """One model; ``last_step`` ends its training before the last phase does."""

    phases: tuple[Phase, ...]
    with_references: bool
    aligned: bool = False
    last_step: int | None = None

    @property
    def steps(self) -> int:
        return self.last_step or sum(phase.steps for phase in self.phases)

    def locate(self, step: int) -> tuple[Phase, int]:
        """The phase of a step, counted from 0 over the recipe, and the step's number in it, from 1."""
        for phase in self.phases:
            if step < phase.steps:
                return phase, step + 1
            step -= phase.steps
        raise IndexError(f"{step} steps beyond the recipe")


FRAMES, CLIPS = (5000, 5500, 3500), (3000, 3500, 2500)
BASE = (
    Phase(1, 750, 64, FRAMES, floor=0.3, without=1.0),
    Phase(NUM_DRAWINGS, 250, 32, CLIPS, peak=0.5, without=1.0),
    Phase(1, 1500, 64, FRAMES, floor=0.3),
    Phase(NUM_DRAWINGS, 800, 32, CLIPS, peak=0.7, without=0.25),
    Phase(NUM_DRAWINGS, 2000, 32, CLIPS),
)
STAGE1 = (Phase(1, 300, 64, FRAMES, floor=0.5), Phase(NUM_DRAWINGS, 1200, 32, CLIPS, peak=0.7))
RECIPES = {
    "base": Recipe(BASE, with_references=False),
    "stage1": Recipe(STAGE1, with_references=True, aligned=True),
    "early": Recipe(STAGE1, with_references=True, aligned=True, last_step=550),
    "twin": Recipe(STAGE1, with_references=True),
}


class ToyModels(TrainedModels):
    """Transformer, projectors, and the text encoder: prompts are token ids."""

    def __init__(self, transformer: RefAlignTransformer, projectors: Projectors | None, text: nn.Module, *, frozen: bool) -> None:
        super().__init__(transformer, projectors)
        self.text = text.requires_grad_(not frozen)

    def embed_text(self, prompt_embeds: Tensor) -> Tensor:
        """Token ids [B, L] -> [B, L, D], zeros beyond each prompt's own tokens."""
        mask = prompt_embeds != 0
        return self.text(input_ids=prompt_embeds, attention_mask=mask).last_hidden_state * mask[..., None]


def build(recipe: Recipe, start: Path, vision_width: int, objective: ObjectiveConfig) -> ToyModels:
    """The models as a training begins: random, or from the base of ``start``."""
    if not recipe.with_references:
        drawn = make_transformer()
        transformer = cast(RefAlignTransformer, RefAlignTransformer.from_config(drawn.config))
        transformer.load_state_dict(drawn.state_dict())
        return ToyModels(transformer.train(), None, make_text_encoder(len(make_tokenizer())), frozen=False)
    text = UMT5EncoderModel.from_pretrained(start / "wan" / "text_encoder", dtype=torch.float32).eval()
    transformer = load_transformer(str(start / "wan")).train()
    torch.manual_seed(0)
    blocks = range(objective.alignment_blocks)
    projectors = Projectors.make_refalign(blocks, transformer.width, vision_width) if recipe.aligned else None
    return ToyModels(transformer, projectors, text, frozen=True)


def make_batch(pool: Pool, phase: Phase, recipe: Recipe, step: int) -> Batch:
    """The samples of one step, with noise and dropout. All draws depend on the step alone, so stage 1 and its twin share them."""
    generator = torch.Generator().manual_seed(step)
    size = 1 + int(torch.multinomial(torch.tensor(SIZE_SHARES), 1, generator=generator))
    low, high = pool.first[size - 1], pool.first[size]
    chosen = torch.randint(low, high, (phase.batch,), generator=generator)
    latents = pool.latents[chosen].float()
    timesteps = torch.randint(0, NUM_TIMESTEPS, (phase.batch,), generator=generator)
    dropped = torch.rand(phase.batch, generator=generator) < TEXT_DROPPED
    tokens = torch.where(dropped[:, None], encode_captions([""]), pool.tokens[chosen])
    without = bool(torch.rand((), generator=generator) < phase.without)
    references = pool.reference_latents[size - 1][chosen - low].float()
    targets = pool.targets[size - 1][chosen - low].float()
    if without:
        references, targets, size = torch.zeros_like(references[:, :1]), targets[:, :1], 1
    elif not recipe.with_references:
        references, targets, size = references[:, :0], targets[:, :0], 0
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


@dataclass(frozen=True)
class Course:
    """What a training does at each of its steps, counted from 0."""

    recipe: Recipe
    models: ToyModels
    objective: ObjectiveConfig
    work: Path
    weights: Path

    @functools.cached_property
    def schedule(self) -> TrainingSchedule:
        return make_training_schedule(self.objective.shift, bell=False)

    def make_loss(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its terms."""
        phase, _ = self.recipe.locate(step)
        seed = 1000 + phase.drawings
        pool = _load_pool(self.work / "pool", self.weights, phase.counts, drawings=phase.drawings, seed=seed)
        batch = make_batch(pool, phase, self.recipe, step + 1)
        with autocast_where_fast(cache_enabled=False):
            terms = train_step(self.models, batch, self.schedule, objective=self.objective, global_batch_size=phase.batch).terms
        return terms.total, {name: getattr(terms, name).detach() for name in ("flow_matching", "pull", "push")}

    def factor_at(self, step: int) -> float:
        """The learning rate over ``PEAK``: warm-up, constant to half of the phase, then linear to its floor."""
        phase, number = self.recipe.locate(step)
        falling = phase.floor + (1 - phase.floor) * 2 * (1 - number / phase.steps)
        return phase.peak * min(1.0, number / WARMUP, falling)


def prepare(name: str, work: Path, weights: Path) -> tuple[TrainingState, Course]:
    """A training at its beginning."""
    recipe, preset = RECIPES[name], load_preset("toy_from_base")
    objective = preset.objective.model_copy(update={"alignment": "reference_alignment" if recipe.aligned else "none"})
    vision_width = json.loads((weights / "dinov3" / "config.json").read_text())["hidden_size"]
    models = build(recipe, weights, vision_width, objective)
    stage = StageConfig(name=name, steps=1, learning_rate=PEAK)
    optimizer = make_optimizer(
        models, TrainingConfig(stages=(stage,), global_batch=1, micro_batch=1, optimizer=OptimizerConfig(name="muon"))
    )
    set_learning_rate(optimizer, PEAK)
    return TrainingState(models, [optimizer], decay=AVERAGE_DECAY), Course(recipe, models, objective, work, weights)


def export(name: str, averaged: ToyModels, output: Path) -> None:
    """Writes the weights in half precision where the pipeline looks for them."""
    models = copy.deepcopy(averaged)
    if not RECIPES[name].with_references:
        save_half(models.transformer, output / "wan" / "transformer")
        save_half(models.text, output / "wan" / "text_encoder")
        write_export_settings(output / "wan", load_preset("toy_from_base"), base_is_copied=True)
        return
    save_half(models.transformer, output / name / "export" / "transformer")
    if models.projectors is not None:
        save_file(models.projectors.half().state_dict(), output / name / "projectors.safetensors")


def main() -> None:
    parser = make_parser(__doc__, checkpoint="runs/toy_weights/{model}.pt", output=WEIGHTS_FOLDER)
    parser.add_argument("model", choices=RECIPES)
    arguments = parser.parse_args()
    name, file = arguments.model, Path(str(arguments.checkpoint).format(model=arguments.model))
    state, course = prepare(name, file.parent, arguments.output)
    for block in course.models.transformer.blocks:
        block.forward = torch.compile(block.forward, dynamic=False)
    # On a processor the fused kernel's backward pass is slower than plain matrix products.
    with sdpa_kernel(SDPBackend.MATH):
        train(
            state,
            course.make_loss,
            course.factor_at,
            lambda averaged: export(name, averaged, arguments.output),
            steps=arguments.steps or course.recipe.steps,
            checkpoint=file,
            clip_norm=CLIP_NORM,
        )


if __name__ == "__main__":
    main()
