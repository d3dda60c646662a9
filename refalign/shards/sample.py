"""What one shard sample holds: <key>.safetensors, <key>.json and <key>.jpg, a picture of it to look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict, cast

import torch
from jaxtyping import Float
from torch import Tensor

from refalign.errors import SchemaError

SAMPLE_TENSORS = {
    "latents": "Z T h w",  # normalised
    "prompt_embeds": "L D",  # real tokens only
    "reference_latents": "R Z h w",  # normalised
    "foreground": "R P",  # share of the subject in each patch, 0 to 1
    "content": "R P",  # share of each patch that is picture, not the white of the letterbox, 0 to 1
}
"""Tensor -> axes. R counts reference pictures over all subjects of the clip."""
TARGETS = "target_tokens"
PICTURES, PICTURE_SIZES = "pictures", "picture_sizes"
_STORED = {TARGETS: "R P E"}  # frozen vision tokens of each reference
_COMPUTED = {PICTURES: "N", PICTURE_SIZES: "R"}  # PNG files of the references, one after the other, and the bytes of each
FRAME_TOKENS = "frame_tokens"
"""T P E: vision tokens of the pixel frame that each latent frame begins with; only under ``shards.frame_tokens``."""
_SCALE = "_scale"


class ReferenceInfo(TypedDict):
    """Where a reference picture is from."""

    subject_index: int
    subject_id: str
    clip_id: str
    kind: str  # in_pair, cross_pair
    similarity: float  # of the embeddings, 1 for a subject's own picture
    class_name: str
    box_xyxy_px: list[float]
    score: float
    variant: NotRequired[int]  # of augmented views


class SampleInfo(TypedDict):
    """A sample's JSON."""

    clip_id: str
    video_id: str
    caption: str
    license: str
    consent: str
    source_group: str
    start_s: float
    fps: float
    split: str
    references: list[ReferenceInfo]


@dataclass(frozen=True)
class Sample:
    """One clip as it was encoded."""

    key: str
    tensors: dict[str, Tensor]
    info: SampleInfo


def check_sample(
    tensors: dict[str, Tensor], info: Mapping[str, Any], *, where: str, shape: tuple[int, ...], num_subjects: int
) -> SampleInfo:
    """Returns ``info`` if the tensors are the declared ones and agree with it and with the index; else a `SchemaError`.

    Args:
        where: names the sample in messages.
        shape, num_subjects: from the index.
    """
    declared = SAMPLE_TENSORS | (_STORED if has_targets(tensors) else _COMPUTED)
    missing = [name for name in declared if name not in tensors]
    if missing:
        raise SchemaError(f"{where} lacks {missing}; it was written by another version: run the shards step again.")
    wrong = {name: tuple(tensors[name].shape) for name, axes in declared.items() if tensors[name].ndim != len(axes.split())}
    if wrong:
        raise SchemaError(f"{where}: shapes {wrong}; expected the axes { ({name: declared[name] for name in wrong}) }.")
    references = info.get("references")
    if not isinstance(references, list) or not all(map(_has_subject, references)):
        raise SchemaError(f"{where}: its JSON lists no references with their subjects; run the shards step again.")
    counts = {name: len(tensors[name]) for name, axes in declared.items() if axes.startswith("R")}
    if set(counts.values()) != {len(references)}:
        raise SchemaError(f"{where}: {counts} references in the tensors, {len(references)} in the JSON.")
    if tuple(tensors["latents"].shape) != shape:
        raise SchemaError(f"{where}: latents {tuple(tensors['latents'].shape)}, the index says {shape}.")
    described = {reference["subject_index"] for reference in references}
    if len(described) != num_subjects or described != set(range(len(described))):
        raise SchemaError(f"{where}: {num_subjects} subjects, but references for subjects {sorted(described)}.")
    return cast(SampleInfo, info)


def _has_subject(reference: object) -> bool:
    return isinstance(reference, dict) and isinstance(reference.get("subject_index"), int)


def has_targets(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a sample holds vision tokens, and not the pictures to compute them from."""
    return PICTURE_SIZES not in tensors


def pack_pictures(files: Sequence[bytes]) -> dict[str, Tensor]:
    """Picture files as the tensors `PICTURES` and `PICTURE_SIZES`."""
    return {
        PICTURES: torch.frombuffer(bytearray(b"".join(files)) or bytearray(1), dtype=torch.uint8)[: sum(map(len, files))],
        PICTURE_SIZES: torch.tensor([len(file) for file in files], dtype=torch.int64),
    }


def unpack_pictures(tensors: Mapping[str, Tensor], chosen: Sequence[int]) -> list[bytes]:
    """The files of the ``chosen`` references."""
    ends = tensors[PICTURE_SIZES].cumsum(0).tolist()
    starts = [0, *ends[:-1]]
    return [tensors[PICTURES][starts[number] : ends[number]].numpy().tobytes() for number in chosen]


def pack_tokens(name: str, tokens: Float[Tensor, "... E"], dtype: str) -> dict[str, Tensor]:
    """Vision tokens as they are stored: float16, or int8 with one float32 scale per token (``<name>_scale``).

    The alignment loss sees directions only; int8 turns a token by a cosine of less than 1e-4 (tested), at half the bytes.
    """
    if dtype == "float16":
        return {name: tokens.to(torch.float16)}
    scale = tokens.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
    return {name: (tokens / scale).round().to(torch.int8), name + _SCALE: scale[..., 0].float()}


def unpack_tokens(tensors: dict[str, Tensor], name: str, chosen: list[int] | slice = slice(None)) -> Float[Tensor, "... E"]:
    """Stored vision tokens in float32; ``chosen`` picks along the first axis before anything is converted."""
    tokens = tensors[name][chosen].float()
    scale = tensors.get(name + _SCALE)
    return tokens if scale is None else tokens * scale[chosen][..., None]
