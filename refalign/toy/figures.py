"""Prints every held-out figure of the shipped weights, one line a model; draws the sheets to look at.

    python -m refalign.toy.figures [--weights refalign/toy/weights] [--items 100] [--per-tier 8] [--sheets runs/sheets]

Identities, scenes and seeds are none that a training script draws from.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image

from refalign.toy import WEIGHTS_FOLDER, measure_vision, measures, train_detector, train_judges, train_vae
from refalign.toy.benchmark import measure_judges, run_benchmark
from refalign.toy.cases import make_benchmark, without_references
from refalign.toy.drawing import POSES, render_reference
from refalign.toy.identities import sample_identity
from refalign.toy.initial_weights import make_vision_encoder
from refalign.toy.judges import Judge
from refalign.toy.scoring import summarise

Figures = dict[str, float]
SHEET_COLUMNS, SHEET_IDENTITIES, SHEET_CLIPS = 8, 64, 12


def measure_weights(weights: Path, items: int) -> Iterator[tuple[str, Figures]]:
    """(model, figures), each over ``items`` held-out pictures, clips or identities."""
    from transformers import DINOv3ViTModel

    yield "detector", train_detector.evaluate(weights / "detector", items)
    vae = train_vae.load_vae(weights / "wan" / "vae")
    yield "vae", train_vae.evaluate(vae, items, items)
    vision = DINOv3ViTModel.from_pretrained(weights / "dinov3", dtype=torch.float32)
    yield "vision encoder", measure_vision.evaluate(vision, items)
    yield "vision encoder, random init", measure_vision.evaluate(make_vision_encoder(), items)
    yield "raw pixels in its place", measure_vision.evaluate_pixels(items)
    yield "judge: detector", train_detector.evaluate(weights / "judges" / "detector", items)
    judge = Judge.load(weights / "judges" / "reader")
    yield "judge: drawn clips", train_judges.evaluate(judge, items)
    yield "judge: clips through the vae", train_judges.evaluate(judge, items, vae=vae)
    for fault, figures in measure_judges(weights / "judges", max(1, items // 3)).items():
        yield f"judges on {fault} clips", figures
    yield "likeness without networks", measures.evaluate(items)


def measure_models(weights: Path, per_tier: int, sheets: Path | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """(model, what the judges see in its clips): the base from text, stage 1 from text and references."""
    from refalign.generation import RefAlignPipeline
    from refalign.models.wan import load_transformer

    for name, folder, with_references in (("base", weights / "wan", False), ("stage1", weights / "stage1" / "export", True)):
        transformer = load_transformer(str(folder)).eval()
        pipeline = RefAlignPipeline.from_pretrained(str(weights / "wan"), transformer=transformer)
        pipeline.set_progress_bar_config(disable=True)
        cases = make_benchmark(per_tier)
        with TemporaryDirectory() as aside:
            places = Path(aside) / "clips.jsonl", Path(aside) / "strips"
            records = run_benchmark(
                pipeline, weights / "judges", cases if with_references else without_references(cases), places[0], keep=places[1]
            )
            if sheets:
                chosen = np.linspace(0, len(cases) - 1, min(SHEET_CLIPS, len(cases))).round().astype(int)
                strips = [np.asarray(Image.open(places[1] / f"{cases[number].key}.png")) for number in chosen]
                save_sheet(strips, sheets / f"{name}.png", columns=2)
        yield name, summarise(records)


def draw_identities(count: int) -> list[np.ndarray]:
    """References of held-out identities in all poses: uint8 [96, 96, 3] each."""
    rng = np.random.default_rng(1)
    identities = [sample_identity(rng, "heldout") for _ in range(count)]
    return [render_reference(identity, POSES[number % len(POSES)]) for number, identity in enumerate(identities)]


def save_sheet(pictures: list[np.ndarray], path: Path, *, columns: int) -> None:
    """Lays pictures out row by row on white and writes a PNG."""
    height, width = (max(picture.shape[axis] for picture in pictures) for axis in (0, 1))
    sheet = np.full((-(-len(pictures) // columns) * height, columns * width, 3), 255, np.uint8)
    for number, picture in enumerate(pictures):
        row, column = divmod(number, columns)
        sheet[row * height :, column * width :][: picture.shape[0], : picture.shape[1]] = picture
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=WEIGHTS_FOLDER)
    parser.add_argument("--items", type=int, default=100, help="held-out pictures, clips or identities a figure")
    parser.add_argument("--per-tier", type=int, default=8, help="generated clips of one subject, and of two and three per tier")
    parser.add_argument("--sheets", type=Path, help="folder for contact sheets of identities and generated clips")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.sheets:
        save_sheet(draw_identities(SHEET_IDENTITIES), arguments.sheets / "identities.png", columns=SHEET_COLUMNS)
    for model, figures in measure_weights(arguments.weights, arguments.items):
        print(f"{model:28s} " + "  ".join(f"{name} {value:.3f}" for name, value in figures.items()), flush=True)
    if arguments.per_tier:
        for model, figures in measure_models(arguments.weights, arguments.per_tier, arguments.sheets):
            print(model, *(f"  {name:32s} {value:.3f}" for name, value in figures.items()), sep="\n", flush=True)


if __name__ == "__main__":
    main()
