"""What a run can be told: one frozen tree of sections, dotted overrides, and the fingerprint that names step folders.

Presets (`refalign.presets`) fill this tree; the command line changes single values with ``--set section.field=value``.
Numbers that follow from others are properties here or in `refalign.geometry.Grid`, never fields.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, ValidationError, model_validator

from refalign.errors import ConfigError
from refalign.sections import (
    ClusterConfig,
    Count,
    CurationConfig,
    EvaluationConfig,
    Fraction,
    PairsConfig,
    Positive,
    QualityConfig,
    Section,
    StorageConfig,
)
from refalign.texts import hide_secrets, holds_password, parse_json


class InputConfig(Section):
    path: str | None = None
    """What to learn from: a folder, a video, a pattern, a list or table of paths or URIs, an OpenS2V or Phantom-Data annotation,
    a cosmos-curate output folder; local, ``s3://`` or ``gs://``. None draws the toy world."""
    license: str = "unknown"
    """Licence written into rows whose source states none."""
    world_videos: Count = 48
    """Videos to draw when ``path`` is None."""
    world_seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the drawn world: equal seeds give equal bytes."""
    world_split: Literal["train", "heldout"] = "heldout"
    """Whose creatures are drawn: those the embedded weights were trained on, or others."""


class ModelsConfig(Section):
    base: str
    """Wan2.1 in the diffusers layout (transformer, vae, text_encoder, tokenizer): a folder or a hub id."""
    base_revision: str | None = None
    """Hub revision of ``base``; pin it for a run that must be reproducible."""
    vision_encoder: str
    """DINOv3 ViT: a folder or a hub id. Gives the alignment targets and the identity embeddings."""
    vision_encoder_revision: str | None = None
    """Hub revision of ``vision_encoder``."""
    detector: str
    """Segmentation detector: a folder with model.yaml and model.safetensors, or an ultralytics name such as yolo11n-seg.pt;
    yoloe-11l-seg.pt and its like find whatever ``curation.classes`` names."""
    text_image: str | None = None
    """CLIP or SigLIP that scores a clip against its caption: a folder or a hub id. None leaves the score out."""
    text_image_revision: str | None = None
    """Hub revision of ``text_image``."""
    aesthetic: str | None = None
    """Aesthetic head over the embeddings of ``text_image``: a .safetensors file (pipelines/convert.py makes it of a .pth)."""
    captioner: str | None = None
    """Vision-language model that writes captions, of the class of Qwen2.5-VL: a folder or a hub id."""
    captioner_revision: str | None = None
    """Hub revision of ``captioner``."""
    max_text_tokens: Count = 512
    """Text tokens the transformer attends to; shorter prompts are padded with zeros."""
    encoder_dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type of the frozen encoders."""


class VideoConfig(Section):
    height_px: Count
    """Height of training clips; a multiple of the token size, 16 px for Wan2.1."""
    width_px: Count
    """Width of training clips; a multiple of the token size, 16 px for Wan2.1."""
    num_frames: Count
    """Frames of a clip: 1 more than a multiple of the VAE's stride, 4 for Wan2.1."""
    fps: Positive
    """Frame rate that clips are resampled to."""


class ShardsConfig(Section):
    samples_per_shard: Count = 64
    """Samples that one task owns and commits as one tar."""
    augmented_references: Annotated[int, Field(ge=0)] = 0
    """Stored views of each reference that are augmented (turned, sheared, tinted, moved; never cropped), in place of the plain
    one; 0 stores the plain one."""
    targets: Literal["stored", "computed"] = "stored"
    """Vision tokens of the references: in the shards, or computed by every training rank from the references' pixels, which the
    shards then hold instead (PNG, so that the losses stay): less to store and to read, an encoder's pass more in each step."""
    target_dtype: Literal["float16", "int8"] = "float16"
    """How vision tokens are stored: int8, with a scale per token, takes half the space at a cosine error below 1e-4."""
    frame_tokens: bool = False
    """Store vision tokens of the video's own frames as well, which REPA aligns with: 67 MB a clip of 81 x 480 x 832."""


class ObjectiveConfig(Section):
    alignment: Literal["none", "reference_alignment", "repa"] = "reference_alignment"
    """Which alignment term is added to flow matching."""
    coefficient: Annotated[float, Field(ge=0.0)] = 1.0
    """Lambda: weight of the alignment term (REPA's published value is 0.5)."""
    push_coefficient: Annotated[float, Field(ge=0.0)] = 1.0
    """Weight of the push inside the alignment term; 0 leaves the pull alone."""
    alignment_blocks: Count = 9
    """The first so many blocks are aligned; REPA aligns only the last of them."""
    pull_margin: float = 0.0
    """Cosine distance below which nothing is pulled."""
    push_margin: float = 1.0
    """Cosine distance above which nothing is pushed."""
    gate_power: Annotated[float, Field(ge=0.0)] = 3.0
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
    """How much the velocity counts at each timestep: w(t) as published, which is 0 in pure noise, or all alike."""


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
    """Adapters count ``lora_alpha / lora_rank``; None is the rank."""
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


