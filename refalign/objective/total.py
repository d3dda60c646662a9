"""The objective: flow matching plus the gated alignment terms, reduced so that no split of the batch changes it.

    L = (1 / G) sum over samples of [ L_FM + lambda (t/1000)^3 mean over blocks of (L_pull + push_weight L_push) ]

with G the global batch size. A rank adds up its own samples and divides by G, so the *sum* over ranks and over
accumulated micro-batches is the loss of the whole batch: 1 rank = 2 ranks, and 2 x 4 = 8.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from refalign.objective.reference_alignment import AlignmentTerms


class LossTerms(NamedTuple):
    """What one micro-batch adds to the loss and to each logged term; scalars, to be summed over ranks and micro-batches.

    Attributes:
        total: what is differentiated.
        flow_matching: weighted flow matching term.
        alignment: gated and weighted alignment, as it enters ``total`` (REPA's term under that baseline).
        pull: mean over blocks, before gate and weight; samples without a scored reference count as 0.
        push: likewise.
        push_floor: the push at s = t, set by the vision encoder alone.
        scored_fraction: share of samples with a scored reference: ``pull / scored_fraction`` is their own mean.
    """

    total: Float[Tensor, ""]
    flow_matching: Float[Tensor, ""]
    alignment: Float[Tensor, ""]
    pull: Float[Tensor, ""]
    push: Float[Tensor, ""]
    push_floor: Float[Tensor, ""]
    scored_fraction: Float[Tensor, ""]


def total_loss(
    flow_matching: Float[Tensor, "B"],
    *,
    global_batch_size: int,
    blocks: Sequence[AlignmentTerms] = (),
    gate: Float[Tensor, "B"] | None = None,
    alignment_mask: Bool[Tensor, "B K"] | None = None,
    push_floor: Float[Tensor, "B"] | None = None,
    baseline: Float[Tensor, "B"] | None = None,
    alignment_weight: float = 1.0,
    push_weight: float = 1.0,
) -> LossTerms:
    """Combines per-sample terms into the loss of a (micro-)batch.

    Args:
        flow_matching: from ``flow_matching_loss``.
        global_batch_size: samples in the whole batch, over all ranks and micro-batches.
        blocks: one ``reference_alignment`` per aligned block; empty for plain flow matching (baseline ``none``).
        gate: from ``alignment_gate``; None counts every noise level alike.
        alignment_mask: which references were scored, for ``scored_fraction`` only.
        push_floor: for the log only.
        baseline: a baseline's alignment term, such as ``repa``; it takes the place of ``blocks`` and is not gated.
        alignment_weight: lambda; for ``repa`` its coefficient.
        push_weight: weight of push against pull.
    """
    nothing = torch.zeros_like(flow_matching.detach())
    pull = torch.stack([terms.pull for terms in blocks]).mean(0) if blocks else nothing
    push = torch.stack([terms.push for terms in blocks]).mean(0) if blocks else nothing
    alignment = nothing
    if blocks:
        alignment = alignment_weight * (1.0 if gate is None else gate) * (pull + push_weight * push)
    elif baseline is not None:
        alignment = alignment_weight * baseline

    def reduce(term: Tensor) -> Tensor:
        return term.sum() / global_batch_size

    loss = reduce(flow_matching)
    # Without an alignment term nothing is added, not even a zero: the gradient is flow matching's, bit for bit.
    total = loss + reduce(alignment) if blocks or baseline is not None else loss
    return LossTerms(
        total=total,
        flow_matching=loss.detach(),
        alignment=reduce(alignment.detach()),
        pull=reduce(pull.detach()),
        push=reduce(push.detach()),
        push_floor=reduce(nothing if push_floor is None else push_floor),
        scored_fraction=reduce(nothing if alignment_mask is None else alignment_mask.any(1).float()),
    )
