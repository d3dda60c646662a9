"""The loss."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from refalign.config.section import Count, Positive, Section


class ObjectiveConfig(Section):
    alignment: Literal["none", "reference_alignment", "repa"] = "reference_alignment"
    """Which alignment term is added to flow matching."""
    coefficient: Annotated[float, Field(ge=0.0)] = 1.0
    """Lambda: weight of the alignment term (REPA's published value is 0.5)."""
    push_coefficient: Annotated[float, Field(ge=0.0)] = 1.0
    """Weight of the push inside the alignment term; 0 leaves the pull alone."""
    alignment_blocks: Count = 9
    """The first so many blocks are aligned; REPA aligns only the last of them."""
    pull_margin: float = 0.0
    """Cosine distance below which nothing is pulled."""
    push_margin: float = 1.0
    """Cosine distance above which nothing is pushed."""
    gate_power: Annotated[float, Field(ge=0.0)] = 3.0
    """Exponent of the gate (timestep / 1000) on the alignment term."""
    token_weight: Literal["none", "padding", "foreground"] = "none"
    """Weight of reference tokens: all alike (published), by the share of each patch that is not letterbox padding, or by
    the share of the subject in it (which leaves out the white around a mask crop too)."""
    same_subject_negatives: bool = True
    """Push two references of one subject apart (published); False leaves such pairs out."""
    stop_gradient: bool = False
    """Control: train the projectors alone; the transformer sees only flow matching."""
    shift: Positive = 5.0
    """Sigma shift of the training timesteps."""
    timestep_weights: Literal["bell", "uniform"] = "bell"
    """How much the velocity counts at each timestep: w(t) as published, which is 0 in pure noise, or all alike."""
