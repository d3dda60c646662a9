"""Shards without some clips: their samples are left out, and so are pictures of them among other samples' references."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from refalign.io.images import SHEET_GAP_PX, decode_image, encode_jpeg, make_contact_sheet
from refalign.io.storage import open_file
from refalign.pipeline.steps import Step
from refalign.shards.launch import count_references, describe_samples
from refalign.shards.sample import SHEET_FRAMES, SHEET_PX, keep_references
from refalign.shards.writer import write_tar


def holds_clips(commit: dict[str, Any], clips: Collection[str]) -> bool:
    """Whether a shard has a sample of one of the clips, or a sample with a picture from one."""
    return any(_is_removed(sample, clips) or _refers_to(sample, clips) for sample in commit["samples"])


def rewrite_shard(step: Step, name: str, commit: dict[str, Any], clips: Collection[str], explain: Callable[[str], str]) -> None:
    """Writes the shard without the clips and commits it; samples that have nothing to do with them keep their bytes.

    Args:
        explain: what the outcome of a removed clip says.
    """
    kept = [sample for sample in commit["samples"] if not _is_removed(sample, clips)]
    index: dict[str, dict[str, Any]] = {}

    def samples() -> Iterator[tuple[str, dict[str, bytes]]]:
        with open_file(step.locate(name, commit)) as tar:
            for sample in kept:
                members = {suffix: _read(tar, *place[:2]) for suffix, place in sample["members"].items()}
                counts = {}
                if _refers_to(sample, clips):
                    members, counts = _remove_references(members, clips)
                index[sample["key"]] = {**sample, **counts}
                yield sample["key"], members

    def write(path: Path) -> dict[str, Any]:
        offsets = write_tar(path, samples())
        outcomes = [_close(outcome, clips, explain) for outcome in commit["outcomes"]]
        rewritten = [{**index[key], "members": offsets[key]} for key in offsets]
        return {**describe_samples(rewritten), "outcomes": outcomes}

    step.rewrite_part(name, commit, write)


def _is_removed(sample: dict[str, Any], clips: Collection[str]) -> bool:
    return sample["clip_id"] in clips


def _refers_to(sample: dict[str, Any], clips: Collection[str]) -> bool:
    return any(clip_id in clips for clip_id in sample["reference_clips"])


def _close(outcome: dict[str, Any], clips: Collection[str], explain: Callable[[str], str]) -> dict[str, Any]:
    if outcome["reason"] or outcome["item"] not in clips:
        return outcome
    return {**outcome, "reason": "TAKEN_DOWN", "message": explain(outcome["item"])}


def _remove_references(members: dict[str, bytes], clips: Collection[str]) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The sample's members without the pictures from those clips, and what the index says of the rest."""
    from safetensors.torch import load, save

    info = json.loads(members["json"])
    references = info["references"]
    kept = [number for number, reference in enumerate(references) if reference["clip_id"] not in clips]
    tensors = keep_references(load(members["safetensors"]), kept)
    info["references"] = [references[number] for number in kept]
    rewritten = {
        "safetensors": save(tensors),
        "json": json.dumps(info, sort_keys=True, ensure_ascii=False).encode(),
        "jpg": encode_jpeg(_cut_sheet(decode_image(members["jpg"]), len(references), kept)),
    }
    return {**members, **rewritten}, count_references(info["references"])


def _cut_sheet(sheet: np.ndarray, num_references: int, kept: list[int]) -> np.ndarray:
    """The contact sheet with only the ``kept`` ones of its references; all its pictures are of one size."""
    width_px = (sheet.shape[1] - SHEET_GAP_PX) // max(SHEET_FRAMES, num_references) - SHEET_GAP_PX

    def tile(row: int, column: int) -> np.ndarray:
        top, left = (SHEET_GAP_PX + place * (size + SHEET_GAP_PX) for place, size in ((row, SHEET_PX), (column, width_px)))
        return sheet[top : top + SHEET_PX, left : left + width_px, :3]

    frames = [tile(0, column) for column in range(SHEET_FRAMES)]
    return make_contact_sheet([frames, [tile(1, column) for column in kept]], SHEET_PX)


def _read(file: Any, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)
