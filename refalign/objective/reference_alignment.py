"""The reference alignment loss: tokens of a reference go to their own target, and away from other subjects' targets.

For one aligned block, with s = normalise(projected) and t = normalise(target), both over channels, in float32:

    L_pull = mean over (k, i)                 of relu((1 - s_ki . t_ki)   - m_pull)
    L_push = mean over (k, i), (k', j), k!=k' of relu(m_push - (1 - s_ki . t_k'j))

Departures from the published code, each off or neutral by default for one sample per batch: negatives come from the same
sample only (the published loss mixes samples), all in float32 (published: bf16), ``token_weight`` takes white padding
out of both means, ``subject_index`` keeps two views of one subject from being pushed apart.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# 4 MiB of similarities at a time: stays in a CPU's cache, and is still a full-sized matrix product on a GPU.
_SIMILARITIES_AT_ONCE = 2**20


class AlignmentTerms(NamedTuple):
    """Pull and push of one block, one number per sample."""

    pull: Float[Tensor, "B"]
    push: Float[Tensor, "B"]


def reference_alignment(
    projected: Float[Tensor, "B K P E"],
    targets: Float[Tensor, "B K P E"],
    alignment_mask: Bool[Tensor, "B K"],
    *,
    token_weight: Float[Tensor, "B K P"] | None = None,
    subject_index: Int[Tensor, "B K"] | None = None,
    pull_margin: float = 0.0,
    push_margin: float = 1.0,
) -> AlignmentTerms:
    """Pull and push of one aligned block.

    Never holds a (K P) x (K P) matrix: similarities are formed in slices of one pair of references, and their gradient
    at once, so that nothing but one gradient-sized buffer is kept for the backward pass.

    Args:
        projected: the projector's output for the reference tokens of a block.
        targets: the vision encoder's tokens of the same references on the same grid; they never receive a gradient.
        alignment_mask: which references are scored. A sample without any has pull 0; with fewer than two, push 0.
        token_weight: how much each token counts, >= 0, for example its share of foreground. None: all tokens alike.
        subject_index: references with equal numbers show one subject and are not negatives of each other.
            None: every reference counts as another subject, as published.
        pull_margin: cosine distance below which a token is close enough.
        push_margin: cosine distance beyond which a foreign token is far enough; 1 makes the term relu(s . t).

    Source: arXiv 2603.25743 and its published code; the module's docstring lists where ours differs and why.
    """
    scored = alignment_mask.float()
    weight = scored[:, :, None].expand(projected.shape[:3])
    if token_weight is not None:
        weight = weight * token_weight.float()
    is_negative = _negative_pairs(alignment_mask, subject_index)
    with torch.autocast(projected.device.type, enabled=False):
        pull_sum, push_sum = _PullPush.apply(projected, targets.detach(), weight, is_negative, pull_margin, push_margin)
    mass = weight.sum(2)
    return AlignmentTerms(
        pull=_ratio(pull_sum, mass.sum(1)),
        push=_ratio(push_sum, (mass[:, :, None] * mass[:, None, :] * is_negative).sum((1, 2))),
    )


def push_floor(
    targets: Float[Tensor, "B K P E"],
    alignment_mask: Bool[Tensor, "B K"],
    *,
    token_weight: Float[Tensor, "B K P"] | None = None,
    subject_index: Int[Tensor, "B K"] | None = None,
    push_margin: float = 1.0,
) -> Float[Tensor, "B"]:
    """The push term at s = t: what the vision encoder alone leaves of it, below which training need not look for it."""
    with torch.no_grad():
        terms = reference_alignment(
            targets,
            targets,
            alignment_mask,
            token_weight=token_weight,
            subject_index=subject_index,
            push_margin=push_margin,
        )
    return terms.push


def _negative_pairs(alignment_mask: Bool[Tensor, "B K"], subject_index: Int[Tensor, "B K"] | None) -> Bool[Tensor, "B K K"]:
    """Which ordered pairs of references are pushed apart: both scored, not the same one, not of the same subject."""
    both_scored = alignment_mask[:, :, None] & alignment_mask[:, None, :]
    if subject_index is not None:
        return both_scored & (subject_index[:, :, None] != subject_index[:, None, :])
    return both_scored & ~torch.eye(alignment_mask.shape[1], dtype=torch.bool, device=alignment_mask.device)


def _ratio(total: Float[Tensor, "B"], mass: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
    """total / mass, and 0 where nothing was weighed."""
    return torch.where(mass > 0, total / torch.where(mass > 0, mass, 1.0), 0.0)


def _unit(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens over their length, and the lengths (at least 1e-12, as torch's normalize), in float32."""
    tokens = tokens.float()
    length = torch.linalg.vector_norm(tokens, dim=-1, keepdim=True).clamp(min=1e-12)
    return tokens / length, length


