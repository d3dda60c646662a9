"""Widens trained toy Transformers to `make_transformer`'s shape; what they compute stays nearly the same, and training goes on.

    python -m refalign.toy.widen [--weights refalign/toy/weights]

What grows: the residual stream, every attention and every feed-forward layer. New channels of the stream begin as copies of
old ones, so that its layer norms see nearly the same numbers; new heads and hidden units are read by nobody yet; new readers are
small random numbers, so that the copies part. (Growing a network from its own function: Net2Net, arXiv 1511.05641.)
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from refalign.toy import WEIGHTS_FOLDER
from refalign.toy.initial_weights import make_transformer, save_half

QUIET = 0.3
"""What reads a copy, and what tells a copied head from the old one, over a layer's usual first weights."""
WRITERS = ("time_embedder.linear_2", "text_embedder.linear_2", "to_out.0", "ffn.net.2", "norm2")
"""Layers whose output is the stream, or has its channels: their rows are copied, and they do not read what is new."""
TIME_CHUNKS = 6
"""Shift, scale and gate of either part of a block, side by side."""


def repeat(tensor: Tensor, axis: int, size: int) -> Tensor:
    """Appends copies of the first entries along an axis until it has ``size`` of them, at most twice as many."""
    return torch.cat([tensor, tensor.narrow(axis, 0, size - tensor.shape[axis])], axis)


def widen(old: Any, new: Any) -> Any:
    """Fills ``new``, of the same depth and up to twice the width, with what ``old`` has learned, and returns it."""
    fresh = new.state_dict()
    new.load_state_dict({name: _widen_tensor(name, was, fresh[name]) for name, was in old.state_dict().items()})
    return new


def _widen_tensor(name: str, was: Tensor, fresh: Tensor) -> Tensor:
    if name.endswith("scale_shift_table") or (was.ndim == 1 and not name.endswith("bias")):
        return repeat(was, was.ndim - 1, fresh.shape[-1])
    if name.startswith("patch_embedding"):
        return repeat(was, 0, len(fresh))
    writes = any(writer in name for writer in WRITERS)
    if ".time_proj." in name:
        rows = repeat(was.unflatten(0, (TIME_CHUNKS, -1)), 1, len(fresh) // TIME_CHUNKS).flatten(0, 1)
    elif writes:
        rows = repeat(was, 0, len(fresh))
    else:
        rows = torch.cat([was, _new_rows(name, was, fresh)])
    if was.ndim == 1 or was.shape[1] == fresh.shape[1]:
        return rows
    return torch.cat([rows, (0 if writes else QUIET) * fresh[:, was.shape[1] :]], 1)


def _new_rows(name: str, was: Tensor, fresh: Tensor) -> Tensor:
    """New heads ask and answer nearly as old ones do, which leaves the norm over all heads as it is; the rest is random."""
    drawn = fresh[len(was) :, : was.shape[1]] if was.ndim == 2 else torch.zeros_like(fresh[len(was) :])
    if ".to_q." in name or ".to_k." in name:
        return was[: len(drawn)] + QUIET * drawn
    return drawn


def widen_projector(name: str, was: Tensor, fresh: Tensor) -> Tensor:
    """A layer of a projector for the wider stream: it reads nothing new, and nothing reads its new hidden units."""
    grown = torch.zeros_like(fresh)
    if ".proj.0." in name:
        grown[len(was) :] = fresh[len(was) :]
    grown[: was.shape[0], : was.shape[1]] = was
    return grown


def widen_weights(weights: Path) -> None:
    """Replaces the base's Transformer, and stage 1 with its projectors, by wider ones."""
    from diffusers import WanTransformer3DModel
    from safetensors.torch import save_file

    from refalign.models.projector import Projectors

    for folder in (weights / "wan" / "transformer", weights / "stage1" / "export" / "transformer"):
        old = WanTransformer3DModel.from_pretrained(folder, torch_dtype=torch.float32)
        new = widen(old, make_transformer())
        save_half(new, folder)
    path = weights / "stage1" / "projectors.safetensors"
    old = Projectors.load(path)
    learned = old.state_dict()
    vision_width = len(learned[f"blocks.{old.block_indices[0]}.proj.2.weight"])
    fresh = Projectors.make_refalign(old.block_indices, new.proj_out.in_features, vision_width).state_dict()
    save_file({name: widen_projector(name, was.float(), fresh[name]).half() for name, was in learned.items()}, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=WEIGHTS_FOLDER)
    widen_weights(parser.parse_args().weights)


if __name__ == "__main__":
    main()
