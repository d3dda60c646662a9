"""The trained modules as one unit, how their blocks run, and how they are spread over ranks."""

from __future__ import annotations

import functools
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from refalign.config import RunConfig, TrainingConfig
from refalign.errors import ArtifactError, ConfigError
from refalign.models.loading import load_model_config
from refalign.models.lora import add_lora
from refalign.models.projector import Projectors
from refalign.models.wan import RefAlignTransformer, load_transformer

PROJECTORS = "projectors.safetensors"
"""Name of the projectors' file in a run's folder, beside ``export/``."""
_ATEN = torch.ops.aten
SAVED_OPERATIONS = [
    _ATEN.mm.default,
    _ATEN.addmm.default,
    _ATEN.bmm.default,
    _ATEN._scaled_dot_product_flash_attention.default,
    _ATEN._scaled_dot_product_efficient_attention.default,
    _ATEN._scaled_dot_product_cudnn_attention.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
]
"""Results that selective recomputation keeps: they take nearly all of the time, and about a third of the memory."""

Value = TypeVar("Value")


@dataclass(frozen=True)
class Ranks:
    """This process among the others; without a process group, the only one.

    Attributes:
        context: number of neighbouring ranks that share the tokens of the same samples.
    """

    rank: int
    size: int
    device: torch.device
    context: int = 1

    @classmethod
    def current(cls, context: int = 1) -> Ranks:
        """Reads the process group that a launcher made, if any."""
        joined = dist.is_initialized()
        device = torch.device("cpu")
        if torch.cuda.is_available():
            device = torch.device("cuda", torch.cuda.current_device() if joined else 0)
        return cls(dist.get_rank() if joined else 0, dist.get_world_size() if joined else 1, device, context)

    @property
    def data_rank(self) -> int:
        """Whose share of a global batch this rank works on, of ``data_size`` shares."""
        return self.rank // self.context

    @property
    def data_size(self) -> int:
        return self.size // self.context

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum over ranks, those of the same samples counted once; every rank gets it."""
        if self.size > 1:
            dist.all_reduce(values)
        return values / self.context

    def gather(self, value: Value) -> list[Value]:
        """Every rank's ``value`` in the order of ranks; every rank gets it."""
        values = [value] * self.size
        if self.size == 1:
            return values
        dist.all_gather_object(values, value)
        return values

    def count_on_host(self) -> int:
        """Ranks on this rank's machine."""
        name = socket.gethostname()
        return self.gather(name).count(name)

    def barrier(self) -> None:
        """Waits for all ranks."""
        if self.size > 1:
            dist.barrier()


