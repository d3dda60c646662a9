"""Which held-out samples are evaluated, with which pictures of their subjects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refalign.errors import ArtifactError
from refalign.evaluation.results import Reference
from refalign.io.storage import in_parallel, read_table
from refalign.io.tables import CLIP_SCHEMA, check_table
from refalign.pipeline.steps import Step


@dataclass(frozen=True)
class ChosenSample:
    """One prompt with its references.

    Attributes:
        targets: for each reference from another clip, the part that shows the subject in the sample's own clip.
        pngs: pictures by the name of their part, RGBA with the subject's mask as alpha.
    """

    key: str
    prompt: str
    source_group: str
    seed: int
    references: list[Reference]
    targets: list[str | None]
    pngs: dict[str, bytes]


def choose_samples(shards_folder: Path, subjects_folder: Path, *, count: int, seed: int) -> tuple[list[ChosenSample], str]:
    """Up to ``count`` samples, spread evenly over the held-out split, or over the training split if that is empty.

    A subject is shown by a picture from another clip if there is one: copying that does not place it in the scene.

    Returns:
        the samples, and the name of their split.

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
    entries = [entry for pairs in chosen.values() for pair in pairs for entry in pair if entry]
    crops = _load_crops(subjects_folder, {entry["subject_id"]: entry["clip_id"] for entry in entries})
    samples = []
    for order, (key, info) in enumerate(infos.items()):
        sample = ChosenSample(key, info["caption"], info["source_group"], seed + order, [], [], {})
        for number, (given, target) in enumerate(chosen[key]):
            file, target_file = f"reference-{key}-{number}.png", f"target-{key}-{number}.png" if target else None
            sample.references.append(Reference.model_validate(given | {"file": f"parts/{file}"}))
            sample.targets.append(target_file)
            sample.pngs[file] = crops[given["subject_id"]]
            if target_file:
                sample.pngs[target_file] = crops[target["subject_id"]]
        samples.append(sample)
    return samples, split


def _choose_references(entries: list[Any]) -> list[tuple[Any, Any]]:
    """For each subject its first picture from another clip and the first from the clip itself; (the latter, None) otherwise."""
    firsts = {(each["subject_index"], each["kind"] == "cross_pair"): each for each in reversed(entries)}
    subjects = sorted({subject for subject, _ in firsts})
    pairs = [(firsts.get((subject, True)), firsts.get((subject, False))) for subject in subjects]
    return [(other, own) if other else (own, None) for other, own in pairs]


def _load_crops(subjects_folder: Path, wanted: Mapping[str, str]) -> dict[str, bytes]:
    """PNG bytes by subject id; ``wanted`` is subject id to clip id. Only files that hold a wanted clip are read whole."""
    crops: dict[str, bytes] = {}
    step, clip_ids = Step.open(subjects_folder), set(wanted.values())
    for file in in_parallel(step.locate, (step.load_manifest() or {}).get("parts", [])):
        if clip_ids.isdisjoint(read_table(file, ["clip_id"])["clip_id"].to_pylist()):
            continue
        for row in check_table(read_table(file), CLIP_SCHEMA, file).to_pylist():
            if row["clip_id"] in clip_ids:
                crops |= {subject["subject_id"]: subject["crop_png"] for subject in row["subjects"]}
    if missing := wanted.keys() - crops.keys():
        raise ArtifactError(f"{subjects_folder}: no picture of subject {min(missing)}; the shards are of another subjects step.")
    return crops
