"""Sampling of videos, their scores, and the gate before a model becomes champion."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, JsonValue

from refalign.config.section import Amount, Count, Fraction, Natural, Scale, Section


class GateConfig(Section):
    max_fidelity_loss: Amount = 0.05
    """How far the 95% bound of the fidelity difference may lie below zero."""
    alpha: Annotated[float, Field(gt=0.0, lt=0.5)] = 0.05
    """Level of the test that some score is better, over all scores together."""
    min_prompts: Count = 16
    """Prompts below which nothing is decided."""
    votes: str | None = None
    """Answers to what ``pipelines/register.py ask`` exported: a table (CSV), or a folder of them. They are recorded."""
    min_vote_share: Fraction | None = None
    """Share of votes that the lower end of the challenger's 95% interval must reach; None decides without votes."""


class SamplingSettings(Section):
    """How a video is sampled, wherever one is made."""

    num_inference_steps: Annotated[int, Field(ge=1, le=1000)] = 50
    """Euler steps per video."""
    guidance_scale: Scale = 7.5
    """Strength of the prompt."""
    reference_guidance_scale: Scale = 5.0
    """Strength of the references."""
    negative_prompt: str = ""
    """The null text of guidance."""


class EvaluationConfig(SamplingSettings):
    num_samples: Count = 4
    """Held-out prompts to make a video for."""
    separability_subjects: Natural = 24
    """Held-out subjects whose reference tokens are compared, block by block, before and after training; 0 for none."""
    gate: GateConfig = GateConfig()
    """When a challenger becomes champion."""
    judge: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")] | None = None
    """Python function, ``module:name``, that says of each video which attributes of its subjects are right
    (`refalign.evaluation.judging`); the toy preset names the one of the drawn world."""
    opens2v_evaluator: str | None = None
    """Command that scores the videos of OpenS2V-Eval: from ``$VIDEOS`` and ``$PROMPTS``, upstream's files into ``$SCORES``."""

    def describe_videos(self) -> dict[str, JsonValue]:
        """The settings that change the videos, without those that only change how they are judged."""
        return self.model_dump(mode="json", exclude={"gate", "opens2v_evaluator"})