class TrainedModels(nn.Module):
    """The Transformer and, under an alignment objective, one projector per aligned block."""

    def __init__(self, transformer: RefAlignTransformer, projectors: Projectors | None) -> None:
        super().__init__()
        self.transformer = transformer
        self.projectors = projectors
        self.compute_dtype = torch.float32  # what inputs are cast to

    def embed_text(self, prompt_embeds: Tensor) -> Tensor:
        """The Transformer's text input from the stored one; a subclass may train a text encoder here."""
        return prompt_embeds

    def spread(self, config: RunConfig, ranks: Ranks) -> TrainedModels:
        """Moves to the device; FSDP2 over more than one rank: each block by itself, then what is left around them.

        With ``parallel.shards_per_replica`` ranks form groups that share one copy of the weights; each group is a replica.
        In float32, one rank stays a plain module. In bfloat16, one rank is sharded too (it needs a process group): float32
        master weights and bfloat16 compute come from FSDP at every size.

        Raises:
            ConfigError: ``training.parallel.shards_per_replica`` does not divide the ranks.
        """
        mesh = _make_mesh(config.training.parallel.shards_per_replica, ranks)
        if ranks.context > 1:
            rows = init_device_mesh(ranks.device.type, (ranks.data_size, ranks.context), mesh_dim_names=("data", "context"))
            self.transformer.split_tokens(rows["context"].get_group())
        is_empty = any(parameter.is_meta for parameter in self.parameters())
        receives = any(ranks.gather(is_empty))
        weights = dict(self.state_dict()) if receives and not is_empty else {}
        self.to("meta" if receives else ranks.device)
        prepare_blocks(self.transformer, config.training)
        self.compute_dtype = getattr(torch, config.training.precision)
        if ranks.size == 1 and self.compute_dtype == torch.float32:
            return self
        # Inputs are cast in `train_step`: FSDP would round timesteps and rotary tables as well.
        policy = MixedPrecisionPolicy(self.compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        # Roots are resharded after each forward too: else weights gathered for a validation would still be used in training.
        for module in (*self.transformer.blocks, self.transformer, self.projectors):
            if module is not None:
                fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        if receives:
            self._receive(weights, ranks)
        return self

    def _receive(self, weights: dict[str, Any], ranks: Ranks) -> None:
        """Fills the shards of all ranks from the first one's ``weights``: only that rank reads and holds whole weights."""
        self.to_empty(device=ranks.device)
        self.transformer.rope = self.transformer.make_rope().to(ranks.device)  # in no weight file
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(self, weights, options=options)


def prepare_blocks(transformer: RefAlignTransformer, training: TrainingConfig) -> None:
    """Gives each block the forward pass that ``training`` asks for; parameters keep their names.

    Recomputation inside, compilation around it, FSDP around both: its hooks must be neither compiled nor run twice.
    """
    for block in transformer.blocks:
        forward = block.forward
        if training.activation_checkpointing != "none":
            forward = _recomputed(forward, training.activation_checkpointing == "selective")
        if training.compile:
            forward = torch.compile(forward)
        if forward != block.forward:
            block.forward = forward  # on this block alone


def _recomputed(forward: Callable[..., Tensor], selective: bool) -> Callable[..., Tensor]:
    # Nothing in a block is random, hence no generator states to keep.
    rerun = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    if selective:
        rerun = functools.partial(rerun, context_fn=functools.partial(create_selective_checkpoint_contexts, SAVED_OPERATIONS))

    def run(*arguments: Tensor) -> Tensor:
        return rerun(forward, *arguments)

    return run


def _make_mesh(shards: int | None, ranks: Ranks) -> DeviceMesh | None:
    """Replicas x shards; None for FSDP's default, all ranks."""
    if shards is None or shards == ranks.size:
        return None
    if ranks.size % shards:
        raise ConfigError(
            f"training.parallel.shards_per_replica={shards} does not divide {ranks.size} ranks; best are the ranks of a machine."
        )
    return init_device_mesh(ranks.device.type, (ranks.size // shards, shards), mesh_dim_names=("replicate", "shard"))


def load_transformer_config(config: RunConfig) -> dict[str, Any]:
    """The config.json of the Transformer that `build_models` will load."""
    source, revision = _find_source(config)
    return load_model_config(source, subfolder="transformer", revision=revision)


def _find_source(config: RunConfig) -> tuple[str, str | None]:
    """Folder or hub id of the weights to start from, and the hub revision."""
    if config.training.start_from:
        return str(Path(config.training.start_from).expanduser() / "export"), None
    return config.models.base, config.models.base_revision


def build_empty_models(config: RunConfig, vision_width: int) -> TrainedModels:
    """What `build_models` makes, without its weights (on the meta device), for ranks that receive theirs from the first."""
    with torch.device("meta"):
        transformer = cast(RefAlignTransformer, RefAlignTransformer.from_config(load_transformer_config(config)))
        _choose_trained(transformer, config)
        return TrainedModels(transformer, _make_projectors(config, transformer, vision_width))


def build_models(config: RunConfig, vision_width: int) -> TrainedModels:
    """Loads the Transformer and loads or makes projectors, in float32 on the CPU.

    Args:
        config: names the base model, perhaps a run to start from, the aligned blocks and the seed of new projectors.
        vision_width: E, width of the target tokens in the shards.

    Raises:
        ArtifactError: the base model is missing, gated or of another kind, or the projectors do not fit.
    """
    source, revision = _find_source(config)
    transformer = load_transformer(source, revision=revision)
    _choose_trained(transformer, config)
    projectors = _make_projectors(config, transformer, vision_width)
    earlier = Path(source).parent / PROJECTORS
    if projectors is not None and config.training.start_from and earlier.is_file():
        try:
            projectors.load_state_dict(Projectors.load(earlier).state_dict())
        except RuntimeError as error:
            raise ArtifactError(
                f"{earlier}: projectors of other blocks or widths than this objective's; align the same blocks "
                "(objective.alignment_blocks), or delete the file to begin with new ones."
            ) from error
    return TrainedModels(transformer, projectors)


def _choose_trained(transformer: RefAlignTransformer, config: RunConfig) -> None:
    """All weights, or adapters over frozen ones."""
    transformer.train().requires_grad_(True)
    if (lora := config.training.lora.arguments) is not None:
        add_lora(transformer, **lora, seed=config.seed, frozen_dtype=getattr(torch, config.training.precision))


def _make_projectors(config: RunConfig, transformer: RefAlignTransformer, vision_width: int) -> Projectors | None:
    blocks, width = config.objective.alignment_blocks, transformer.width
    if config.objective.alignment == "none":
        return None
    torch.manual_seed(config.seed)
    if config.objective.alignment == "repa":
        return Projectors.make_repa(blocks - 1, width, vision_width)
    return Projectors.make_refalign(range(blocks), width, vision_width)
