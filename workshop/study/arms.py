"""The plan of the study: what is compared, at which settings, and what decides. Written before the main runs.

The one primary endpoint is `PRIMARY`. Everything else that is reported is secondary.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from refalign.config import CheckpointConfig, OptimizerConfig, RunConfig, StageConfig, ValidationConfig
from workshop.study.targets import Kind

PRIMARY = (
    "Unspoken fidelity: the share of hidden attributes (what no prompt says) that the judge reads as the references have them, "
    "mean over held-out prompts, as many of each number of subjects; RA less none, both with cross-pair references, at the last "
    "evaluated step and the preset's guidance, paired by seed and prompt; 95% interval of the bootstrap over seeds and prompts. "
    "Above zero: RA helps; below zero: it harms; else undecided."
)
SMALLEST_WORTH = 0.03
"""Smallest difference in unspoken fidelity that matters, for which the power is estimated."""
FIDELITY_ABOVE_CHANCE, FIDELITY_BELOW = 2.0, 0.85
CONFUSION_BETWEEN = (0.15, 0.50)
"""Go or no-go on the arm none: unspoken fidelity from twice chance to .85, confusion in this range. Outside, the world or the
budget is wrong, and comparisons mean nothing."""

References = Literal["in_pair", "cross_pair"]
PILOT_SEEDS, PILOT_PROMPTS = 1000, 71
"""First training seed and seed of the prompts of the pilot: main runs repeat nothing that settings were chosen on."""
MAIN_PROMPTS = 70


@dataclass(frozen=True)
class Arm:
    """One way to train."""

    about: str
    objective: dict[str, Any] = field(default_factory=dict)  # changes of the section
    targets: Kind = "own"
    settings_of: str | None = None  # the arm whose chosen settings it shares, so that the two can be compared
    seed_shift: int = 0  # added to the seed of training


ARMS: dict[str, Arm] = {
    "none": Arm("flow matching alone", {"alignment": "none"}),
    "none_again": Arm("A/A: none with other seeds of training", {"alignment": "none"}, settings_of="none", seed_shift=500),
    "ra": Arm("pull and push, as published"),
    "random_teacher": Arm("targets of an untrained vision encoder", targets="random"),
    "shuffled": Arm("targets of other subjects", targets="shuffled"),
    "stop_gradient": Arm(
        "only the projectors learn the alignment; the Transformer must equal that of none",
        {"stop_gradient": True},
        settings_of="none",
    ),
    "pull_only": Arm("no push", {"push_coefficient": 0.0}),
    "ra_foreground": Arm("tokens weighted by their share of the subject", {"token_weight": "foreground"}),
    "repa": Arm("the video's own tokens are aligned, with frames", {"alignment": "repa"}, targets="frames"),
    "supervised": Arm("upper bound: targets of an encoder trained with labels of the subjects", targets="supervised"),
}


@dataclass(frozen=True)
class Settings:
    """What the pilot sweeps for every arm."""

    learning_rate: float = 5e-4
    shift: float = 2.0
    coefficient: float = 1.0

    @property
    def name(self) -> str:
        return f"lr{self.learning_rate:g}-shift{self.shift:g}-lambda{self.coefficient:g}"


CENTRE = Settings()
GRID = (
    CENTRE,
    replace(CENTRE, learning_rate=2e-4),
    replace(CENTRE, learning_rate=1e-3),
    replace(CENTRE, shift=1.0),
    replace(CENTRE, shift=4.0),
    replace(CENTRE, coefficient=0.25),
    replace(CENTRE, coefficient=4.0),
)
"""One setting at a time around the centre."""


@dataclass(frozen=True)
class Budget:
    """What every run of a phase gets."""

    steps: int = 600
    points: int = 3  # evaluations, evenly spaced, the last after the last step
    sizes: tuple[int, ...] = (1, 2, 3)  # numbers of subjects of the prompts, equally often
    per_tier: int = 4  # prompts of each number in each tier of likeness; of one subject as many as of two
    curve: tuple[float, ...] = (1.0, 3.0, 9.0)  # further reference guidance scales at the last step, for every third prompt
    inference_steps: int = 20
    batch: int = 16

    @property
    def every(self) -> int:
        """Steps between evaluations."""
        return max(1, self.steps // self.points)

    @property
    def evaluated_steps(self) -> list[int]:
        return [*range(self.every, self.every * self.points, self.every), self.steps]


@dataclass(frozen=True)
class Job:
    """One training with its evaluations: one JSON."""

    phase: Literal["pilot", "main"]
    arm: str
    references: References
    settings: Settings
    seed: int

    @property
    def name(self) -> str:
        return f"{self.phase}-{self.arm}-{self.references}-{self.settings.name}-s{self.seed}"

    @property
    def prompts(self) -> int:
        return PILOT_PROMPTS if self.phase == "pilot" else MAIN_PROMPTS

    @property
    def training_seed(self) -> int:
        return self.seed + (PILOT_SEEDS if self.phase == "pilot" else 0) + ARMS[self.arm].seed_shift


def plan_pilot(arms: list[str], references: list[References], seeds: int, grid: tuple[Settings, ...] = GRID) -> list[Job]:
    """Every arm at every point of the grid, except other lambdas for an arm without alignment."""
    return [
        Job("pilot", arm, kind, settings, seed)
        for seed in range(seeds)
        for arm in arms
        if ARMS[arm].settings_of is None
        for kind in references
        for settings in grid
        if ARMS[arm].objective.get("alignment") != "none" or settings.coefficient == CENTRE.coefficient
    ]


def plan_main(arms: list[str], references: list[References], seeds: int, chosen: dict[str, Settings]) -> list[Job]:
    """Every arm at its chosen settings, or, if the pilot left it out, at those of RA.

    All arms of a seed come before the next seed, so that a stopped study has pairs.
    """
    fallback = chosen.get("ra", CENTRE)
    return [
        Job("main", arm, kind, chosen.get(ARMS[arm].settings_of or arm, fallback), seed)
        for seed in range(seeds)
        for kind in references
        for arm in arms
    ]


def make_config(base: RunConfig, job: Job, budget: Budget, start: str) -> RunConfig:
    """The base recipe with the arm's objective and the job's settings."""
    arm, settings = ARMS[job.arm], job.settings
    alignment = {"coefficient": settings.coefficient, "shift": settings.shift, **arm.objective}
    stage = StageConfig(
        name="study",
        steps=budget.steps,
        learning_rate=settings.learning_rate,
        schedule="cosine",
        cross_pair_fraction=float(job.references == "cross_pair"),
    )
    training = {
        "stages": (stage,),
        "global_batch": budget.batch,
        "micro_batch": budget.batch,
        "optimizer": OptimizerConfig(warmup_steps=min(50, budget.steps // 4), ema_decay=0.99 if budget.steps >= 200 else 0.5),
        "checkpoint": CheckpointConfig(every=budget.every, keep=budget.steps // budget.every + 1, keep_best=False),
        "validation": ValidationConfig(every=budget.every, samples=2 * budget.batch),
    }
    return base.model_copy(
        update={
            "seed": job.training_seed,
            "models": base.models.model_copy(update={"base": start}),
            "shards": base.shards.model_copy(update={"frame_tokens": arm.targets == "frames"}),
            "objective": base.objective.model_copy(update=alignment),
            "training": base.training.model_copy(update=training),
        }
    )
