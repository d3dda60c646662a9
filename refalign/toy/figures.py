"""Prints every held-out figure of the shipped weights, one line a model; draws the sheets to look at.

    python -m refalign.toy.figures [--weights refalign/toy/weights] [--items 100] [--per-tier 24] [--sheets runs/sheets]

Identities, scenes and seeds are none that a training script draws from. What was measured before and lies in ``--work`` is not
measured again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from refalign.toy import WEIGHTS_FOLDER, measure_vision, train_detector, train_vae
from refalign.toy.benchmark import measure_judge, run_benchmark, summarise
from refalign.toy.cases import Case, exchange_references, make_benchmark, mislead, without_references
from refalign.toy.drawing import ACTIONS, FRAME_HEIGHT_PX, Pose
from refalign.toy.identities import sample_identity
from refalign.toy.initial_weights import make_vision_encoder
from refalign.toy.rendering import render_references

Figures = dict[str, float]
SHEET_IDENTITIES, SHEET_COLUMNS, SHEET_CASES = 60, 12, 24


def measure_weights(weights: Path, items: int) -> Iterator[tuple[str, Figures]]:
    """(model, figures), each over ``items`` held-out pictures, clips or identities."""
    from transformers import DINOv3ViTModel

    yield "detector", train_detector.evaluate(weights / "detector", items)
    vae = train_vae.load_vae(weights / "wan" / "vae")
    yield "vae", train_vae.evaluate(vae, items)
    vision = DINOv3ViTModel.from_pretrained(weights / "dinov3", dtype=torch.float32)
    yield "vision encoder", measure_vision.evaluate(vision, items)
    yield "vision encoder, random init", measure_vision.evaluate(make_vision_encoder(), items)
    yield "raw pixels in its place", measure_vision.evaluate_pixels(items)

    def pass_through(clip: np.ndarray) -> np.ndarray:
        return vae.decode(vae.encode(torch.from_numpy(clip)[None]))[0].numpy()

    per_tier = max(1, items // 12)
    for fault, figures in measure_judge(per_tier).items():
        yield f"judge on {fault} clips", figures
    yield "judge on clips through the vae", measure_judge(per_tier, pass_through, ("truth",))["truth"]


def measure_models(weights: Path, per_tier: int, work: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(model, what the judge sees in its clips): the base from text; stage 1 with its references, with others', exchanged."""
    from refalign.generation import RefAlignPipeline
    from refalign.models.wan import load_transformer

    cases = make_benchmark(per_tier)
    runs: dict[str, tuple[str, list[Case]]] = {
        "base": ("wan", without_references(cases)),
        "stage1": ("stage1/export", cases),
        "stage1, shuffled references": ("stage1/export", mislead(cases)),
        "stage1, exchanged references": ("stage1/export", exchange_references(cases)),
    }
    for name, (folder, chosen) in runs.items():
        transformer = load_transformer(str(weights / folder)).eval()
        pipeline = RefAlignPipeline.from_pretrained(str(weights / "wan"), transformer=transformer)
        pipeline.set_progress_bar_config(disable=True)
        place = work / name.replace(", ", "_").replace(" ", "_")
        records = run_benchmark(pipeline, chosen, place / "clips.jsonl", keep=place / "strips")
        yield name, summarise(records)


def save_sheet(pictures: list[np.ndarray], path: Path, *, columns: int) -> None:
    """Lays pictures out row by row on white and writes a PNG."""
    height, width = (max(picture.shape[axis] for picture in pictures) for axis in (0, 1))
    sheet = np.full((-(-len(pictures) // columns) * height, columns * width, 3), 255, np.uint8)
    for number, picture in enumerate(pictures):
        row, column = divmod(number, columns)
        sheet[row * height :, column * width :][: picture.shape[0], : picture.shape[1]] = picture
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(path)


def draw_identities(count: int) -> list[np.ndarray]:
    """References of held-out identities in all actions, as wide as high: uint8 [48, 48, 3] each."""
    rng = np.random.default_rng(1)
    identities = [sample_identity(rng, "heldout") for _ in range(count)]
    pictures = render_references(identities, [Pose(ACTIONS[number % len(ACTIONS)]) for number in range(count)])
    return [*pictures[:, :, 16 : 16 + FRAME_HEIGHT_PX]]


def draw_results(strips: Path, count: int) -> list[np.ndarray]:
    """Strips of references and frames, those of one, two and three subjects alike often, all as wide."""
    files = sorted(strips.glob("*.png"))
    chosen = [files[number] for number in np.linspace(0, len(files) - 1, min(count, len(files))).round().astype(int)]
    pictures = []
    for strip in (np.asarray(Image.open(file)) for file in chosen):
        frames, references = strip[:, -3 * 80 :], strip[:, : -3 * 80]
        shown = np.full((strip.shape[0], 3 * 48, 3), 255, np.uint8)
        for number in range(references.shape[1] // 80):
            shown[:, 48 * number : 48 * (number + 1)] = references[:, 80 * number + 16 : 80 * number + 64]
        pictures.append(np.concatenate([shown, frames], 1))
    return pictures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=WEIGHTS_FOLDER)
    parser.add_argument("--items", type=int, default=100, help="held-out pictures, clips or identities a figure")
    parser.add_argument("--per-tier", type=int, default=24, help="generated clips of two and three subjects in each tier")
    parser.add_argument("--sheets", type=Path, help="folder for contact sheets of identities and generated clips")
    parser.add_argument("--work", type=Path, default=Path("runs/toy_figures"), help="generated clips and what was read in them")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for model, figures in measure_weights(arguments.weights, arguments.items) if arguments.items else ():
        print(f"{model:32s} {json.dumps(figures)}", flush=True)
    for model, figures in measure_models(arguments.weights, arguments.per_tier, arguments.work) if arguments.per_tier else ():
        print(model, *(f"  {name:40s} {value:.3f}" for name, value in figures.items()), sep="\n", flush=True)
    if arguments.sheets:
        save_sheet(draw_identities(SHEET_IDENTITIES), arguments.sheets / "identities.png", columns=SHEET_COLUMNS)
        results = draw_results(arguments.work / "stage1" / "strips", SHEET_CASES)
        save_sheet(results, arguments.sheets / "stage1.png", columns=2)


if __name__ == "__main__":
    main()
