"""The toy benchmark: clips of held-out subjects, made by a model and read by the judge, against what is known of them.

Prompts have one, two and three subjects, pairs in three tiers of likeness. Hidden attributes (what no prompt says) are
*fidelity*; they can only come from the references. A clip is a line of ``clips.jsonl`` and is made once.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from refalign.evaluation.confusion import CONFUSED, FATES, find_fates
from refalign.presets import load_preset
from refalign.toy.cases import Case, shuffle_references
from refalign.toy.drawing import FRAME_HEIGHT_PX, FRAME_WIDTH_PX
from refalign.toy.identities import HIDDEN_ATTRIBUTES, SPOKEN_ATTRIBUTES, attributes_of
from refalign.toy.judge import Reading, is_occupied, read_clip
from refalign.toy.scenes import NUM_FRAMES, SIDES

OPTIONS = load_preset("toy").evaluation.model_dump(include={"num_inference_steps", "guidance_scale", "reference_guidance_scale"})
"""Of generation, as the toy preset has them."""
EXPECTED_FATES = {
    "truth": ["own", "own"],
    "swap": ["swap", "swap"],
    "dominance": ["own", "dominance"],
    "blending": ["own", "blending"],
}
Record = dict[str, Any]


def iter_generated(pipeline: Any, cases: Sequence[Case], options: dict[str, Any], batch: int = 8) -> Iterator[np.ndarray]:
    """Clips uint8 [F, H, W, 3] of the cases, in order; neighbours with equally many references are made together."""
    start = 0
    while start < len(cases):
        size = len(cases[start].given)
        stop = start
        while stop < len(cases) and stop < start + batch and len(cases[stop].given) == size:
            stop += 1
        group = cases[start:stop]
        videos = pipeline(
            [case.prompt for case in group],
            [case.references for case in group] if size else [],
            height=FRAME_HEIGHT_PX,
            width=FRAME_WIDTH_PX,
            num_frames=NUM_FRAMES,
            generator=[torch.Generator().manual_seed(case.seed) for case in group],
            output_type="uint8",
            **options,
        )
        yield from videos.frames.cpu().numpy()
        start = stop


def score_clip(case: Case, clip: np.ndarray, other: Case | None = None) -> Record:
    """What one clip shows of its case; plain values.

    Per subject: shown (attribute -> value as read; None: nobody stands there), right (attributes and action as wanted), chance
    (hidden attributes that agree with ``other``). Of the clip: extra (slots that somebody fills unasked), fates
    (`refalign.evaluation.confusion`), copy_paste (the reference's action in place of the asked one, from -1 to 1).

    Args:
        other: the case with another's hidden looks (`refalign.toy.cases.shuffle_references`), whose fidelity is chance.
    """
    subjects = case.plan.subjects
    cast = [subject.identity for subject in subjects]
    seen = read_clip(clip, {subject.side: [subject.identity, *cast] for subject in subjects})
    readings = [seen[subject.side] for subject in subjects]
    wanted = [{**asdict(attributes_of(subject.identity)), "action": subject.action} for subject in subjects]
    record: Record = {
        "key": case.key,
        "subjects": len(subjects),
        "likeness": case.plan.likeness,
        "named": [subject.named for subject in subjects],
        "shown": [reading and reading.answers for reading in readings],
        "right": [_compare(*pair) for pair in zip(readings, wanted, strict=True)],
        "unexplained": [reading and round(reading.unexplained, 3) for reading in readings],
        "extra": sum(is_occupied(clip, side) for side in SIDES if side not in seen),
    }
    if case.given:
        hidden = [[each[name] for name in HIDDEN_ATTRIBUTES] for each in wanted]
        shown = [[each.answers[name] for name in HIDDEN_ATTRIBUTES] if each else None for each in readings]
        record["fates"] = find_fates(shown, hidden)
        pairs = zip(readings, subjects, case.given, strict=True)
        record["copy_paste"] = [
            reading and float(np.mean([(each == pose.action) - (each == subject.action) for each in reading.moments]))
            for reading, subject, pose in pairs
        ]
    if other is not None:
        theirs = [asdict(attributes_of(subject.identity)) for subject in other.plan.subjects]
        record["chance"] = [_compare(*pair) for pair in zip(readings, theirs, strict=True)]
    return record


def _compare(reading: Reading | None, wanted: dict[str, str]) -> dict[str, bool]:
    return {name: reading is not None and reading.answers[name] == value for name, value in wanted.items()}


def run_benchmark(
    pipeline: Any, cases: Sequence[Case], file: Path, *, options: dict[str, Any] | None = None, keep: Path | None = None
) -> list[Record]:
    """Makes and scores what is not yet in ``file``, a line per clip; returns all records in the order of the cases.

    Args:
        keep: folder for one picture per clip: its references and three of its frames.
    """
    done = {record["key"]: record for record in _read_lines(file)}
    todo = [case for case in cases if case.key not in done]
    others = {case.key: other for case, other in zip(cases, shuffle_references(cases), strict=True) if case.given}
    file.parent.mkdir(parents=True, exist_ok=True)
    for case, clip in zip(todo, iter_generated(pipeline, todo, OPTIONS | (options or {})), strict=True):
        done[case.key] = score_clip(case, clip, others.get(case.key))
        if keep:
            save_strip(case, clip, keep / f"{case.key}.png")
        with file.open("a") as lines:
            lines.write(json.dumps(done[case.key]) + "\n")
    return [done[case.key] for case in cases]


def save_strip(case: Case, clip: np.ndarray, path: Path) -> None:
    """References and every fourth frame of a clip, side by side."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate([*case.references, *clip[::4]], 1)).save(path)


def _read_lines(file: Path) -> list[Record]:
    """Whole lines; the last one may have been cut off by a kill and is made again."""
    if not file.is_file():
        return []
    text = file.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        file.write_text(whole)
    return [json.loads(line) for line in whole.splitlines()]


def summarise(records: Sequence[Record]) -> dict[str, float]:
    """Means over subjects: fidelity and its chance by number of subjects, tier and attribute; what was said; fates."""
    values: dict[str, list[float]] = defaultdict(list)
    for record in records:
        size, tier = f"of {record['subjects']}", record["likeness"] or "alone"
        for place, right in enumerate(record["right"]):
            values["found"].append(float(record["shown"][place] is not None))
            values["action"].append(right["action"])
            for name in SPOKEN_ATTRIBUTES if record["named"][place] else ():
                for key in ("spoken", f"spoken {size}", name):
                    values[key].append(right[name])
            if "fates" not in record:
                continue
            for name in HIDDEN_ATTRIBUTES:
                for key in ("fidelity", f"fidelity {size}", f"fidelity {name}", f"fidelity, {tier}"):
                    values[key].append(right[name])
                if "chance" in record:
                    for key in ("chance", f"chance {size}", f"chance {name}"):
                        values[key].append(record["chance"][place][name])
            if (pasted := record["copy_paste"][place]) is not None:
                values["copy_paste"].append(pasted)
        values["number"].append(float(not record["extra"] and all(record["shown"])))
        if "fates" in record and record["subjects"] > 1:
            for fate in record["fates"]:
                for key in ("", f", {tier}"):
                    values[f"confusion{key}"].append(fate in CONFUSED)
                    for each in FATES:
                        values[f"fate {each}{key}"].append(fate == each)
    return {"clips": len(records), **{name: round(float(np.mean(each)), 4) for name, each in sorted(values.items())}}
