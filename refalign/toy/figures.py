"""Prints every held-out figure of the shipped weights, one line a model.

    python -m refalign.toy.figures [--weights refalign/toy/weights] [--items 100]

Identities, scenes and seeds are none that a training script draws from.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from refalign.toy import WEIGHTS_FOLDER, measure_vision, train_detector, train_vae
from refalign.toy.initial_weights import make_vision_encoder

Figures = dict[str, float]


def measure_weights(weights: Path, items: int) -> dict[str, Figures]:
    """Model -> figures, each over ``items`` held-out pictures, clips or identities."""
    from diffusers import AutoencoderKLWan
    from transformers import DINOv3ViTModel

    vae = AutoencoderKLWan.from_pretrained(weights / "wan" / "vae").float()
    vision = DINOv3ViTModel.from_pretrained(weights / "dinov3", dtype=torch.float32)
    return {
        "detector": train_detector.evaluate(weights / "detector", items),
        "vae": train_vae.evaluate(vae, items, items),
        "vision encoder": measure_vision.evaluate(vision, items),
        "vision encoder, random init": measure_vision.evaluate(make_vision_encoder(), items),
        "raw pixels in its place": measure_vision.evaluate_pixels(items),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=WEIGHTS_FOLDER)
    parser.add_argument("--items", type=int, default=100, help="held-out pictures, clips or identities a figure")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for model, figures in measure_weights(arguments.weights, arguments.items).items():
        print(f"{model:28s} " + "  ".join(f"{name} {value:.3f}" for name, value in figures.items()))


if __name__ == "__main__":
    main()
