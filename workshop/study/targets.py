"""Shards with other target tokens, which the study's control arms train on.

A sample keeps its key, place and every other tensor, so that all arms see the same data in the same order.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from refalign.config import RunConfig
from refalign.errors import ArtifactError
from refalign.io.storage import read_table, sha256_of
from refalign.io.video import ClipSpec, read_clips
from refalign.models.dinov3 import VisionEncoder
from refalign.models.loading import load_grid
from refalign.shards.encode import make_reference
from refalign.shards.reader import ShardIndex
from refalign.shards.sample import FRAME_TOKENS, TARGETS, Sample, pack_tokens, unpack_tokens
from refalign.shards.writer import NULL_PROMPT_NAME, write_tar

Kind = Literal["own", "shuffled", "random", "supervised", "frames"]
"""The encoder's own targets; those of other subjects; those of an untrained encoder, or of one trained with labels; the own ones,
and tokens of the video's frames beside them."""
Change = Callable[[list[Sample]], list[dict[str, Tensor]]]
_BATCH = 64


def derive_shards(source: Path, target: Path, kind: Kind, change: Change) -> Path:
    """Writes ``target`` with the tensors that ``change`` makes of each shard's samples, without contact sheets.

    The manifest is written last. Does nothing if it is there.
    """
    if (target / "manifest.json").is_file():
        return target
    shutil.rmtree(target, ignore_errors=True)
    (target / "parts").mkdir(parents=True)
    manifest = json.loads((source / "manifest.json").read_text())
    indices = {split: ShardIndex.open(source, split) for split in ("train", "validation")}
    for part in sorted(manifest["parts"]):
        commit, index = json.loads((source / "parts" / f"{part}.json").read_text()), indices[part.split("-")[0]]
        samples = index.read_many([number for number, entry in enumerate(index.entries) if Path(entry.shard).name == part])
        members = (
            (sample.key, {"safetensors": save(tensors), "json": json.dumps(sample.info, sort_keys=True).encode()})
            for sample, tensors in zip(samples, change(samples), strict=True)
        )
        path = target / "parts" / part
        offsets = write_tar(path, members)
        for sample in commit["samples"]:
            sample["members"] = offsets[sample["key"]]
        commit |= {"part": part, "size_bytes": path.stat().st_size, "sha256": sha256_of(path)}
        path.with_name(f"{part}.json").write_text(json.dumps(commit))
    if (null := source / NULL_PROMPT_NAME).is_file():
        shutil.copyfile(null, target / NULL_PROMPT_NAME)
    digest = hashlib.sha256(f"{manifest['digest']} {kind}".encode()).hexdigest()[:16]
    (target / "manifest.json").write_text(json.dumps({**manifest, "digest": digest, "targets": kind}, indent=1))
    return target


def shuffle_targets(samples: list[Sample]) -> list[dict[str, Tensor]]:
    """Every reference gets the tokens of another one of the shard, of another source group and so of another subject.

    Tokens are shifted by the number that leaves the fewest in their own group; of such numbers, the nearest to half of the shard.

    Raises:
        ArtifactError: the shard has so few groups that more than one reference in twenty would get tokens of its own group.
    """
    owners = np.array([sample.info.get("source_group", sample.key) for sample in samples for _ in sample.info["references"]])
    count = len(owners)
    met = {shift: int((owners == np.roll(owners, -shift)).sum()) for shift in range(1, count)}
    shift = min(met, key=lambda shift: (met[shift], abs(shift - count // 2)), default=0)
    if not shift or met[shift] > count / 20:
        groups = len(set(owners.tolist()))
        raise ArtifactError(f"targets of {count} references of {groups} source groups cannot be shuffled: too few groups.")
    return _with_targets(samples, torch.cat([unpack_tokens(sample.tensors, TARGETS) for sample in samples]).roll(-shift, 0))


def encode_again(clips: dict[str, dict[str, Any]], encoder: VisionEncoder, config: RunConfig) -> Change:
    """Targets of another vision encoder over the same pictures; ``clips`` are of `load_clips`."""
    pictures = {subject["subject_id"]: subject["crop_png"] for row in clips.values() for subject in row["subjects"]}
    sizes = config.video.height_px, config.video.width_px, encoder.patch_size_px

    def change(samples: list[Sample]) -> list[dict[str, Tensor]]:
        infos = [info for sample in samples for info in sample.info["references"]]
        if views := [info["subject_id"] for info in infos if "variant" in info]:
            raise ArtifactError(f"{len(views)} references are augmented views, which the crops alone cannot repeat.")
        pixels = np.stack([make_reference(pictures[info["subject_id"]], *sizes).pixels for info in infos])
        batches = [encoder.encode(pixels[start : start + _BATCH]).cpu() for start in range(0, len(pixels), _BATCH)]
        return _with_targets(samples, torch.cat(batches))

    return change


def encode_frames(clips: dict[str, dict[str, Any]], encoder: VisionEncoder, config: RunConfig) -> Change:
    """The own targets, and for REPA the tokens of the first frame of each latent frame; ``clips`` are of `load_clips`."""
    grid = load_grid(config.models)

    def change(samples: list[Sample]) -> list[dict[str, Tensor]]:
        changed = []
        for sample in samples:
            row = clips[sample.info["clip_id"]]
            spec = ClipSpec(row["start_s"], tuple(round(value) for value in row["crop_xyxy_px"]))
            (frames,) = read_clips(row["video_path"], [spec], config.video, config.curation)
            changed.append(_with(sample, FRAME_TOKENS, encoder.encode(frames[grid.first_frames(len(frames))]).cpu()))
        return changed

    return change


def load_clips(subjects: Path) -> dict[str, dict[str, Any]]:
    """All clip rows of a subjects step by clip id.

    Raises:
        ArtifactError: the folder holds none.
    """
    files = sorted((subjects / "parts").glob("*.parquet"))
    if not files:
        raise ArtifactError(f"{subjects}: no subjects step here; other targets are made from its crops.")
    return {row["clip_id"]: row for file in files for row in read_table(str(file)).to_pylist()}


def _with_targets(samples: list[Sample], tokens: Tensor) -> list[dict[str, Tensor]]:
    """The samples' tensors with ``tokens`` [references of all samples, P, E] as targets."""
    parts = tokens.split([len(sample.info["references"]) for sample in samples])
    return [_with(sample, TARGETS, part) for sample, part in zip(samples, parts, strict=True)]


def _with(sample: Sample, name: str, tokens: Tensor) -> dict[str, Tensor]:
    kept = {key: tensor for key, tensor in sample.tensors.items() if key not in (name, f"{name}_scale")}
    return {key: tensor.contiguous() for key, tensor in (kept | pack_tokens(name, tokens, "float16")).items()}
