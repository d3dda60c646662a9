"""The loss, and the fine-tuning with it."""

from __future__ import annotations

from typing import Annotated, Literal, TypedDict

from pydantic import BeforeValidator, Field, model_validator

from refalign.config.section import Amount, Count, Fraction, Natural, Positive, Section


class ObjectiveConfig(Section):
    alignment: Literal["none", "reference_alignment", "repa"] = "reference_alignment"
    """Which alignment term is added to flow matching."""
    coefficient: Amount = 1.0
    """Lambda: weight of the alignment term (REPA's published value is 0.5)."""
    push_coefficient: Amount = 1.0
    """Weight of the push inside the alignment term; 0 leaves the pull alone."""
    alignment_blocks: Count = 9
    """Number of blocks, from the first, that are aligned; REPA aligns only the last of them."""
    pull_margin: float = 0.0
    """Cosine distance below which nothing is pulled."""
    push_margin: float = 1.0
    """Cosine distance above which nothing is pushed."""
    gate_power: Amount = 3.0
    """Exponent of the gate (timestep / 1000) on the alignment term."""
    token_weight: Literal["none", "padding", "foreground"] = "none"
    """Weight of reference tokens: all alike (published), by the share of each patch that is not letterbox padding, or by
    the share of the subject in it (which leaves out the white around a mask crop too)."""
    same_subject_negatives: bool = True
    """Push two references of one subject apart (published); False leaves such pairs out."""
    stop_gradient: bool = False
    """Control: train the projectors alone; the transformer sees only flow matching."""
    shift: Positive = 5.0
    """Sigma shift of the training timesteps."""
    timestep_weights: Literal["bell", "uniform"] = "bell"
    """Weight of the velocity loss at each timestep: w(t) as published, which is 0 in pure noise, or 1 everywhere."""


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
    """Train on this many latent frames of each clip, from its first; 1 trains on images. None: all."""


def _name_recompute(value: object) -> object:
    return ("full" if value else "none") if isinstance(value, bool) else value


class LoraArguments(TypedDict):
    rank: int
    alpha: int
    targets: tuple[LoraTarget, ...]


LoraTarget = Literal["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]


class LoraConfig(Section):
    """Adapters (peft): they and the projectors are trained, all other weights are frozen."""

    rank: Count | None = None
    """Rank of the adapters; None trains all weights."""
    alpha: Count | None = None
    """Adapters are scaled by ``alpha / rank``. None: alpha is the rank."""
    targets: tuple[LoraTarget, ...] = Field(("to_q", "to_k", "to_v", "to_out.0"), min_length=1)
    """Linear layers of each block, of both attentions and of the feed-forward, that get an adapter."""

    @property
    def arguments(self) -> LoraArguments | None:
        """The arguments of `refalign.models.lora`; None where all weights are trained."""
        return None if self.rank is None else {"rank": self.rank, "alpha": self.alpha or self.rank, "targets": self.targets}


class ParallelConfig(Section):
    """How samples, weights and tokens are split over ranks."""

    ranks: Count = 1
    """Training processes. ``global_batch`` must be a multiple of ``ranks / context * micro_batch``."""
    min_ranks: Count | None = None
    """Under Ray, go on with as few ranks as this where nodes are lost, and with more when they are back; None waits for all."""
    shards_per_replica: Count | None = None
    """Ranks that share one copy of the weights: a divisor of all ranks, best the ranks of one machine. None: all."""
    context: Count = 1
    """Ranks that share the tokens of each sample: a divisor of all ranks, of the heads and of the tokens of a frame."""
    max_restarts: Natural = 2
    """Restarts of the worker group after a lost rank."""


class OptimizerConfig(Section):
    name: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    """AdamW; torchao's with moments of 8 bits; or Muon for the matrices of the blocks, which needs fewer steps from scratch."""
    weight_decay: Amount = 0.01
    """AdamW weight decay."""
    warmup_steps: Natural = 0
    """Linear warm-up at the start of each stage."""
    clip_grad_norm: Positive = 1.0
    """Gradient norm above which gradients are scaled down."""
    ema_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Exponential moving average of the weights; 0 keeps none."""


class DropoutConfig(Section):
    """Conditions dropped from a sample, for classifier-free guidance; at most one of the three happens."""

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
    """Also keep the checkpoint with the lowest validation total, among those saved in a validated step."""
    on_damaged: Literal["fall_back", "stop"] = "fall_back"
    """A checkpoint whose files have changed since they were written: resume from the one before it, or stop."""


class ValidationConfig(Section):
    every: Count = 100
    """Optimizer steps between validations."""
    samples: Count = 8
    """Held-out samples of a validation, at fixed noise and timesteps."""
    gradient_norms_every: Natural = 0
    """Optimizer steps between measurements of each loss term's gradient norm, which take two more passes; 0: never."""


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
    """Pattern of source groups (``opens2v/*``, ``*``) -> their share of the samples drawn. Of several patterns that match, the
    longest counts; 0 leaves a group out. None draws all samples alike."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Compute type of the transformer; master weights are float32."""
    activation_checkpointing: Annotated[Literal["none", "selective", "full"], BeforeValidator(_name_recompute)] = "none"
    """What the backward pass recomputes: nothing, all but matrix products and attention, or whole blocks (true means full)."""
    compile: bool = False
    """torch.compile each block: a start some minutes longer, then faster steps."""
    lora: LoraConfig = LoraConfig()
    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    dropout: DropoutConfig = DropoutConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    validation: ValidationConfig = ValidationConfig()

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all stages."""
        return sum(stage.steps for stage in self.stages)

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
