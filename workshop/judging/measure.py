"""Every held-out figure of the shipped toy weights, with its chance beside it; the sheets to look at.

uv run -m workshop.judging.measure [--parts vae vision detector judge base stage1 twin] [--per-tier 24] [--items 200]
uv run -m workshop.judging.measure --parts stage1 --export runs/toy/export --output runs/mine      # an export of your own

Identities, scenes and seeds are none that a training script draws from. A generated clip is a line of ``clips.jsonl`` in
``--output`` and is made once. Parts that are not asked for keep their last result.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.recording import describe_machine, write_result
from refalign.io.images import make_contact_sheet
from refalign.models.vae import VideoVAE
from refalign.models.yolo import Detections, load_detector
from refalign.toy import WEIGHTS_FOLDER
from refalign.toy.drawing import ACTIONS, FRAME_HEIGHT_PX, FRAME_WIDTH_PX, Pose
from refalign.toy.identities import HIDDEN_ATTRIBUTES, attributes_of, sample_identity
from refalign.toy.rendering import render_references, render_scenes
from refalign.toy.scenes import make_scene
from workshop.judging import vision as toy_vision
from workshop.judging.cases import (
    FAULTS,
    Case,
    Fault,
    draw_case,
    exchange_references,
    make_benchmark,
    mislead,
    recast_for,
    without_references,
)
from workshop.judging.clips import run_benchmark
from workshop.judging.confusion import find_fates
from workshop.judging.scoring import score_clip, summarise
from workshop.weights.initial_weights import make_vision_encoder
from workshop.weights.sampling import FrameTruth, sample_clutter, sample_frames, sample_references

Figures = dict[str, float]
PARTS = ("vae", "vision", "detector", "judge", "base", "stage1", "twin")
EXPECTED_FATES = {
    "truth": ["own", "own"],
    "swap": ["swap", "swap"],
    "dominance": ["own", "dominance"],
    "blending": ["own", "blending"],
}
VAE_SEED, DETECTOR_SEED = 31, 21
SHEET_CASES, SHEET_IDENTITIES, SHEET_COLUMNS = 24, 60, 12
MOVING_CASES, MOVING_SCALE, MOVING_MS = 4, 3, 400


def measure_vae(vae: VideoVAE, count: int) -> Figures:
    """PSNR (dB of uint8 values, averaged over items): clips and single references."""
    clips = [shot.frames for shot in render_scenes([make_scene([VAE_SEED, n], split="heldout") for n in range(count)])]
    references = sample_references(VAE_SEED, range(count), "heldout")
    return {
        "clip_psnr_db": float(np.mean([_psnr(vae, clip) for clip in clips])),
        "reference_psnr_db": float(np.mean([_psnr(vae, picture[None]) for picture in references])),
    }


def _psnr(vae: VideoVAE, frames: np.ndarray) -> float:
    back = vae.decode(vae.encode(torch.from_numpy(frames)[None]))[0].numpy()
    return float(10 * np.log10(255**2 / np.square(back.astype(float) - frames).mean()))


def measure_detector(folder: Path, count: int) -> Figures:
    """Box recall at IoU .5, mean mask IoU of the matched, and the share of detections that match nothing."""
    detector = load_detector(folder)
    truths = sample_frames(DETECTOR_SEED, range(count), "heldout", min_visible=0.3, later=True)
    found = detector.detect(np.stack([truth.frame for truth in truths]))
    scores = [match_frame(truth, detections) for truth, detections in zip(truths, found, strict=True)]
    subjects, matched = sum(len(truth.masks) for truth in truths), [iou for ious in scores for iou in ious]
    detections = sum(len(frame) for frame in found)
    clutter = detector.detect(np.stack([sample_clutter(DETECTOR_SEED, number).frame for number in range(count)]))
    return {
        "box_recall_at_50": len(matched) / subjects,
        "mask_iou": float(np.mean(matched)) if matched else 0.0,
        "false_share": (detections - len(matched)) / max(1, detections),
        "highest_score_on_clutter": max((float(frame.scores.max()) for frame in clutter if len(frame)), default=0.0),
    }


def match_frame(truth: FrameTruth, detections: Detections, *, min_iou: float = 0.5) -> list[float]:
    """Mask IoUs of the subjects whose box is met at ``min_iou``; each detection serves one subject, best score first."""
    ious, free = [], list(range(len(truth.masks)))
    for box, mask in zip(detections.boxes_xyxy_px, detections.masks, strict=True):
        overlaps = [_box_iou(box, truth.boxes_xyxy_px[number]) for number in free]
        if overlaps and max(overlaps) >= min_iou:
            number = free.pop(int(np.argmax(overlaps)))
            ious.append(float((mask & truth.masks[number]).sum() / (mask | truth.masks[number]).sum()))
    return ious


def _box_iou(first: np.ndarray, second: np.ndarray) -> float:
    inner = np.maximum(np.minimum(first[2:], second[2:]) - np.maximum(first[:2], second[:2]), 0).prod()
    return float(inner / ((first[2:] - first[:2]).prod() + (second[2:] - second[:2]).prod() - inner))


def measure_judge(
    per_tier: int, transform: Callable[[np.ndarray], np.ndarray] = lambda clip: clip, faults: Sequence[Fault] = FAULTS
) -> dict[str, Figures]:
    """How the judge reads clips drawn right and drawn wrong, of identities that no training draws.

    Args:
        transform: applied to the clips, for example the round trip through the VAE.
    """
    results = {}
    for fault in faults:
        cases = [case for case in make_benchmark(per_tier, split="judges") if _shows(case, fault)]
        records = [score_clip(case, transform(draw_case(case, fault))) for case in cases]
        right = [value for record in records for each in record["right"] for value in each.values()]
        results[fault] = {"clips": len(cases), "caught": _caught(fault, records), "attributes_right": float(np.mean(right))}
    return results


def _shows(case: Case, fault: Fault) -> bool:
    """Whether the fault can be drawn in a case: colours that a body cannot wear are not exchanged."""
    if fault in ("truth", "paste"):
        return True
    if len(case.plan.subjects) != 2:
        return False
    drawn, wanted = (
        [[getattr(attributes_of(each.identity), name) for name in HIDDEN_ATTRIBUTES] for each in plan.subjects]
        for plan in (recast_for(case, fault).plan, case.plan)
    )
    return find_fates(drawn, wanted) == EXPECTED_FATES[fault]


def _caught(fault: Fault, records: list[dict[str, Any]]) -> float:
    """Share of clips in which the fault was named for what it is; of clips drawn right, in which nothing is wrong."""
    if fault == "paste":
        return float(np.mean([all((each or 0) > 0 for each in record["copy_paste"]) for record in records]))
    if fault == "truth":
        return float(np.mean([all(all(each.values()) for each in record["right"]) for record in records]))
    return float(np.mean([record["fates"] == EXPECTED_FATES[fault] for record in records]))


def measure_transformer(transformer: Path, runs: dict[str, list[Case]], output: Path, weights: Path) -> dict[str, Figures]:
    """What the judge sees in a Transformer's clips of each list of cases."""
    from refalign.generation.pipeline import RefAlignPipeline
    from refalign.models.wan import load_transformer

    pipeline = RefAlignPipeline.from_pretrained(str(weights / "wan"), transformer=load_transformer(str(transformer)).eval())
    pipeline.set_progress_bar_config(disable=True)
    return {
        name: summarise(run_benchmark(pipeline, cases, output / name / "clips.jsonl", keep=output / name / "strips"))
        for name, cases in runs.items()
    }


