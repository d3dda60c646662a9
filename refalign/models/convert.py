"""Official RefAlign / DiffSynth weights to a diffusers folder and back, one shard in memory at a time.

Keys, shapes and the model's configuration are read from the files' headers; anything missing, unexpected or of another
shape is refused before a byte is written. Projectors (``blocks.N.input_mlp``) are optional: released weights lack them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from refalign.errors import ArtifactError
from refalign.models.loading import load_model_config
from refalign.models.projector import Projectors
from refalign.models.wan import RefAlignTransformer

PROJECTORS_FILE = "projectors.safetensors"
_WEIGHTS_NAME = "diffusion_pytorch_model"
_MAX_SHARD_BYTES = 5 * 10**9
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
    """The official name of a diffusers parameter, or of a parameter of ``Projectors``."""
    for ours, theirs in _OFFICIAL_NAMES:
        name = name.replace(ours, theirs)
    return name


def convert_official(source: str | Path, folder: str | Path, *, num_attention_heads: int | None = None) -> str:
    """Writes ``folder/transformer`` (opens in stock diffusers) and ``folder/projectors.safetensors`` if there are any.

    Args:
        source: a safetensors file, or a folder of them.
        folder: created if needed.
        num_attention_heads: None assumes heads of 128, as in every released Wan.

    Returns:
        One line for people: what the weights turned out to be.

    Raises:
        ArtifactError: files are unreadable, or keys are missing, unexpected or of another shape.
    """
    checkpoint = _Checkpoint(source)
    transformer, projectors, names = _match_official(checkpoint, num_attention_heads)
    target = Path(folder) / "transformer"
    target.mkdir(parents=True, exist_ok=True)
    _write_shards(checkpoint, {names[name]: name for name in transformer.state_dict()}, target, _WEIGHTS_NAME)
    transformer.save_config(target)
    if projectors is not None:
        weights = {name: checkpoint.read(names[name]) for name in projectors.state_dict()}
        save_file(weights, Path(folder) / PROJECTORS_FILE)
    return _describe(transformer, projectors)


def convert_to_official(folder: str | Path, target: str | Path) -> None:
    """Writes a diffusers folder, and its projectors if it has any, as official safetensors into the folder ``target``.

    Raises:
        ArtifactError: ``folder`` has no Transformer, or its weights do not fit its config.
    """
    source = Path(folder) / "transformer"
    config = {name: value for name, value in load_model_config(str(source.absolute())).items() if not name.startswith("_")}
    with torch.device("meta"):
        transformer = RefAlignTransformer(**config)
    checkpoint = _Checkpoint(source)
    expected = {name: tuple(weight.shape) for name, weight in transformer.state_dict().items()}
    _check_shapes(checkpoint, expected, origin=str(source))
    extra: dict[str, Tensor] = {}
    if (Path(folder) / PROJECTORS_FILE).is_file():
        extra = {official_name(name): each for name, each in Projectors.load(Path(folder) / PROJECTORS_FILE).state_dict().items()}
    Path(target).mkdir(parents=True, exist_ok=True)
    _write_shards(checkpoint, {name: official_name(name) for name in expected}, Path(target), "model", extra)


def load_official(path: str | Path, *, num_attention_heads: int | None = None) -> tuple[RefAlignTransformer, Projectors | None]:
    """Builds the Transformer and, if the file has them, the projectors from official weights, in the file's dtype.

    Args:
        path: a safetensors file, or a folder of them.
        num_attention_heads: None assumes heads of 128.

    Raises:
        ArtifactError: as in ``convert_official``.
    """
    checkpoint = _Checkpoint(path)
    transformer, projectors, names = _match_official(checkpoint, num_attention_heads)
    for model in (transformer, projectors):
        if model is not None:
            weights = {name: checkpoint.read(names[name]) for name in model.state_dict()}
            model.load_state_dict(weights, assign=True)
            model.requires_grad_()
    transformer.rope = transformer.make_rope()
    return transformer, projectors


def _describe(transformer: RefAlignTransformer, projectors: Projectors | None) -> str:
    config = transformer.config
    billions = sum(weight.numel() for weight in transformer.parameters()) / 1e9
    aligned = f"projectors of blocks {projectors.block_indices}" if projectors else "no projectors (needed only to train on)"
    return f"{config.num_layers} layers of width {transformer.width}, {billions:.2f} billion parameters, {aligned}"


class _Checkpoint:
    """Names, shapes and dtypes of the tensors in one or several safetensors files; tensors are read one at a time."""

    def __init__(self, path: str | Path) -> None:
        self.origin = str(path)
        files = sorted(Path(path).glob("*.safetensors")) if Path(path).is_dir() else [Path(path)]
        if not files or not all(file.is_file() for file in files):
            raise ArtifactError(f"{path}: no safetensors file there; give a .safetensors file or a folder of them.")
        self._files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        for file in files:
            try:
                with safe_open(file, "pt") as opened:
                    for name in opened.keys():  # noqa: SIM118  # a safetensors file is no dict
                        self._files[name] = file
                        tensor = opened.get_slice(name)
                        self.shapes[name], self.dtypes[name] = tuple(tensor.get_shape()), tensor.get_dtype()
            except (SafetensorError, OSError) as error:
                raise ArtifactError(f"{file}: not a readable safetensors file ({error}); download it again.") from error

    def num_bytes(self, name: str) -> int:
        return math.prod(self.shapes[name]) * int(re.sub(r"\D", "", self.dtypes[name].split("_")[0])) // 8

    def read(self, name: str) -> Tensor:
        with safe_open(self._files[name], "pt") as opened:
            return opened.get_tensor(name)


def _match_official(
    checkpoint: _Checkpoint, num_attention_heads: int | None
) -> tuple[RefAlignTransformer, Projectors | None, dict[str, str]]:
    """Meta-device models of the configuration the shapes imply, and for each of their parameters its name in the file."""
    anchor = "patch_embedding.weight"
    prefix = next((name.removesuffix(anchor) for name in checkpoint.shapes if name.endswith(anchor)), None)
    if prefix is None:
        raise ArtifactError(f"{checkpoint.origin}: no {anchor} in it, so these are not the weights of a Wan Transformer.")
    shapes = {name.removeprefix(prefix): shape for name, shape in checkpoint.shapes.items()}
    with torch.device("meta"):
        transformer = RefAlignTransformer(**_infer_config(shapes, num_attention_heads, checkpoint.origin))
        projectors = _infer_projectors(shapes, transformer.config.num_layers)
    expected = {official_name(name): tuple(weight.shape) for name, weight in transformer.state_dict().items()}
    names = {name: prefix + official_name(name) for name in transformer.state_dict()}
    if projectors is not None:
        expected |= {official_name(name): tuple(weight.shape) for name, weight in projectors.state_dict().items()}
        names |= {name: prefix + official_name(name) for name in projectors.state_dict()}
    _check_shapes(checkpoint, {prefix + name: shape for name, shape in expected.items()}, origin=checkpoint.origin)
    return transformer, projectors, names


def _infer_config(shapes: dict[str, tuple[int, ...]], num_attention_heads: int | None, origin: str) -> dict:
    """The diffusers configuration that the shapes imply.

    Raises:
        ArtifactError: a tensor that tells a size is missing, or the width does not divide into heads.
    """
    try:
        width, in_channels = shapes["patch_embedding.weight"][:2]
        heads = num_attention_heads or width // _HEAD_WIDTH
        if heads < 1 or width % heads:
            raise ArtifactError(f"{origin}: width {width} does not divide into {heads} heads; give num_attention_heads.")
        return {
            "patch_size": _PATCH,
            "num_attention_heads": heads,
            "attention_head_dim": width // heads,
            "in_channels": in_channels,
            "out_channels": shapes["head.head.weight"][0] // math.prod(_PATCH),
            "text_dim": shapes["text_embedding.0.weight"][1],
            "freq_dim": shapes["time_embedding.0.weight"][1],
            "ffn_dim": shapes["blocks.0.ffn.0.weight"][0],
            "num_layers": 1 + max(_block_indices(shapes, "self_attn")),
            "cross_attn_norm": "blocks.0.norm3.weight" in shapes,
        }
    except (KeyError, ValueError) as error:
        raise ArtifactError(f"{origin}: a Wan Transformer's {error} is not in it; the download is incomplete.") from error


def _infer_projectors(shapes: dict[str, tuple[int, ...]], num_layers: int) -> Projectors | None:
    indices = _block_indices(shapes, "input_mlp")
    first = shapes.get(f"blocks.{min(indices, default=num_layers)}.input_mlp.proj.0.weight")
    last = shapes.get(f"blocks.{min(indices, default=num_layers)}.input_mlp.proj.2.weight")
    if first is None or last is None:
        return None
    return Projectors(indices, (first[1], first[0], last[0]))


def _block_indices(names: Iterable[str], part: str) -> list[int]:
    matches = (re.match(rf"blocks\.(\d+)\.{part}\.", name) for name in names)
    return sorted({int(match[1]) for match in matches if match})


def _check_shapes(checkpoint: _Checkpoint, expected: dict[str, tuple[int, ...]], *, origin: str) -> None:
    """Compares what is there with what must be.

    Raises:
        ArtifactError: naming the first few of each kind of fault.
    """
    found = checkpoint.shapes
    faults = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "of another shape": [
            f"{name} {list(found[name])} instead of {list(shape)}"
            for name, shape in expected.items()
            if name in found and found[name] != shape
        ],
    }
    if not any(faults.values()):
        return
    lines = [
        f"{len(names)} {kind}: {', '.join(sorted(names)[:5])}{', ...' if len(names) > 5 else ''}"
        for kind, names in faults.items()
        if names
    ]
    raise ArtifactError(
        f"{origin}: {'; '.join(lines)}. {len(expected)} tensors were expected; download it again, or give the right file."
    )


def _write_shards(
    checkpoint: _Checkpoint, names: dict[str, str], folder: Path, stem: str, extra: dict[str, Tensor] | None = None
) -> None:
    """Copies tensors under new names into shards of at most 5 GB, with diffusers' index if there is more than one."""
    shards = list(_plan_shards(checkpoint, names))
    placed: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"{stem}.safetensors" if len(shards) == 1 else f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        weights = {names[name]: checkpoint.read(name) for name in shard}
        if number == 1:
            weights |= extra or {}
        save_file(weights, folder / file, metadata={"format": "pt"})
        placed |= dict.fromkeys(weights, file)
    if len(shards) > 1:
        total = sum(checkpoint.num_bytes(name) for name in names)
        index = {"metadata": {"total_size": total}, "weight_map": placed}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _plan_shards(checkpoint: _Checkpoint, names: Iterable[str]) -> Iterator[list[str]]:
    """Groups tensors, in order, so that each group fits one shard."""
    shard: list[str] = []
    size = 0
    for name in names:
        if shard and size + checkpoint.num_bytes(name) > _MAX_SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += checkpoint.num_bytes(name)
    yield shard
