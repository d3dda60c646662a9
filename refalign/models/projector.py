"""Projectors: from the Transformer's width to the vision encoder's, one per aligned block.

They exist in training only: kept between stages, never part of the released model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn

from refalign.errors import ArtifactError
from refalign.models.loading import load_tensors

_KEY = re.compile(r"blocks\.(\d+)\.proj\.(\d+)\.(weight|bias)")


class Projector(nn.Module):
    """Linear, SiLU, ..., Linear."""

    def __init__(self, widths: Sequence[int], *, bias: bool = False) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width_in, width_out in zip(widths[:-1], widths[1:], strict=True):
            layers += [nn.Linear(width_in, width_out, bias=bias), nn.SiLU()]
        self.proj = nn.Sequential(*layers[:-1])

    def forward(self, tokens: Float[Tensor, "*rest D"]) -> Float[Tensor, "*rest E"]:
        return self.proj(tokens)


class Projectors(nn.Module):
    """One projector per aligned block, in the order in which the blocks' tokens are passed.

    Args:
        widths: the Transformer's width, hidden widths, the vision encoder's width.
    """

    def __init__(self, block_indices: Iterable[int], widths: Sequence[int], *, bias: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({str(index): Projector(widths, bias=bias) for index in block_indices})

    @classmethod
    def make_refalign(cls, block_indices: Iterable[int], width: int, vision_width: int) -> Projectors:
        """RefAlign's published projector: Linear(d, d/2), SiLU, Linear(d/2, E), no bias."""
        return cls(block_indices, (width, width // 2, vision_width))

    @classmethod
    def make_repa(cls, block_index: int, width: int, vision_width: int) -> Projectors:
        """REPA's projector (arXiv 2410.06940): three linear layers with bias, d -> d -> d -> E, and SiLU between them.

        REPA's hidden width is always 2048; here it is the Transformer's.
        """
        return cls([block_index], (width, width, width, vision_width), bias=True)

    @property
    def block_indices(self) -> tuple[int, ...]:
        """The aligned blocks, in order."""
        return tuple(int(index) for index in self.blocks)

    def forward(
        self, tokens: tuple[Float[Tensor, "B K P D"], ...], *, stop_gradient: bool = False
    ) -> tuple[Float[Tensor, "B K P E"], ...]:
        """Projects the tokens of each aligned block.

        Args:
            tokens: one tensor per block, in the order of ``block_indices``.
            stop_gradient: a control experiment: no gradient of the alignment reaches the Transformer.
        """
        projectors = zip(self.blocks.values(), tokens, strict=True)
        return tuple(projector(each.detach() if stop_gradient else each) for projector, each in projectors)

    def save(self, path: str | Path) -> None:
        """Writes the weights as safetensors; block indices and widths are in the keys and shapes."""
        save_file({name: weight.contiguous().cpu() for name, weight in self.state_dict().items()}, path)

    @classmethod
    def load(cls, path: str | Path) -> Projectors:
        """Reads what ``save`` wrote; raises an `ArtifactError` if there is no such file."""
        if not Path(path).is_file():
            raise ArtifactError(f"{path}: no such file of projectors; a folder exported for inference has none.")
        return cls.from_state_dict(load_tensors(Path(path)), str(path))

    @classmethod
    def from_state_dict(cls, weights: dict[str, Tensor], origin: str = "state dict") -> Projectors:
        """Rebuilds projectors of any depth from their weights; raises an `ArtifactError` if these are none."""
        matches = [_KEY.fullmatch(name) for name in weights]
        indices = sorted({int(match[1]) for match in matches if match})
        layers = sorted({int(match[2]) for match in matches if match})
        try:
            if not indices or not all(matches):
                raise KeyError("blocks.<index>.proj.<layer>.weight")
            shapes = [weights[f"blocks.{indices[0]}.proj.{layer}.weight"].shape for layer in layers]
            widths = (shapes[0][1], *(shape[0] for shape in shapes))
            with torch.device("meta"):
                projectors = cls(indices, widths, bias=any(name.endswith("bias") for name in weights))
            projectors.load_state_dict(weights, assign=True)
        except (KeyError, IndexError, RuntimeError) as error:
            raise ArtifactError(f"{origin}: not a set of projectors ({' '.join(str(error).split())[:200]}).") from error
        return projectors.requires_grad_()
