"""One forward pass of training: from a batch to the named terms of the loss."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor

from refalign.config import ObjectiveConfig
from refalign.objective.baselines import repa
from refalign.objective.flow_matching import TrainingSchedule, add_noise, alignment_gate, flow_matching_loss, velocity_target
from refalign.objective.reference_alignment import push_floor, reference_alignment
from refalign.objective.total import LossTerms, total_loss
from refalign.training.batch import Batch
from refalign.training.models import TrainedModels


class StepOutput(NamedTuple):
    """What one forward pass gives: its part of the loss, and each sample's own flow matching term for the statistics."""

    terms: LossTerms
    flow_matching: Float[Tensor, "B"]


def train_step(
    models: TrainedModels,
    batch: Batch,
    schedule: TrainingSchedule,
    *,
    objective: ObjectiveConfig,
    global_batch_size: int,
) -> StepOutput:
    """What ``batch`` adds to the loss of its global batch; differentiate ``terms.total``.

    Source: the training algorithm of arXiv 2603.25743; here every sample has its own noise level.
    """
    # 1. The video at its noise level
    sigma, timestep = schedule.sigmas[batch.timestep_index], schedule.timesteps[batch.timestep_index]
    noisy = add_noise(batch.latents, batch.noise, sigma)

    # 2. Velocity, and the reference tokens of the aligned blocks
    dtype = models.compute_dtype
    output = models.transformer(
        noisy.to(dtype),
        timestep,
        models.embed_text(batch.prompt_embeds).to(dtype),
        batch.reference_latents.to(dtype),
        alignment_blocks=() if models.projectors is None else models.projectors.block_indices,
    )
    target = velocity_target(batch.latents, batch.noise)
    flow_matching = flow_matching_loss(output.velocity, target, schedule.weights[batch.timestep_index])
    combine = functools.partial(total_loss, flow_matching, global_batch_size=global_batch_size)
    if models.projectors is None:
        return StepOutput(combine(), flow_matching)

    if batch.frame_tokens is not None:
        (tokens,) = models.projectors(output.video_tokens, stop_gradient=objective.stop_gradient)
        baseline = repa(tokens, batch.frame_tokens)
        return StepOutput(combine(baseline=baseline, alignment_weight=objective.coefficient), flow_matching)

    # 3. Each aligned block's reference tokens: to their own targets, away from those of other subjects
    targets = batch.target_tokens
    assert targets is not None, "stored, or computed before this step (`refalign.training.targets`)"
    scoring: dict[str, Any] = {
        "token_weight": batch.token_weight,
        "subject_index": None if objective.same_subject_negatives else batch.subject_index,
        "push_margin": objective.push_margin,
    }
    projected = models.projectors(output.reference_tokens, stop_gradient=objective.stop_gradient)
    blocks = [
        reference_alignment(tokens, targets, batch.alignment_mask, pull_margin=objective.pull_margin, **scoring)
        for tokens in projected
    ]

    # 4. Both together; alignment counts most where the video is noise
    terms = combine(
        blocks=blocks,
        gate=alignment_gate(timestep, objective.gate_power),
        alignment_mask=batch.alignment_mask,
        push_floor=push_floor(targets, batch.alignment_mask, **scoring),
        alignment_weight=objective.coefficient,
        push_weight=objective.push_coefficient,
    )
    return StepOutput(terms, flow_matching)
