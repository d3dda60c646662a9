"""The toy benchmark's run: clips of held-out subjects, made by a model, scored, and kept as one line each of ``clips.jsonl``."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from refalign.config.presets import load_preset
from refalign.toy.drawing import FRAME_HEIGHT_PX, FRAME_WIDTH_PX
from refalign.toy.scenes import NUM_FRAMES
from workshop.judging.cases import Case, shuffle_references
from workshop.judging.scoring import Record, score_clip

OPTIONS = load_preset("toy").evaluation.model_dump(include={"num_inference_steps", "guidance_scale", "reference_guidance_scale"})
"""Of generation, as the toy preset has them."""
BATCH = 8


def iter_generated(pipeline: Any, cases: Sequence[Case], options: dict[str, float]) -> Iterator[np.ndarray]:
    """Clips uint8 [F, H, W, 3] of the cases, in order; neighbours with equally many references are made together.

    Args:
        pipeline: `refalign.generation.pipeline.RefAlignPipeline`.
    """
    for size, alike in itertools.groupby(cases, key=lambda case: len(case.given)):
        group = list(alike)
        for start in range(0, len(group), BATCH):
            batch = group[start : start + BATCH]
            videos = pipeline(
                [case.prompt for case in batch],
                [case.references for case in batch] if size else [],
                generator=[torch.Generator().manual_seed(case.seed) for case in batch],
                output_type="uint8",
                height=FRAME_HEIGHT_PX,
                width=FRAME_WIDTH_PX,
                num_frames=NUM_FRAMES,
                **options,
            )
            yield from videos.frames.cpu().numpy()


def run_benchmark(
    pipeline: Any, cases: Sequence[Case], file: Path, *, options: dict[str, float] | None = None, keep: Path | None = None
) -> list[Record]:
    """Makes and scores what is not yet in ``file``, a line per clip; returns all records in the order of the cases.

    Args:
        options: of generation, over those of the preset.
        keep: folder for one picture per clip: its references and three of its frames.
    """
    done = {record["key"]: record for record in _read_lines(file)}
    todo = [case for case in cases if case.key not in done]
    others = {case.key: other for case, other in zip(cases, shuffle_references(cases), strict=True) if case.given}
    file.parent.mkdir(parents=True, exist_ok=True)
    for case, clip in zip(todo, iter_generated(pipeline, todo, OPTIONS | (options or {})), strict=True):
        done[case.key] = score_clip(case, clip, others.get(case.key))
        if keep:
            keep.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.concatenate([*case.references, *clip[::4]], 1)).save(keep / f"{case.key}.png")
        with file.open("a") as lines:
            lines.write(json.dumps(done[case.key]) + "\n")
    return [done[case.key] for case in cases]


def _read_lines(file: Path) -> list[Record]:
    """The whole lines. A last line that a kill has cut off is taken out of the file: its clip is made again."""
    if not file.is_file():
        return []
    text = file.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        file.write_text(whole)
    return [json.loads(line) for line in whole.splitlines()]
