"""A finished shards step that a benchmark makes up."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from refalign.shards.writer import write_tar

Made = tuple[str, dict[str, Tensor], dict[str, Any]]
"""Key, tensors and JSON of a sample."""


def write_shards(folder: Path, parts: Mapping[str, Iterable[Made]]) -> Path:
    """Writes training shards by name; a contact sheet is 20 kB of zeros."""
    (folder / "parts").mkdir(parents=True)
    for name, samples in parts.items():
        said: dict[str, dict[str, Any]] = {}

        def members(samples: Iterable[Made], said: dict[str, dict[str, Any]]) -> Iterator[tuple[str, dict[str, bytes]]]:
            for key, tensors, info in samples:
                subjects = len({reference["subject_index"] for reference in info["references"]})
                said[key] = {"key": key, "clip_id": key, "shape": list(tensors["latents"].shape), "subjects": subjects}
                yield key, {"safetensors": save(tensors), "json": json.dumps(info).encode(), "jpg": bytes(20_000)}

        path = folder / "parts" / name
        offsets = write_tar(path, members(samples, said))
        entries = [{**each, "members": offsets[key]} for key, each in said.items()]
        commit = {"part": name, "size_bytes": path.stat().st_size, "split": "train", "samples": entries}
        path.with_name(f"{name}.json").write_text(json.dumps(commit))
    (folder / "manifest.json").write_text(json.dumps({"digest": "benchmark", "parts": list(parts)}))
    return folder
