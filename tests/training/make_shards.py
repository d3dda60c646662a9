"""Small inputs for training tests: a shards folder written with tarfile alone, and a tiny base model of the real class."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from refalign.config import (
    ClusterConfig,
    ModelsConfig,
    ObjectiveConfig,
    ProcessConfig,
    RunConfig,
    StageConfig,
    TrainingConfig,
    VideoConfig,
)
from refalign.io.images import encode_png
from refalign.shards.sample import pack_pictures

CHANNELS, FRAMES, SIZE, TEXT_WIDTH, VISION_WIDTH = 4, 2, 8, 12, 10
TOKENS = (SIZE // 2) ** 2


def make_sample(
    number: int, *, subjects: int, has_cross_pairs: bool = True, frame_tokens: bool = False, pictures: bool = False
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and JSON of one sample. Latents, prompt and targets depend on a class, so that there is something to learn."""
    draw = torch.Generator().manual_seed(1000 + number)
    kinds = torch.Generator().manual_seed(number % 3)
    kinds_of_reference = [("in_pair", 2), ("cross_pair", 1)] if has_cross_pairs else [("in_pair", 2)]
    references = [
        {"subject_index": subject, "subject_id": f"clip{number}-s{subject}", "kind": kind, "clip_id": f"clip{number}"}
        for subject in range(subjects)
        for kind, variants in kinds_of_reference
        for _ in range(variants)
    ]
    count = len(references)
    look = torch.randn(CHANNELS, 1, SIZE, SIZE, generator=kinds)
    tensors = {
        "latents": look + 0.3 * torch.randn(CHANNELS, FRAMES, SIZE, SIZE, generator=draw),
        "prompt_embeds": torch.randn(1, TEXT_WIDTH, generator=kinds).repeat(2 + number % 3, 1),
        "reference_latents": look[:, 0] + 0.3 * torch.randn(count, CHANNELS, SIZE, SIZE, generator=draw),
        "target_tokens": torch.randn(1, TOKENS, VISION_WIDTH, generator=kinds)
        + 0.3 * torch.randn(count, TOKENS, VISION_WIDTH, generator=draw),
        "foreground": torch.rand(count, TOKENS, generator=draw),
        "content": torch.rand(count, TOKENS, generator=draw),
    }
    if frame_tokens:
        tensors["frame_tokens"] = torch.randn(FRAMES, TOKENS, VISION_WIDTH, generator=draw)
    stored = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in tensors.items()}
    if pictures:  # in place of the targets
        del stored["target_tokens"]
        pixels = torch.randint(0, 256, (count, 8 * SIZE, 8 * SIZE, 3), generator=draw, dtype=torch.uint8)
        stored |= pack_pictures([encode_png(each.numpy()) for each in pixels])
    return stored, {"caption": f"clip {number}", "references": references}


def write_shards(
    folder: Path,
    *,
    train: int = 20,
    validation: int = 4,
    per_shard: int = 8,
    max_subjects: int = 3,
    digest: str = "d1",
    **form: bool,
) -> Path:
    """Writes a finished shards step with ``train`` and ``validation`` samples of 1 to ``max_subjects`` subjects.

    Args:
        form: as of `make_sample`.
    """
    (folder / "parts").mkdir(parents=True)
    for split, first, count in (("train", 0, train), ("validation", 500, validation)):
        for shard, start in enumerate(range(0, count, per_shard)):
            numbers = range(first + start, first + min(start + per_shard, count))
            write_shard(folder / "parts" / f"{split}-{shard:06d}.tar", split, numbers, max_subjects, **form)
    parts = [path.name for path in sorted((folder / "parts").glob("*.tar"))]
    (folder / "manifest.json").write_text(json.dumps({"step": "shards", "digest": digest, "parts": parts}))
    return folder


def write_shard(path: Path, split: str, numbers: range, max_subjects: int, **form: bool) -> None:
    """One tar and its commit with byte offsets."""
    samples = []
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            subjects = 1 + number % max_subjects
            tensors, info = make_sample(number, subjects=subjects, **form)
            files = {"safetensors": save(tensors), "json": json.dumps(info).encode(), "jpg": b"\xff\xd8\xff\xd9"}
            members = {}
            for suffix, data in files.items():
                entry = tarfile.TarInfo(f"{split}{number:04d}.{suffix}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
                end = tar.offset
                members[suffix] = [end - -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE, len(data), zlib.crc32(data)]
            samples.append(
                {
                    "key": f"{split}{number:04d}",
                    "clip_id": f"clip{number}",
                    "source_group": f"{'ab'[number % 4 == 0]}/{number}",  # three of a to one of b
                    "shape": list(tensors["latents"].shape),
                    "subjects": subjects,
                    "members": members,
                }
            )
    data = path.read_bytes()
    commit = {
        "part": path.name,
        "sha256": hashlib.sha256(data).hexdigest(),
        "size_bytes": len(data),
        "split": split,
        "samples": samples,
    }
    path.with_name(path.name + ".json").write_text(json.dumps(commit))


def write_base(folder: Path, *, num_layers: int = 2, seed: int = 0) -> Path:
    """A diffusers-layout folder whose transformer is a tiny real Wan; the parts that training only copies are stand-ins."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(seed)
    WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=TEXT_WIDTH,
        freq_dim=16,
        ffn_dim=32,
        num_layers=num_layers,
        rope_max_seq_len=16,
    ).save_pretrained(folder / "transformer")
    for part in ("vae", "text_encoder", "tokenizer", "scheduler"):
        (folder / part).mkdir()
        (folder / part / "config.json").write_text("{}")
    (folder / "model_index.json").write_text("{}")
    return folder


def make_config(base: Path | str, **training: Any) -> RunConfig:
    """A recipe of two short stages for the tiny model; ``training`` replaces settings of its training section."""
    recipe: dict[str, Any] = {
        "stages": (
            StageConfig(name="stage1", steps=4, learning_rate=2e-3),
            StageConfig(name="stage2", steps=3, learning_rate=1e-3, cross_pair_fraction=1.0),
        ),
        "global_batch": 4,
        "micro_batch": 4,
        "optimizer": {"warmup_steps": 2},
        "checkpoint": {"every": 2, "keep": 10},
        "validation": {"every": 3, "samples": 4},
    }
    for name, value in training.items():
        recipe[name] = recipe.get(name, {}) | value if isinstance(value, dict) else value
    return RunConfig(
        models=ModelsConfig(base=str(base), vision_encoder="none", detector="none", max_text_tokens=6),
        video=VideoConfig(height_px=64, width_px=64, num_frames=5, fps=8.0),
        objective=ObjectiveConfig(alignment_blocks=2),
        training=TrainingConfig(**recipe),
        cluster=ClusterConfig(train=ProcessConfig(cpus=0.5), threads=1),
    )
