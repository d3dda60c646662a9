"""Which held-out samples are evaluated, with which pictures of their subjects."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refalign.errors import ArtifactError
from refalign.io.storage import in_parallel, read_table
from refalign.io.tables import CLIP_SCHEMA, check_table
from refalign.pipeline.steps import Step


@dataclass(frozen=True)
class ChosenReference:
    """One subject's picture: RGBA with the subject's mask as alpha.

    Attributes:
        kind: "cross_pair": from another clip; "in_pair": from the clip itself.
        target_png: the subject as the clip itself shows it, where the picture is from another clip.
    """

    subject_id: str
    class_name: str
    kind: str
    crop_png: bytes
    target_png: bytes | None = None


@dataclass(frozen=True)
class ChosenSample:
    """One prompt with its references."""

    key: str
    prompt: str
    source_group: str
    seed: int
    references: tuple[ChosenReference, ...]


def choose_samples(shards_folder: Path, subjects_folder: Path, *, count: int, seed: int) -> tuple[list[ChosenSample], str]:
    """Up to ``count`` samples, spread evenly over the held-out split, or over the training split where that is empty.

    A subject is shown by a picture from another clip where there is one: copying that is not enough to place it in the scene.

    Returns:
        the samples, and the split they are from.

    Raises:
        ArtifactError: there is no sample at all, or a picture is not in the subjects step.
    """
    from refalign.shards.reader import ShardIndex

    for split in ("validation", "train"):
        index = ShardIndex.open(shards_folder, split)
        if len(index):
            break
    else:
        raise ArtifactError(f"{shards_folder}: no samples to evaluate; run the shards step on more videos.")
    numbers = sorted(set(np.linspace(0, len(index) - 1, min(count, len(index))).round().astype(int).tolist()))
    infos = {index.entries[number].key: index.read(number).info for number in numbers}
    chosen = {key: _choose_references(info["references"]) for key, info in infos.items()}
    wanted = {entry["clip_id"] for entries in chosen.values() for pair in entries for entry in pair if entry}
    crops = _load_crops(subjects_folder, wanted)
    samples = []
    for order, (key, info) in enumerate(infos.items()):
        references = tuple(_make_reference(*pair, crops, subjects_folder) for pair in chosen[key])
        samples.append(ChosenSample(key, info["caption"], info["source_group"], seed + order, references))
    return samples, split


_Entry = Any


def _choose_references(entries: list[_Entry]) -> list[tuple[_Entry, _Entry | None]]:
    """The first entry of each subject, from another clip if possible, and then the one from the clip itself beside it."""
    best: dict[int, _Entry] = {}
    own: dict[int, _Entry] = {}
    for entry in sorted(entries, key=lambda entry: entry["kind"] != "cross_pair"):
        best.setdefault(entry["subject_index"], entry)
        if entry["kind"] != "cross_pair":
            own.setdefault(entry["subject_index"], entry)
    return [(entry, own.get(subject) if entry["kind"] == "cross_pair" else None) for subject, entry in sorted(best.items())]


def _load_crops(subjects_folder: Path, clip_ids: set[str]) -> dict[str, bytes]:
    """PNG bytes by subject id; the small id column tells which files are worth reading whole."""
    crops: dict[str, bytes] = {}
    step = Step.open(subjects_folder)
    for file in in_parallel(step.locate, (step.load_manifest() or {}).get("parts", [])):
        if clip_ids.isdisjoint(read_table(file, ["clip_id"])["clip_id"].to_pylist()):
            continue
        for row in check_table(read_table(file), CLIP_SCHEMA, file).to_pylist():
            if row["clip_id"] in clip_ids:
                crops |= {subject["subject_id"]: subject["crop_png"] for subject in row["subjects"]}
    return crops


def _make_reference(entry: _Entry, target: _Entry | None, crops: dict[str, bytes], subjects_folder: Path) -> ChosenReference:
    facts = {name: entry[name] for name in ("subject_id", "class_name", "kind")}
    try:
        target_png = crops[target["subject_id"]] if target else None
        return ChosenReference(**facts, crop_png=crops[entry["subject_id"]], target_png=target_png)
    except KeyError as error:
        raise ArtifactError(
            f"{subjects_folder}: no picture of subject {error.args[0]}; the shards are of another subjects step."
        ) from error
