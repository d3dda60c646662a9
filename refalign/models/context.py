"""Context parallelism: the tokens of one sample split over several ranks, attention as in DeepSpeed-Ulysses (arXiv 2309.14509).

Between attentions every rank has an equal run of the tokens, [B, n, D] of [B, N, D]. For self-attention an all-to-all gives it
all tokens of its share of the heads, so that plain SDPA serves; another one takes the results back. As references follow the
video, a rank's video tokens are its first ones, and their number is all that a block needs to know.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from refalign.errors import GeometryError


class WholeTokens:
    """One rank has all tokens of its samples."""

    def take(self, tokens: Float[Tensor, "B N *rest"]) -> Float[Tensor, "B n *rest"]:
        """This rank's run of the tokens. Raises a `GeometryError` if N is not a multiple of the ranks."""
        return tokens

    def count(self, first: int, total: int) -> int:
        """How many of the ``first`` tokens of ``total`` are in this rank's run."""
        return first

    def gather(self, tokens: Float[Tensor, "B n D"]) -> Float[Tensor, "B N D"]:
        """All runs on every rank; gradients are summed over the ranks."""
        return tokens


class TokenSplit(WholeTokens):
    """A group of ranks that work on the same samples."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)

    def take(self, tokens: Float[Tensor, "B N *rest"]) -> Float[Tensor, "B n *rest"]:
        if tokens.shape[1] % self.size:
            raise GeometryError(
                f"{tokens.shape[1]} tokens cannot be dealt to training.parallel.context={self.size} ranks; take a divisor of the "
                "tokens of a frame."
            )
        return tokens.chunk(self.size, dim=1)[self.rank]

    def count(self, first: int, total: int) -> int:
        share = total // self.size
        return min(max(first - self.rank * share, 0), share)

    def gather(self, tokens: Float[Tensor, "B n D"]) -> Float[Tensor, "B N D"]:
        return _Gather.apply(tokens.transpose(0, 1), self.group).transpose(0, 1)

    def to_heads(self, tokens: Float[Tensor, "B n H C"]) -> Float[Tensor, "B N h C"]:
        """From some tokens of all heads to all tokens of some heads."""
        dealt = tokens.unflatten(2, (self.size, -1)).movedim(2, 0)
        return _Exchange.apply(dealt, self.group).movedim(0, 1).flatten(1, 2)

    def to_tokens(self, heads: Float[Tensor, "B N h C"]) -> Float[Tensor, "B n H C"]:
        """The way back."""
        dealt = heads.unflatten(1, (self.size, -1)).movedim(1, 0)
        return _Exchange.apply(dealt, self.group).movedim(0, 2).flatten(2, 3)


class SplitAttention:
    """Processor of a Wan self-attention over split tokens, with the attention's own parameters."""

    def __init__(self, split: TokenSplit) -> None:
        self.split = split

    def __call__(
        self, attention: Any, hidden_states: Float[Tensor, "B n D"], text: None, mask: None, rotary_emb: tuple[Tensor, Tensor]
    ) -> Float[Tensor, "B n D"]:
        heads = (attention.heads, -1)
        query = _rotate(attention.norm_q(attention.to_q(hidden_states)).unflatten(2, heads), *rotary_emb)
        key = _rotate(attention.norm_k(attention.to_k(hidden_states)).unflatten(2, heads), *rotary_emb)
        value = attention.to_v(hidden_states).unflatten(2, heads)
        query, key, value = (self.split.to_heads(each).transpose(1, 2) for each in (query, key, value))
        attended = scaled_dot_product_attention(query, key, value).transpose(1, 2)
        return attention.to_out[0](self.split.to_tokens(attended).flatten(2, 3).type_as(hidden_states))


def _rotate(states: Float[Tensor, "B n H C"], cos: Tensor, sin: Tensor) -> Float[Tensor, "B n H C"]:
    """Rotary position, in the type of the tables as in the stock processor."""
    even, odd = states.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).type_as(states)


class _Exchange(torch.autograd.Function):
    """Part i of the first axis goes to rank i, and comes from it."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        received = torch.empty_like(parts, memory_format=torch.contiguous_format)
        dist.all_to_all_single(received, parts.contiguous(), group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return _Exchange.apply(grad_outputs[0], ctx.group), None


class _Gather(torch.autograd.Function):
    """All ranks' parts, one after the other along the first axis."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        whole = part.new_empty(dist.get_world_size(group) * part.shape[0], *part.shape[1:])
        dist.all_gather_into_tensor(whole, part.contiguous(), group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        gradient = grad_outputs[0].contiguous()
        size = dist.get_world_size(ctx.group)
        part = gradient.new_empty(gradient.shape[0] // size, *gradient.shape[1:])
        dist.reduce_scatter_tensor(part, gradient, group=ctx.group)
        return part, None