def _without_password(uri: str) -> str:
    if holds_password(uri):
        raise ValueError(
            "credentials belong into the environment (MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or PGPASSWORD for a "
            "database), not into the URI, which is written into manifests"
        )
    return uri


class TrackingConfig(Section):
    uri: Annotated[str, AfterValidator(_without_password)] | None = None
    """MLflow server; None keeps a database in the output folder. Credentials come from MLflow's environment variables."""
    experiment: str = "refalign"
    """MLflow experiment."""
    model_name: str = "refalign"
    """Registered model that new versions are added to."""


class RunConfig(Section):
    """Everything a run was told; equal configs and equal input make equal step folders."""

    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of every draw in training and evaluation."""
    input: InputConfig = InputConfig()
    storage: StorageConfig = StorageConfig()
    models: ModelsConfig
    video: VideoConfig
    curation: CurationConfig = CurationConfig()
    quality: QualityConfig = QualityConfig()
    pairs: PairsConfig = PairsConfig()
    shards: ShardsConfig = ShardsConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    training: TrainingConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    tracking: TrackingConfig = TrackingConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _has_targets(self):
        if self.objective.alignment == "repa" and not self.shards.frame_tokens:
            raise ValueError(
                "objective.alignment=repa aligns the video's own frames, whose vision tokens are stored only "
                "with shards.frame_tokens=true"
            )
        return self

    @model_validator(mode="after")
    def _has_models(self):
        needs = {
            "curation.caption": (self.curation.caption != "source", "captioner"),
            "quality.min_text_image": (self.quality.min_text_image is not None, "text_image"),
            "quality.min_aesthetic": (self.quality.min_aesthetic is not None, "aesthetic"),
            "models.aesthetic": (self.models.aesthetic is not None, "text_image"),
        }
        for setting, (is_needed, model) in needs.items():
            if is_needed and getattr(self.models, model) is None:
                raise ValueError(f"{setting} needs models.{model}, which is not set")
        if self.curation.classes_in_caption and not self.curation.classes:
            raise ValueError("curation.classes_in_caption needs curation.classes: the words to look for in captions")
        return self


def apply_overrides(config: RunConfig, overrides: Iterable[str]) -> RunConfig:
    """Returns ``config`` with ``a.b=value`` settings applied; values are read as JSON, else as text.

    List items are addressed by number: ``training.stages.0.steps=50``.

    Raises:
        ConfigError: the text is no assignment, the key is unknown, or the value is refused.
    """
    tree = config.model_dump(mode="json")
    for text in overrides:
        key, found, raw = text.partition("=")
        if not found:
            raise ConfigError(f"--set {text}: expected section.field=value, for example --set training.global_batch=8.")
        try:
            value = parse_json(raw)
        except ValueError:
            value = raw
        _assign(tree, key.strip(), value)
    return check_config(tree)


def check_config(tree: dict[str, Any]) -> RunConfig:
    """Builds a `RunConfig` from plain values, turning pydantic's report into one `ConfigError`."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{describe_problems(error)}.") from error


def describe_problems(error: ValidationError) -> str:
    """Pydantic's report as one line: each field, what is wrong with it, and its value."""
    problems = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        got = "" if item["type"] in ("value_error", "missing") else f" (got {hide_secrets(repr(item['input']))[:200]})"
        problems.append(f"{where}: {message}{got}" if where and where not in message else message + got)
    return "; ".join(problems)


def _assign(tree: dict[str, Any], key: str, value: Any) -> None:
    node: Any = tree
    *path, last = key.split(".")
    for depth, part in enumerate(path):
        node = _child(node, part, ".".join(path[: depth + 1]))
    _child(node, last, key)
    if isinstance(node, list):
        node[int(last)] = value
    else:
        node[last] = value


def _child(node: Any, part: str, key: str) -> Any:
    if isinstance(node, dict) and part in node:
        return node[part]
    if isinstance(node, list) and part.isdigit() and int(part) < len(node):
        return node[int(part)]
    if isinstance(node, dict):
        known = ", ".join(sorted(node))
        raise ConfigError(f"unknown setting {key!r}: there is no {part!r} here; known: {known}.")
    raise ConfigError(f"unknown setting {key!r}: {part!r} is not below a section.")


def make_fingerprint(*parts: Any) -> str:
    """12 hexadecimal digits of sha256 over canonical JSON of sections and plain values."""
    plain = [part.model_dump(mode="json") if isinstance(part, BaseModel) else part for part in parts]
    canonical = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]