class _PullPush(torch.autograd.Function):
    """Weighted sums of pull and push per sample, with the push's gradient formed in the forward pass.

    d push / d s_ki = w_ki sum over (k', j) of w_k'j [s_ki . t_k'j > 1 - m_push] t_k'j needs the same similarities as the
    value: thresholding a slice of them in place and multiplying once more by the targets costs two matrix products per
    pair, with nothing of size P x P left over. Normalised tokens are recomputed rather than kept: they cost K P E
    operations, the similarities K (K - 1) P^2 E.
    """

    @staticmethod
    def forward(
        ctx: Any,
        projected: Tensor,
        targets: Tensor,
        weight: Tensor,
        is_negative: Tensor,
        pull_margin: float,
        push_margin: float,
    ) -> tuple[Tensor, Tensor]:
        num_samples, num_references, num_tokens, _ = projected.shape
        rows = max(1, _SIMILARITIES_AT_ONCE // (num_samples * num_tokens))
        # An excluded pair has an unreachable threshold: no branch on a mask's values, hence no device sync.
        threshold = torch.where(is_negative, 1.0 - push_margin, torch.inf)[..., None, None]
        gradient = torch.zeros(projected.shape, device=projected.device) if ctx.needs_input_grad[0] else None
        pull = push = torch.zeros(num_samples, device=projected.device)
        for k in range(num_references):
            s = _unit(projected[:, k])[0]
            pull = pull + (weight[:, k] * _pull_excess(s, _unit(targets[:, k])[0], pull_margin)).sum(1)
            for other in range(num_references):
                if other == k:
                    continue
                t = _unit(targets[:, other])[0]
                for start in range(0, num_tokens, rows):
                    part = slice(start, start + rows)
                    excess = s[:, part] @ t.mT
                    excess = excess.sub_(threshold[:, k, other]).clamp_(min=0)
                    push = push + (weight[:, k, part] * (excess @ weight[:, other, :, None])[..., 0]).sum(1)
                    if gradient is not None:
                        is_active = excess.gt_(0).mul_(weight[:, other, None, :])
                        gradient[:, k, part].baddbmm_(is_active, t)
        ctx.save_for_backward(projected, targets, weight, gradient)
        ctx.pull_margin = pull_margin
        return pull, push

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        projected, targets, weight, push_gradient = ctx.saved_tensors
        d_pull, d_push = (each[:, None, None] for each in upstream)
        result = torch.empty_like(projected)
        for k in range(projected.shape[1]):
            s, length = _unit(projected[:, k])
            t = _unit(targets[:, k])[0]
            is_pulled = (_pull_excess(s, t, ctx.pull_margin) > 0)[..., None]
            d_s = t.mul_(is_pulled * -d_pull).addcmul_(push_gradient[:, k], d_push).mul_(weight[:, k, :, None])
            # Through the normalisation: only the part of the gradient that is tangent to the sphere moves a token.
            radial = torch.linalg.vecdot(d_s, s).unsqueeze(-1)
            result[:, k] = d_s.addcmul_(s, radial, value=-1).div_(length)
        return result, None, None, None, None, None


def _pull_excess(s: Tensor, t: Tensor, margin: float) -> Tensor:
    """relu((1 - s . t) - margin) for unit vectors."""
    return (1 - torch.linalg.vecdot(s, t) - margin).clamp(min=0)
