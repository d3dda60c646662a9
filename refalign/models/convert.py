"""Official RefAlign and DiffSynth weights to a diffusers folder and back.

Weights are mapped into memory and written one file at a time. The configuration is read from the tensors' shapes. Anything
missing, unexpected or of another shape is refused before a byte is written. Projectors (``blocks.N.input_mlp``) are optional:
released weights have none.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor

from refalign.errors import ArtifactError
from refalign.models.loading import load_model_config, load_tensors
from refalign.models.projector import Projectors
from refalign.models.wan import RefAlignTransformer

PROJECTORS_FILE = "projectors.safetensors"
_MAX_FILE_BYTES = 5 * 10**9
_HEAD_WIDTH = 128
_PATCH = (1, 2, 2)

# diffusers -> official, each applied to the whole name in this order. norm2 is the affine norm before the text
# cross-attention, which the official code calls norm3; the other two norms have no weights.
_OFFICIAL_NAMES = (
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    ("proj_out", "head.head"),
    (".scale_shift_table", ".modulation"),
    ("scale_shift_table", "head.modulation"),
    ("ffn.net.0.proj", "ffn.0"),
    ("ffn.net.2", "ffn.2"),
    ("norm2", "norm3"),
    ("attn1", "self_attn"),
    ("attn2", "cross_attn"),
    ("to_out.0", "o"),
    ("attn.to_", "attn."),
    (".proj.", ".input_mlp.proj."),
)


def official_name(name: str) -> str:
    """The official name of a parameter of diffusers' Wan or of ``Projectors``."""
    for ours, theirs in _OFFICIAL_NAMES:
        name = name.replace(ours, theirs)
    return name


def convert_official(source: str | Path, folder: str | Path, *, num_attention_heads: int | None = None) -> str:
    """Writes ``folder/transformer``, which stock diffusers opens, and ``folder/projectors.safetensors`` if there are any.

    Arguments and errors are those of `load_official`; nothing is written after an error. Returns one line about the weights.
    """
    transformer, projectors = load_official(source, num_attention_heads=num_attention_heads)
    transformer.save_pretrained(Path(folder) / "transformer", max_shard_size=_MAX_FILE_BYTES)
    if projectors is not None:
        projectors.save(Path(folder) / PROJECTORS_FILE)
    billions = sum(weight.numel() for weight in transformer.parameters()) / 1e9
    aligned = f"projectors of blocks {projectors.block_indices}" if projectors else "no projectors (needed only to train on)"
    return f"{transformer.config.num_layers} layers of width {transformer.width}, {billions:.2f} billion parameters, {aligned}"


def convert_to_official(folder: str | Path, target: str | Path) -> None:
    """Writes the Transformer of a diffusers folder, and its projectors if it has any, as official files into ``target``.

    Raises:
        ArtifactError: ``folder`` has no Transformer, or its weights do not fit its config.
    """
    source = Path(folder) / "transformer"
    config = {name: value for name, value in load_model_config(str(source.absolute())).items() if not name.startswith("_")}
    with torch.device("meta"):
        transformer = RefAlignTransformer(**config)
    weights = _read_weights(source)
    _check(weights, transformer.state_dict(), str(source))
    if (Path(folder) / PROJECTORS_FILE).is_file():
        weights |= Projectors.load(Path(folder) / PROJECTORS_FILE).state_dict()
    Path(target).mkdir(parents=True, exist_ok=True)
    official = {official_name(name): weight for name, weight in weights.items()}
    save_torch_state_dict(official, target, max_shard_size=_MAX_FILE_BYTES)


def load_official(path: str | Path, *, num_attention_heads: int | None = None) -> tuple[RefAlignTransformer, Projectors | None]:
    """Builds the Transformer and, if the files have them, the projectors from official weights, in the files' dtype.

    Args:
        path: a safetensors file, or a folder of them.
        num_attention_heads: None: heads of 128 channels, as in every released Wan.

    Raises:
        ArtifactError: a file is unreadable, or keys are missing, unexpected or of another shape.
    """
    weights, anchor = _read_weights(path), "patch_embedding.weight"
    prefix = next((name.removesuffix(anchor) for name in weights if name.endswith(anchor)), None)
    if prefix is None:
        raise ArtifactError(f"{path}: no {anchor} in it, so these are not the weights of a Wan Transformer.")
    weights = {name.removeprefix(prefix): weight for name, weight in weights.items()}
    extra = {name.replace(".input_mlp.", "."): weights.pop(name) for name in list(weights) if ".input_mlp." in name}
    projectors = Projectors.from_state_dict(extra, str(path)) if extra else None
    with torch.device("meta"):
        transformer = RefAlignTransformer(**_infer_config(weights, num_attention_heads, str(path)))
    names = {name: official_name(name) for name in transformer.state_dict()}
    _check(weights, {names[name]: weight for name, weight in transformer.state_dict().items()}, str(path))
    transformer.load_state_dict({name: weights[names[name]] for name in names}, assign=True)
    transformer.rope = transformer.make_rope()
    return transformer, projectors


def _read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of all in a folder; their bytes are read when they are used."""
    files = sorted(Path(path).glob("*.safetensors")) if Path(path).is_dir() else [Path(path)]
    if not files or not all(file.is_file() for file in files):
        raise ArtifactError(f"{path}: no safetensors file there; give a .safetensors file or a folder of them.")
    return {name: weight for file in files for name, weight in load_tensors(file).items()}


def _infer_config(weights: Mapping[str, Tensor], num_attention_heads: int | None, origin: str) -> dict[str, object]:
    """The diffusers configuration that the shapes imply."""
    try:
        width, in_channels = weights["patch_embedding.weight"].shape[:2]
        blocks = (re.match(r"blocks\.(\d+)\.self_attn\.", name) for name in weights)
        heads = num_attention_heads or width // _HEAD_WIDTH
        if heads < 1 or width % heads:
            raise ArtifactError(f"{origin}: width {width} does not divide into {heads} heads; give num_attention_heads.")
        return {
            "patch_size": _PATCH,
            "num_attention_heads": heads,
            "attention_head_dim": width // heads,
            "in_channels": in_channels,
            "out_channels": len(weights["head.head.weight"]) // math.prod(_PATCH),
            "text_dim": weights["text_embedding.0.weight"].shape[1],
            "freq_dim": weights["time_embedding.0.weight"].shape[1],
            "ffn_dim": len(weights["blocks.0.ffn.0.weight"]),
            "num_layers": 1 + max(int(match[1]) for match in blocks if match),
            "cross_attn_norm": "blocks.0.norm3.weight" in weights,
        }
    except (KeyError, ValueError) as error:
        raise ArtifactError(f"{origin}: a Wan Transformer's {error} is not in it; the download is incomplete.") from error


def _check(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], origin: str) -> None:
    """Refuses weights that are not the expected ones, naming the first few of each kind of fault."""
    both = sorted(found.keys() & expected.keys())
    faults = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "of another shape": [
            f"{name} {list(found[name].shape)} instead of {list(expected[name].shape)}"
            for name in both
            if found[name].shape != expected[name].shape
        ],
        "not of floating point": [name for name in both if not found[name].is_floating_point()],
    }
    said = [
        f"{len(names)} {kind}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        for kind, names in faults.items()
        if names
    ]
    if said:
        raise ArtifactError(
            f"{origin}: {'; '.join(said)}. {len(expected)} tensors were expected; download it again, or give the right file."
        )
