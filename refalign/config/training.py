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
    num_workers: Count = 1
    """Ranks. ``global_batch`` must be a multiple of ``num_workers / context_parallel * micro_batch``."""
    min_workers: Count | None = None
    """Under Ray, go on with as few ranks as this where nodes are lost, and with more when they are back; None waits for all."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Compute type of the transformer; master weights are float32."""
    activation_checkpointing: Annotated[Literal["none", "selective", "full"], BeforeValidator(_name_recompute)] = "none"
    """What the backward pass computes again: nothing, all but matrix products and attention, or whole blocks (true is full)."""
    compile: bool = False
    """torch.compile each block: minutes at the start, faster steps after."""
    shards_per_replica: Count | None = None
    """Ranks that share one copy of the weights, a divisor of all ranks, best those of one machine; None shards over all."""
    lora_rank: Count | None = None
    """Train adapters of this rank (peft) and the projectors, over frozen weights; None trains all weights."""
    lora_alpha: Count | None = None
    """Adapters are scaled by ``lora_alpha / lora_rank``. None: alpha is the rank."""
    lora_targets: tuple[LoraTarget, ...] = Field(("to_q", "to_k", "to_v", "to_out.0"), min_length=1)
    """Linear layers of each block, of both attentions and of the feed-forward, that get an adapter."""
    context_parallel: Count = 1
    """Ranks that share the tokens of each sample, a divisor of all ranks, of the heads and of the tokens of a frame."""
    optimizer: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    """AdamW; torchao's with moments of 8 bits; or Muon for the matrices of the blocks, which needs fewer steps from scratch."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    """AdamW weight decay."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Linear warm-up at the start of each stage."""
    clip_grad_norm: Positive = 1.0
    """Gradient norm above which gradients are scaled down."""
    ema_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Exponential moving average of the weights; 0 keeps none."""
    drop_text: Fraction = 0.1
    """Chance that only the prompt is dropped."""
    drop_references: Fraction = 0.1
    """Chance that only the references are dropped."""
    drop_both: Fraction = 0.1
    """Chance that prompt and references are dropped."""
    checkpoint_every: Count = 100
    """Optimizer steps between checkpoints."""
    keep_checkpoints: Count = 2
    """Newest checkpoints kept."""
    keep_best: bool = True
    """Keep the checkpoint with the lowest validation total as well, of those saved in a validated step."""
    on_damaged_checkpoint: Literal["fall_back", "stop"] = "fall_back"
    """Resume from the checkpoint before one whose files are not those that were written, or stop."""
    async_checkpoints: bool = True
    """Write checkpoints from a copy in host memory while training goes on."""
    validate_every: Count = 100
    """Optimizer steps between validations."""
    validation_samples: Count = 8
    """Held-out samples of a validation, at fixed noise and timesteps."""
    gradient_norms_every: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps between measurements of each term's own gradient norm, which cost two more passes; 0 for none."""
    max_restarts: Annotated[int, Field(ge=0)] = 2
    """Restarts of the worker group after a lost rank."""

    @property
    def lora(self) -> dict[str, Any]:
        """Rank, alpha and targets of the adapters, where there are any."""
        return {"rank": self.lora_rank, "alpha": self.lora_alpha or self.lora_rank, "targets": self.lora_targets}

    @model_validator(mode="after")
    def _divides(self):
        context = self.context_parallel
        if self.num_workers % context:
            raise ValueError(f"training.num_workers={self.num_workers} is not a multiple of training.context_parallel={context}")
        ranks_batch = self.num_workers // context * self.micro_batch
        if self.global_batch % ranks_batch:
            raise ValueError(
                f"training.global_batch={self.global_batch} is not a multiple of training.num_workers={self.num_workers} "
                f"x training.micro_batch={self.micro_batch}"
            )
        fewest = self.min_workers or self.num_workers
        if fewest > self.num_workers:
            raise ValueError(f"training.min_workers={fewest} is above training.num_workers={self.num_workers}")
        if odd := [
            ranks for ranks in range(fewest, self.num_workers) if ranks % context or self.global_batch % (ranks // context)
        ]:
            raise ValueError(
                f"training.min_workers={fewest}: training.global_batch={self.global_batch} does not divide over {odd[0]} ranks "
                f"(training.context_parallel={context}), "
                "and a run may go on with any number of them"
            )
        if self.mixture is not None and not sum(self.mixture.values()):
            raise ValueError("training.mixture has no weight above 0")
        if self.drop_text + self.drop_references + self.drop_both > 1:
            raise ValueError("training.drop_text + drop_references + drop_both is above 1")
        if len({stage.name for stage in self.stages}) < len(self.stages):
            raise ValueError("training.stages: two stages have the same name")
        return self