def save_sheet(pictures: list[np.ndarray], path: Path, *, columns: int) -> None:
    """Lays pictures out row by row on white and writes a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(_lay_out(pictures, columns)).save(path)


def _lay_out(pictures: list[np.ndarray], columns: int) -> np.ndarray:
    rows = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
    return make_contact_sheet(rows, FRAME_HEIGHT_PX, gap_px=0)


def draw_identities(count: int) -> list[np.ndarray]:
    """References of held-out identities in all actions, as wide as high: uint8 [48, 48, 3] each."""
    rng = np.random.default_rng(1)
    identities = [sample_identity(rng, "heldout") for _ in range(count)]
    pictures = render_references(identities, [Pose(ACTIONS[number % len(ACTIONS)]) for number in range(count)])
    return [*pictures[:, :, 16 : 16 + FRAME_HEIGHT_PX]]


def split_strip(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """A strip as (references side by side on room for three [48, 144, 3], frames [3, 48, 80, 3])."""
    strip = np.asarray(Image.open(file).convert("RGB"))
    frames, references = strip[:, -3 * FRAME_WIDTH_PX :], strip[:, : -3 * FRAME_WIDTH_PX]
    shown = np.full((FRAME_HEIGHT_PX, 3 * FRAME_HEIGHT_PX, 3), 255, np.uint8)
    for number in range(references.shape[1] // FRAME_WIDTH_PX):
        picture = references[:, FRAME_WIDTH_PX * number :][:, 16 : 16 + FRAME_HEIGHT_PX]
        shown[:, FRAME_HEIGHT_PX * number :][:, :FRAME_HEIGHT_PX] = picture
    return shown, np.stack(np.split(frames, 3, axis=1))


def save_pictures(results: Path, folder: Path) -> None:
    """A sheet of cases spread over all tiers, not chosen; the best four, moving; a sheet of identities."""
    files = sorted((results / "strips").glob("*.png"))
    spread = [split_strip(files[int(at)]) for at in np.linspace(0, len(files) - 1, min(SHEET_CASES, len(files))).round()]
    sheet = [np.concatenate([references, *frames], 1) for references, frames in spread]
    save_sheet(sheet, folder / "toy_stage1.png", columns=2)
    save_sheet(draw_identities(SHEET_IDENTITIES), folder / "toy_identities.png", columns=SHEET_COLUMNS)
    records = [json.loads(line) for line in (results / "clips.jsonl").read_text().splitlines()]

    def faults(record: dict[str, Any]) -> tuple[int, float]:
        wrong = sum(not value for each in record["right"] for value in each.values())
        return wrong, sum(each or 1.0 for each in record["unexplained"])

    best = sorted((record for record in records if record["subjects"] > 1), key=faults)[:MOVING_CASES]
    parts = [split_strip(results / "strips" / f"{record['key']}.png") for record in best]
    moments = [
        Image.fromarray(_lay_out([np.concatenate([references, frames[at]], 1) for references, frames in parts], 2))
        for at in (0, 1, 2, 1)
    ]
    size = (MOVING_SCALE * moments[0].width, MOVING_SCALE * moments[0].height)
    first, *others = (moment.resize(size, Image.Resampling.NEAREST) for moment in moments)
    first.save(folder / "toy_best.webp", save_all=True, append_images=others, duration=MOVING_MS, loop=0, lossless=True)


def measure(part: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures of one part."""
    from transformers import DINOv3ViTModel

    weights, items = arguments.weights, arguments.items
    if part == "detector":
        return measure_detector(weights / "detector", items)
    if part == "vision":
        trained = DINOv3ViTModel.from_pretrained(weights / "dinov3", dtype=torch.float32)
        return {
            "trained": toy_vision.evaluate(trained, items),
            "random_init": toy_vision.evaluate(make_vision_encoder(), items),
            "raw_pixels": toy_vision.evaluate_pixels(items),
        }
    vae = VideoVAE.from_pretrained(str(weights / "wan"))
    if part == "vae":
        return measure_vae(vae, items)
    if part == "judge":

        def pass_through(clip: np.ndarray) -> np.ndarray:
            return vae.decode(vae.encode(torch.from_numpy(clip)[None]))[0].numpy()

        through = measure_judge(arguments.per_tier, pass_through, ("truth",))["truth"]
        return measure_judge(arguments.per_tier) | {"truth_through_the_vae": through}
    cases = make_benchmark(arguments.per_tier)
    if part == "base":
        return measure_transformer(weights / "wan", {"base": without_references(cases)}, arguments.output, weights)["base"]
    folder = arguments.export or weights / part / "export"
    runs = {part: cases}
    if part == "stage1":
        runs |= {"shuffled": mislead(cases), "exchanged": exchange_references(cases)}
    return measure_transformer(folder, runs, arguments.output, weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what is measured (default: all)")
    parser.add_argument("--weights", type=Path, default=WEIGHTS_FOLDER)
    parser.add_argument("--export", type=Path, help="an export of your own in place of the shipped stage1")
    parser.add_argument("--items", type=int, default=200, help="held-out pictures, clips or identities a figure")
    parser.add_argument(
        "--per-tier",
        type=int,
        default=26,
        help="clips of two and three subjects in each tier; twice as many of one (default: 26)",
    )
    parser.add_argument("--output", type=Path, default=Path("runs/toy_models"), help="generated clips and what was read in them")
    arguments = parser.parse_args()
    machine = describe_machine()
    torch.set_num_threads(1)
    results = Path(__file__).parents[2] / "benchmarks" / "results" / "toy_models.json"
    kept = json.loads(results.read_text()) if results.is_file() and not arguments.export else {}
    figures = {part: kept[part] for part in PARTS if part in kept}
    for part in arguments.parts:
        figures[part] = measure(part, arguments)
        print(part, json.dumps(figures[part], indent=1), flush=True)
    if arguments.export:
        return
    write_result("toy_models", figures, machine)
    if "stage1" in arguments.parts:
        save_pictures(arguments.output / "stage1", Path(__file__).parents[2] / "benchmarks" / "pictures")


if __name__ == "__main__":
    main()
