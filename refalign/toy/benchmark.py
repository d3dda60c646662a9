"""The sprite benchmark: clips of held-out subjects, made by a model and read by the judges, against what is known of them.

    python -m refalign.toy.benchmark --model runs/toy/train-.../export --per-tier 16 --output runs/benchmark
    python -m refalign.toy.benchmark --judges-only --per-tier 50    # do the judges see what was drawn wrong on purpose?

Prompts have one, two and three subjects, pairs in three tiers of likeness. Hidden attributes (what no prompt says) are
*fidelity*; they can only come from the references. A clip is a line of ``clips.jsonl`` and is made once.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from refalign.evaluation.confusion import CONFUSED
from refalign.presets import load_preset
from refalign.toy import WEIGHTS_FOLDER
from refalign.toy.cases import FAULTS, Case, Fault, draw_case, make_benchmark, shuffle_references, without_references
from refalign.toy.scenes import FRAME_SIZE_PX, NUM_FRAMES
from refalign.toy.scoring import Record, score_clip, summarise
from refalign.toy.seeing import Watcher

OPTIONS = load_preset("toy").evaluation.model_dump(include={"num_inference_steps", "guidance_scale", "reference_guidance_scale"})
"""Of generation, as the toy preset has them."""
EXPECTED_FATES = {
    "truth": ["own", "own"],
    "swap": ["swap", "swap"],
    "dominance": ["own", "dominance"],
    "blending": ["own", "blending"],
}


def iter_generated(pipeline: Any, cases: Sequence[Case], options: dict[str, Any], batch: int = 8) -> Iterator[np.ndarray]:
    """Clips uint8 [F, 96, 96, 3] of the cases, in order; neighbours with equally many references are made together."""
    start = 0
    while start < len(cases):
        size = len(cases[start].given)
        stop = start
        while stop < len(cases) and stop < start + batch and len(cases[stop].given) == size:
            stop += 1
        group = cases[start:stop]
        videos = pipeline(
            [case.prompt for case in group],
            [case.named_references for case in group] if size else [],
            height=FRAME_SIZE_PX,
            width=FRAME_SIZE_PX,
            num_frames=NUM_FRAMES,
            generator=[torch.Generator().manual_seed(case.seed) for case in group],
            output_type="uint8",
            **options,
        )
        yield from videos.frames.cpu().numpy()
        start = stop


def run_benchmark(
    pipeline: Any,
    judges: Path,
    cases: Sequence[Case],
    file: Path,
    *,
    options: dict[str, Any] | None = None,
    keep: Path | None = None,
) -> list[Record]:
    """Makes and scores what is not yet in ``file``, a line per clip; returns all records in the order of the cases.

    Args:
        keep: folder for one picture per clip: its references and three of its frames.
    """
    done = {record["key"]: record for record in _read_lines(file)}
    todo = [case for case in cases if case.key not in done]
    others = {case.key: other for case, other in zip(cases, shuffle_references(cases), strict=True) if case.given}
    watcher = Watcher.load(judges)
    file.parent.mkdir(parents=True, exist_ok=True)
    for case, clip in zip(todo, iter_generated(pipeline, todo, OPTIONS | (options or {})), strict=True):
        done[case.key] = score_clip(case, clip, watcher.watch(clip), others.get(case.key))
        if keep:
            save_strip(case, clip, keep / f"{case.key}.png")
        with file.open("a") as lines:
            lines.write(json.dumps(done[case.key]) + "\n")
    return [done[case.key] for case in cases]


def save_strip(case: Case, clip: np.ndarray, path: Path) -> None:
    """References and every fourth frame of a clip, side by side."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate([*case.named_references, *clip[::4]], 1)).save(path)


def _read_lines(file: Path) -> list[Record]:
    """Whole lines; the last one may have been cut off by a kill and is made again."""
    if not file.is_file():
        return []
    text = file.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        file.write_text(whole)
    return [json.loads(line) for line in whole.splitlines()]


def measure_judges(
    judges: Path, per_tier: int, transform: Callable[[np.ndarray], np.ndarray] = lambda clip: clip
) -> dict[str, Record]:
    """How the judges read clips drawn right, scored against their own and against others' references, and drawn wrong.

    Args:
        transform: applied to the clips, for example the round trip through the VAE.
    """
    watcher = Watcher.load(judges)
    cases = [case for case in make_benchmark(per_tier) if len(case.plan.subjects) == 2]
    results: dict[str, Record] = {}
    for fault in FAULTS:
        clips = [draw_case(case, fault) for case in cases]
        clips = [transform(clip) for clip in clips] if transform is not None else clips
        seen = [watcher.watch(clip) for clip in clips]
        results[fault] = _caught(fault, [score_clip(*each) for each in zip(cases, clips, seen, strict=True)])
        if fault == "truth":
            shuffled = shuffle_references(cases)
            results["shuffled"] = summarise([score_clip(*each) for each in zip(shuffled, clips, seen, strict=True)])
    return results


def _caught(fault: Fault, records: list[Record]) -> Record:
    """The summary, with the share of clips in which the fault was seen, and that in which its kind was named right."""
    if fault == "paste":
        return {"caught": float(np.mean([(record["copy_paste"] or 0) > 0 for record in records])), **summarise(records)}
    named = [record["fates"] == EXPECTED_FATES[fault] for record in records]
    confused = [any(fate in CONFUSED for fate in record["fates"]) for record in records]
    return {
        "caught": float(np.mean(named if fault == "truth" else confused)),
        "named": float(np.mean(named)),
        **summarise(records),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="an exported folder")
    parser.add_argument("--judges", type=Path, default=WEIGHTS_FOLDER / "judges")
    parser.add_argument("--judges-only", action="store_true", help="measure the judges, not a model")
    parser.add_argument("--per-tier", type=int, default=16, help="clips of one subject, and of two and three in each tier")
    parser.add_argument("--text-only", action="store_true", help="without references, for a text-to-video model")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.judges_only:
        for name, figures in measure_judges(arguments.judges, arguments.per_tier).items():
            print(name, json.dumps(figures), flush=True)
        return
    from refalign.generation import RefAlignPipeline

    pipeline = RefAlignPipeline.from_pretrained(str(arguments.model))
    pipeline.set_progress_bar_config(disable=True)
    cases = make_benchmark(arguments.per_tier)
    cases = without_references(cases) if arguments.text_only else cases
    places = arguments.output / "clips.jsonl", arguments.output / "strips"
    records = run_benchmark(pipeline, arguments.judges, cases, places[0], keep=places[1])
    print(json.dumps(summarise(records), indent=1))


if __name__ == "__main__":
    main()
