"""The plan of the study: what is compared, at which settings, and what decides. Written before the main runs.

The one primary endpoint is `PRIMARY`. Everything else that is reported is secondary.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from refalign.config import CheckpointConfig, OptimizerConfig, RunConfig, StageConfig, ValidationConfig

PRIMARY = (
    "Unspoken fidelity: the share of hidden attributes (what no prompt says) that the judge reads as the references have them, "
    "mean over held-out prompts, as many of each number of subjects; RA less none, both with cross-pair references, at the last "
    "evaluated step and the preset's guidance, paired by seed and prompt; 95% interval of the bootstrap over seeds and prompts. "
    "Above zero: RA helps; below zero: it harms; else undecided."
)
SMALLEST_WORTH = 0.03
"""Difference in unspoken fidelity that would matter; the power estimate asks for seeds enough to see it."""
FIDELITY_ABOVE_CHANCE, FIDELITY_BELOW = 2.0, 0.85
CONFUSION_BETWEEN = (0.15, 0.50)
"""Go or no-go on the arm none: unspoken fidelity from twice chance to .85, confusion in this range; outside, the world or the
budget is wrong, and no comparison says anything."""

References = Literal["in_pair", "cross_pair"]
PILOT_SEEDS, PILOT_PROMPTS = 1000, 71
"""Seeds of training from here on and of prompts, so that no main run repeats what settings were chosen on."""
MAIN_PROMPTS = 70
AGAIN = 500
"""Added to the seed of the arm that only repeats another."""


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        objective: changes of the objective section.
        targets: `study_targets.Kind` of the shards.
        settings_of: the arm whose chosen settings it shares, where a comparison needs them equal.
        seed_shift: added to the seed of training, for the arm that only repeats another.
    """

    about: str
    objective: dict[str, Any] = field(default_factory=dict)
    targets: str = "own"
    settings_of: str | None = None
    seed_shift: int = 0


ARMS: dict[str, Arm] = {
    "none": Arm("flow matching alone", {"alignment": "none"}),
    "none_again": Arm("A/A: none with other seeds of training", {"alignment": "none"}, settings_of="none", seed_shift=AGAIN),
    "ra": Arm("pull and push, as published"),
    "random_teacher": Arm("targets of a vision encoder that was never trained", targets="random"),
    "shuffled": Arm("targets of other subjects", targets="shuffled"),
    "stop_gradient": Arm(
        "only the projectors learn the alignment; the Transformer must equal that of none",
        {"stop_gradient": True},
        settings_of="none",
    ),
    "pull_only": Arm("no push", {"push_coefficient": 0.0}),
    "ra_foreground": Arm("tokens weighted by their share of the subject", {"token_weight": "foreground"}),
    "repa": Arm("the video's own tokens are aligned, with frames", {"alignment": "repa"}, targets="frames"),
    "supervised": Arm(
        "upper bound: targets of an encoder that was shown which pictures are of one subject", targets="supervised"
    ),
}


@dataclass(frozen=True)
class Settings:
    """What the pilot sweeps for every arm alike."""

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
    """What every run of a phase gets.

    Attributes:
        points: evaluations at equal distances, the last after the last step.
        sizes: numbers of subjects that prompts have, equally often.
        per_tier: prompts of each number in each tier of likeness; of one subject as many as of two.
        curve: reference guidance scales besides the preset's, at the last step, for every third prompt.
    """

    steps: int = 600
    points: int = 3
    sizes: tuple[int, ...] = (1, 2, 3)
    per_tier: int = 4
    curve: tuple[float, ...] = (1.0, 3.0, 9.0)
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
    """Every arm at every point of the grid; lambda is not swept where nothing of it reaches the Transformer."""
    jobs = []
    for seed in range(seeds):
        for arm in arms:
            swept = [
                each for each in grid if ARMS[arm].objective.get("alignment") != "none" or each.coefficient == CENTRE.coefficient
            ]
            if ARMS[arm].settings_of is None:
                jobs += [Job("pilot", arm, kind, settings, seed) for kind in references for settings in swept]
    return jobs


def plan_main(arms: list[str], references: list[References], seeds: int, chosen: dict[str, Settings]) -> list[Job]:
    """Every arm at its chosen settings, all arms of a seed before the next seed: stopped at any time, what is there is paired.

    An arm that the pilot left out takes those of RA.
    """
    fallback = chosen.get("ra", CENTRE)
    return [
        Job("main", arm, kind, chosen.get(ARMS[arm].settings_of or arm, fallback), seed)
        for seed in range(seeds)
        for kind in references
        for arm in arms
    ]


def make_config(base: RunConfig, job: Job, budget: Budget, start: str) -> RunConfig:
    """The recipe of one job: the base's, with the arm's objective, the job's settings and nothing else."""
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
