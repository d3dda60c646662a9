"""The fine-tuning."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from refalign.config.section import Count, Fraction, Positive, Section


class StageConfig(Section):
    name: str
    """Label in metrics and checkpoints."""
    steps: Count
    """Optimizer steps of this stage."""
    learning_rate: Positive
    """Peak learning rate after warm-up."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After warm-up: hold the peak (published), or fall to 1% of it along a cosine by the end of the stage."""
    cross_pair_fraction: Fraction = 0.0
    """Chance that a subject's reference comes from another clip where one exists."""
    latent_frames: Count | None = None
    """Train on the first so many latent frames of each clip; 1 trains on images, which the VAE encodes as first frames."""


def _name_recompute(value: Any) -> Any:
    return ("full" if value else "none") if isinstance(value, bool) else value


LoraTarget = Literal["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]


class LoraConfig(Section):
    """Adapters (peft) that are trained, with the projectors, over frozen weights."""

    rank: Count | None = None
    """Rank of the adapters; None trains all weights."""
    alpha: Count | None = None
    """Adapters are scaled by ``alpha / rank``. None: alpha is the rank."""
    targets: tuple[LoraTarget, ...] = Field(("to_q", "to_k", "to_v", "to_out.0"), min_length=1)
    """Linear layers of each block, of both attentions and of the feed-forward, that get an adapter."""

    @property
    def arguments(self) -> dict[str, Any]:
        """What `refalign.models.lora` takes."""
        return {"rank": self.rank, "alpha": self.alpha or self.rank, "targets": self.targets}


class ParallelConfig(Section):
    """How samples, weights and tokens are shared among ranks."""

    ranks: Count = 1
    """Training processes. ``global_batch`` must be a multiple of ``ranks / context * micro_batch``."""
    min_ranks: Count | None = None
    """Under Ray, go on with as few ranks as this where nodes are lost, and with more when they are back; None waits for all."""
    shards_per_replica: Count | None = None
    """Ranks that share one copy of the weights, a divisor of all ranks, best those of one machine; None shards over all."""
    context: Count = 1
    """Ranks that share the tokens of each sample: a divisor of all ranks, of the heads and of the tokens of a frame."""
    max_restarts: Annotated[int, Field(ge=0)] = 2
    """Restarts of the worker group after a lost rank."""


class OptimizerConfig(Section):
    name: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    """AdamW; torchao's with moments of 8 bits; or Muon for the matrices of the blocks, which needs fewer steps from scratch."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    """AdamW weight decay."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Linear warm-up at the start of each stage."""
    clip_grad_norm: Positive = 1.0
    """Gradient norm above which gradients are scaled down."""
    ema_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Exponential moving average of the weights; 0 keeps none."""


class DropoutConfig(Section):
    """Conditions that are left out of a sample, so that guidance has something to compare with; at most one of the three."""

    text: Fraction = 0.1
    """Chance that only the prompt is dropped."""
    references: Fraction = 0.1
    """Chance that only the references are dropped."""
    both: Fraction = 0.1
    """Chance that prompt and references are dropped."""


class CheckpointConfig(Section):
    every: Count = 100
    """Optimizer steps between checkpoints."""
    keep: Count = 2
    """Newest checkpoints kept."""
    keep_best: bool = True
    """Keep the checkpoint with the lowest validation total as well, of those saved in a validated step."""
    on_damaged: Literal["fall_back", "stop"] = "fall_back"
    """Resume from the checkpoint before one whose files are not those that were written, or stop."""
    asynchronous: bool = True
    """Write checkpoints from a copy in host memory while training goes on."""


class ValidationConfig(Section):
    every: Count = 100
    """Optimizer steps between validations."""
    samples: Count = 8
    """Held-out samples of a validation, at fixed noise and timesteps."""
    gradient_norms_every: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps between measurements of each term's own gradient norm, which cost two more passes; 0 for none."""


class TrainingConfig(Section):
    start_from: str | None = None
    """Folder of an earlier training run (``export/transformer`` and perhaps ``projectors.safetensors``) whose weights to start
    from; None starts from ``models.base`` with new projectors."""
    stages: tuple[StageConfig, ...] = Field(min_length=1)
    """The recipe, run in order as one tracked run; projectors carry over."""
    global_batch: Count
    """Samples per optimizer step over all ranks and accumulation steps."""
    micro_batch: Count
    """Samples per forward pass on one rank."""
    mixture: dict[str, Annotated[float, Field(ge=0)]] | None = None
    """Pattern of source groups (``opens2v/*``, ``*``) -> weight, whatever the number of their samples; the longest that fits
    counts, 0 leaves out. None draws all samples alike."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Compute type of the transformer; master weights are float32."""
    activation_checkpointing: Annotated[Literal["none", "selective", "full"], BeforeValidator(_name_recompute)] = "none"
    """What the backward pass computes again: nothing, all but matrix products and attention, or whole blocks (true is full)."""
    compile: bool = False
    """torch.compile each block: minutes at the start, faster steps after."""
    lora: LoraConfig = LoraConfig()
    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    dropout: DropoutConfig = DropoutConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    validation: ValidationConfig = ValidationConfig()

    @model_validator(mode="after")
    def _divides(self):
        ranks, context = self.parallel.ranks, self.parallel.context
        if ranks % context:
            raise ValueError(f"training.parallel.ranks={ranks} is not a multiple of training.parallel.context={context}")
        if self.global_batch % (ranks // context * self.micro_batch):
            raise ValueError(
                f"training.global_batch={self.global_batch} is not a multiple of training.parallel.ranks={ranks} "
                f"x training.micro_batch={self.micro_batch}"
            )
        fewest = self.parallel.min_ranks or ranks
        if fewest > ranks:
            raise ValueError(f"training.parallel.min_ranks={fewest} is above training.parallel.ranks={ranks}")
        if odd := [fewer for fewer in range(fewest, ranks) if fewer % context or self.global_batch % (fewer // context)]:
            raise ValueError(
                f"training.parallel.min_ranks={fewest}: training.global_batch={self.global_batch} does not divide over {odd[0]} "
                f"ranks (training.parallel.context={context}), and a run may go on with any number of them"
            )
        return self

    @model_validator(mode="after")
    def _draws(self):
        if self.mixture is not None and not sum(self.mixture.values()):
            raise ValueError("training.mixture has no weight above 0")
        if self.dropout.text + self.dropout.references + self.dropout.both > 1:
            raise ValueError("training.dropout.text + references + both is above 1")
        if len({stage.name for stage in self.stages}) < len(self.stages):
            raise ValueError("training.stages: two stages have the same name")
        return self
