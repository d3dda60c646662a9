"""Presets: functions that return a complete `RunConfig`. The command line names them with ``--preset``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from refalign.config import (
    CheckpointConfig,
    ClusterConfig,
    CurationConfig,
    EvaluationConfig,
    ModelsConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PairsConfig,
    ParallelConfig,
    PoolConfig,
    ProcessConfig,
    RunConfig,
    ShardsConfig,
    StageConfig,
    TrainingConfig,
    ValidationConfig,
    VideoConfig,
    set_values,
)
from refalign.errors import ConfigError

_TOY_WEIGHTS = Path(__file__).parents[1] / "toy" / "weights"
EMBEDDED_DETECTOR = _TOY_WEIGHTS / "detector"
"""Detects only the creatures of the drawn world."""
_DINOV3_L = "facebook/dinov3-vitl16-pretrain-lvd1689m"
_NEGATIVE_PROMPT = (
    "blurred, distorted, deformed, static, low quality, watermark, text, extra limbs, several copies of the subject"
)


def toy() -> RunConfig:
    """The embedded default: drawn videos, tiny models of the real classes, and a minute of training that shows in the scores."""
    # It goes on from stage 1 after 550 of its 1,500 steps, with a higher rate than stage 2 of the recipe: few steps are left.
    stage = StageConfig(name="stage2", steps=40, learning_rate=1e-3, schedule="cosine", cross_pair_fraction=1.0)
    return set_values(toy_from_base(), {"training.stages": (stage,), "training.start_from": str(_TOY_WEIGHTS / "early")})


def toy_from_base() -> RunConfig:
    """`toy` with both stages of the recipe, from the shipped text-to-video model."""
    half = PoolConfig(cpus=0.5)
    return RunConfig(
        models=ModelsConfig(
            base=str(_TOY_WEIGHTS / "wan"),
            vision_encoder=str(_TOY_WEIGHTS / "dinov3"),
            detector=str(EMBEDDED_DETECTOR),
            max_text_tokens=40,
        ),
        video=VideoConfig(height_px=48, width_px=80, num_frames=9, fps=16.0),
        curation=CurationConfig(
            videos_per_part=6,
            embedding_px=48,
            # Creatures fill the drawn frames. At 27, 7% of their moves count as cuts; at 36, 1% do and 2% of the cuts are missed.
            shot_threshold=36.0,
            min_confidence=0.8,  # the embedded detector nearly always reaches it on drawn creatures, and never on real footage
        ),
        pairs=PairsConfig(min_similarity=0.9),  # above it every pair of the drawn world is one identity; measured on 192 pairs
        shards=ShardsConfig(samples_per_shard=16),
        # A smaller shift than Wan's: less noise hides so few tokens. Uniform weights: colours are learned at noise levels that
        # have only 6% of the weight under the bell.
        objective=ObjectiveConfig(alignment_blocks=2, shift=3.0, timestep_weights="uniform"),
        training=TrainingConfig(
            stages=(
                StageConfig(name="stage1", steps=60, learning_rate=1e-3),
                StageConfig(name="stage2", steps=40, learning_rate=3e-5, cross_pair_fraction=1.0),
            ),
            global_batch=8,
            micro_batch=8,
            optimizer=OptimizerConfig(warmup_steps=5),
            checkpoint=CheckpointConfig(every=20),
            validation=ValidationConfig(every=20),
        ),
        evaluation=EvaluationConfig(
            num_inference_steps=20, guidance_scale=2.5, reference_guidance_scale=4.0, judge="refalign.toy.verdict:judge_video"
        ),
        # One thread each: on two busy cores, two threads waited for each other thirty times longer than they worked.
        cluster=ClusterConfig(subjects=half, pairs=half, shards=half, evaluate=half, train=ProcessConfig(cpus=0.5), threads=1),
    )


def toy_tiny() -> RunConfig:
    """`toy_from_base` with few videos and few steps: the end-to-end test."""
    return set_values(
        toy_from_base(),
        {
            "input.world_videos": 18,
            "training.stages": (
                StageConfig(name="stage1", steps=16, learning_rate=1e-3),
                StageConfig(name="stage2", steps=8, learning_rate=5e-4, cross_pair_fraction=1.0),
            ),
            "training.checkpoint.every": 8,
            "training.validation.every": 8,
            "evaluation.num_samples": 2,
            "evaluation.num_inference_steps": 6,
        },
    )


def wan2_1_1_3b() -> RunConfig:
    """The paper's 1.3B recipe at 480 x 832, 81 frames."""
    return _wan("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", ranks=8)


def wan2_1_14b() -> RunConfig:
    """The paper's 14B recipe at 480 x 832, 81 frames."""
    return _wan("Wan-AI/Wan2.1-T2V-14B-Diffusers", ranks=64)


def _wan(base: str, *, ranks: int) -> RunConfig:
    return RunConfig(
        models=ModelsConfig(base=base, vision_encoder=_DINOV3_L, detector="yolo11x-seg.pt", encoder_dtype="bfloat16"),
        video=VideoConfig(height_px=480, width_px=832, num_frames=81, fps=25.0),
        curation=CurationConfig(videos_per_part=64, detection_frames=9),
        shards=ShardsConfig(samples_per_shard=128),
        objective=ObjectiveConfig(),
        training=TrainingConfig(
            stages=(
                StageConfig(name="stage1", steps=20_000, learning_rate=5e-5),
                StageConfig(name="stage2", steps=5_000, learning_rate=1e-5, cross_pair_fraction=1.0),
            ),
            global_batch=ranks,
            micro_batch=1,
            parallel=ParallelConfig(ranks=ranks),
            precision="bfloat16",
            activation_checkpointing="full",
            optimizer=OptimizerConfig(ema_decay=0.999),
            checkpoint=CheckpointConfig(every=500),
            validation=ValidationConfig(every=500, samples=32),
        ),
        evaluation=EvaluationConfig(num_samples=32, negative_prompt=_NEGATIVE_PROMPT),
        cluster=ClusterConfig(
            subjects=PoolConfig(cpus=4.0, gpus=0.5, max_actors=64),
            pairs=PoolConfig(cpus=4.0, max_actors=16),
            shards=PoolConfig(cpus=4.0, gpus=1.0, max_actors=64),
            evaluate=PoolConfig(cpus=4.0, gpus=1.0, max_actors=64),
            train=ProcessConfig(cpus=8.0, gpus=1.0),
            threads=4,
        ),
    )


PRESETS: dict[str, Callable[[], RunConfig]] = {
    preset.__name__: preset for preset in (toy, toy_from_base, toy_tiny, wan2_1_1_3b, wan2_1_14b)
}


def load_preset(name: str) -> RunConfig:
    """The settings of a preset.

    Raises:
        ConfigError: there is no preset of that name.
    """
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}.")
    return PRESETS[name]()
