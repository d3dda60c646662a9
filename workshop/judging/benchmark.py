"""The toy benchmark: clips of a model, what the judge reads in them, a line of ``clips.jsonl`` each; and the means over them.

Hidden attributes, which no prompt says, are *fidelity*: they can only come from the references.
"""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np
import torch
from PIL import Image

from refalign.config.presets import load_preset
from refalign.toy.drawing import FRAME_HEIGHT_PX, FRAME_WIDTH_PX
from refalign.toy.identities import HIDDEN_ATTRIBUTES, SPOKEN_ATTRIBUTES, Likeness, attributes_of
from refalign.toy.judge import Reading, is_occupied, read_clip
from refalign.toy.scenes import NUM_FRAMES, SIDES
from workshop.judging.cases import Case, shuffle_references
from workshop.judging.confusion import CONFUSED, FATES, Fate, find_fates

OPTIONS = load_preset("toy").evaluation.model_dump(include={"num_inference_steps", "guidance_scale", "reference_guidance_scale"})
"""Of generation, as the toy preset has them."""
BATCH = 8


class Record(TypedDict):
    """What one clip shows of its case; a line of ``clips.jsonl``. Lists hold a value per subject."""

    key: str
    subjects: int  # their number
    likeness: Likeness | None
    named: list[bool]  # the prompt says shape and colour
    shown: list[dict[str, str | None] | None]  # attribute -> value as read; None: nobody stands there
    right: list[dict[str, bool]]  # attribute or "action" -> as wanted
    unexplained: list[float | None]  # of `refalign.toy.judge.Reading`
    extra: int  # slots that somebody fills unasked
    # the rest only with references
    fates: NotRequired[list[Fate]]
    copy_paste: NotRequired[list[float | None]]  # the reference's action instead of the asked one, from -1 to 1
    chance: NotRequired[list[dict[str, bool]]]  # attribute -> as in another case


def iter_generated(pipeline: Any, cases: Sequence[Case], options: dict[str, float]) -> Iterator[np.ndarray]:
    """Clips uint8 [F, H, W, 3] of the cases, in order; neighbours with equally many references are made together."""
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


def score_clip(case: Case, clip: np.ndarray, other: Case | None = None) -> Record:
    """What one clip, uint8 [F, H, W, 3], shows of its case; ``other``, of `shuffle_references`, gives the chance."""
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
        "shown": [reading.answers if reading else None for reading in readings],
        "right": [_compare(*pair) for pair in zip(readings, wanted, strict=True)],
        "unexplained": [round(reading.unexplained, 3) if reading else None for reading in readings],
        "extra": sum(is_occupied(clip, side) for side in SIDES if side not in seen),
    }
    if case.given:
        hidden = [[each[name] for name in HIDDEN_ATTRIBUTES] for each in wanted]
        shown = [[each.answers[name] for name in HIDDEN_ATTRIBUTES] if each else None for each in readings]
        record["fates"] = find_fates(shown, hidden)
        record["copy_paste"] = [
            float(np.mean([(each == pose.action) - (each == subject.action) for each in reading.moments])) if reading else None
            for reading, subject, pose in zip(readings, subjects, case.given, strict=True)
        ]
    if other is not None:
        theirs = [asdict(attributes_of(subject.identity)) for subject in other.plan.subjects]
        record["chance"] = [_compare(*pair) for pair in zip(readings, theirs, strict=True)]
    return record


def _compare(reading: Reading | None, wanted: dict[str, str]) -> dict[str, bool]:
    return {name: reading is not None and reading.answers[name] == value for name, value in wanted.items()}


def summarise(records: Sequence[Record]) -> dict[str, float]:
    """Means over subjects: fidelity and its chance by number of subjects, tier and attribute; spoken attributes; fates."""
    values: dict[str, list[float]] = defaultdict(list)
    for record in records:
        size, tier = f"of {record['subjects']}", record["likeness"] or "alone"
        for place, right in enumerate(record["right"]):
            values["found"].append(record["shown"][place] is not None)
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
        values["number"].append(not record["extra"] and all(record["shown"]))
        if "fates" in record and record["subjects"] > 1:
            for fate in record["fates"]:
                for key in ("", f", {tier}"):
                    values[f"confusion{key}"].append(fate in CONFUSED)
                    for each in FATES:
                        values[f"fate {each}{key}"].append(fate == each)
    return {"clips": len(records), **{name: round(float(np.mean(each)), 4) for name, each in sorted(values.items())}}
