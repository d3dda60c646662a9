"""Shards whose target tokens are others: what the study's control arms train on.

A sample keeps its key, place and every other tensor, so that an arm sees the same data in the same order as the others. The
targets are made once per kind; the manifest is written last.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from refalign.errors import ArtifactError
from refalign.io.storage import read_table, sha256_of
from refalign.shards.reader import ShardIndex
from refalign.shards.sample import FRAME_TOKENS, TARGETS, Sample, pack_tokens, unpack_tokens
from refalign.shards.writer import NULL_PROMPT_NAME, write_tar

Kind = Literal["own", "shuffled", "random", "supervised", "frames"]
"""The encoder's own targets; those of other subjects; those of an untrained encoder, or of one that was shown labels; the own
ones with tokens of the video's frames beside them."""
Change = Callable[[list[Sample]], list[dict[str, Tensor]]]
_BATCH = 64


def derive_shards(source: Path, target: Path, kind: str, change: Change) -> Path:
    """Writes ``target`` with the tensors that ``change`` makes of each shard's samples; does nothing where it is whole.

    Contact sheets are left out: nothing in training reads them.
    """
    if (target / "manifest.json").is_file():
        return target
    shutil.rmtree(target, ignore_errors=True)
    (target / "parts").mkdir(parents=True)
    manifest = json.loads((source / "manifest.json").read_text())
    for split in ("train", "validation"):
        index = ShardIndex.open(source, split)
        for name in sorted(part for part in manifest["parts"] if part.startswith(f"{split}-")):
            numbers = [number for number, entry in enumerate(index.entries) if Path(entry.shard).name == name]
            samples = index.read_many(numbers)
            changed = zip(samples, change(samples), strict=True)
            members = (
                (sample.key, {"safetensors": save(tensors), "json": json.dumps(sample.info, sort_keys=True).encode()})
                for sample, tensors in changed
            )
            _write_part(source / "parts" / f"{name}.json", target / "parts" / name, members)
    if (null := source / NULL_PROMPT_NAME).is_file():
        shutil.copyfile(null, target / NULL_PROMPT_NAME)
    digest = hashlib.sha256(f"{manifest['digest']} {kind}".encode()).hexdigest()[:16]
    (target / "manifest.json").write_text(json.dumps({**manifest, "digest": digest, "targets": kind}, indent=1))
    return target


def _write_part(commit_of_source: Path, path: Path, members: Iterator[tuple[str, dict[str, bytes]]]) -> None:
    commit = json.loads(commit_of_source.read_text())
    offsets = write_tar(path, members)
    for sample in commit["samples"]:
        sample["members"] = offsets[sample["key"]]
    changed = {"part": path.name, "size_bytes": path.stat().st_size, "sha256": sha256_of(path)}
    path.with_name(f"{path.name}.json").write_text(json.dumps({**commit, **changed}))


def shuffle_targets(samples: list[Sample]) -> list[dict[str, Tensor]]:
    """Every reference gets the tokens of another reference of the shard, of another source group and hence another subject.

    One shift for the whole shard: the one after which the fewest references meet their own group, the nearest to half of the
    shard among those. What tokens are like as a whole stays as it was.

    Raises:
        ArtifactError: one reference in twenty would keep its group, because the shard holds too few of them.
    """
    owners = np.array([sample.info.get("source_group", sample.key) for sample in samples for _ in sample.info["references"]])
    count = len(owners)
    met = {shift: int((owners == np.roll(owners, -shift)).sum()) for shift in range(1, count)}
    shift = min(met, key=lambda shift: (met[shift], abs(shift - count // 2)), default=0)
    if not shift or met[shift] > count / 20:
        groups = len(set(owners.tolist()))
        raise ArtifactError(f"targets of {count} references of {groups} source groups cannot be shuffled: too few groups.")
    tokens = torch.cat([unpack_tokens(sample.tensors, TARGETS) for sample in samples]).roll(-shift, 0)
    parts = tokens.split([len(sample.info["references"]) for sample in samples])
    return [_with(sample, TARGETS, part) for sample, part in zip(samples, parts, strict=True)]


def encode_again(pictures: dict[str, bytes], encoder: Any, height_px: int, width_px: int) -> Change:
    """Targets of another vision encoder over the same pictures.

    Args:
        pictures: PNG by subject id, from `load_pictures`.
        encoder: `refalign.models.dinov3.VisionEncoder`.
    """
    from refalign.shards.encode import make_reference

    def change(samples: list[Sample]) -> list[dict[str, Tensor]]:
        infos = [info for sample in samples for info in sample.info["references"]]
        if views := [info["subject_id"] for info in infos if "variant" in info]:
            raise ArtifactError(f"{len(views)} references are augmented views, which the crops alone cannot repeat.")
        sizes = height_px, width_px, encoder.patch_size_px
        pixels = np.stack([make_reference(pictures[info["subject_id"]], *sizes).pixels for info in infos])
        batches = (encoder.encode(pixels[start : start + _BATCH]).cpu() for start in range(0, len(pixels), _BATCH))
        parts = torch.cat(list(batches)).split([len(sample.info["references"]) for sample in samples])
        return [_with(sample, TARGETS, part) for sample, part in zip(samples, parts, strict=True)]

    return change


def encode_frames(clips: dict[str, dict[str, Any]], encoder: Any, config: Any) -> Change:
    """The own targets, and tokens of the frame that each latent frame begins with, which REPA aligns with.

    Args:
        clips: rows of the subjects step by clip id.
    """
    from refalign.io.video import ClipSpec, read_clips
    from refalign.models.loading import load_grid

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
        ArtifactError: the step is not there.
    """
    files = sorted((subjects / "parts").glob("*.parquet"))
    if not files:
        raise ArtifactError(f"{subjects}: no subjects step here; its crops are what other targets are made from.")
    return {row["clip_id"]: row for file in files for row in read_table(str(file)).to_pylist()}


def load_pictures(clips: dict[str, dict[str, Any]]) -> dict[str, bytes]:
    """The crops of all subjects by subject id."""
    return {subject["subject_id"]: subject["crop_png"] for row in clips.values() for subject in row["subjects"]}


def _with(sample: Sample, name: str, tokens: Tensor) -> dict[str, Tensor]:
    kept = {key: tensor for key, tensor in sample.tensors.items() if key not in (name, f"{name}_scale")}
    return {key: tensor.contiguous() for key, tensor in (kept | pack_tokens(name, tokens, "float16")).items()}
