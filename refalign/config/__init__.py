"""The settings of a run: one frozen tree of sections.

Presets (`refalign.config.presets`) fill it; ``--set section.field=value`` changes single values. Numbers that follow from
others are properties here or in `refalign.geometry.Grid`, never fields.
"""

from refalign.config.cluster import ClusterConfig, PoolConfig, ProcessConfig, TrackingConfig
from refalign.config.data import CurationConfig, InputConfig, PairsConfig, QualityConfig, ShardsConfig, StorageConfig, VideoConfig
from refalign.config.evaluation import EvaluationConfig, GateConfig, SamplingSettings
from refalign.config.models import ModelsConfig
from refalign.config.objective import ObjectiveConfig
from refalign.config.overrides import apply_overrides, check_config, describe_problems, make_fingerprint, set_values
from refalign.config.run import RunConfig
from refalign.config.section import Count, Fraction, Positive, Scale, Section
from refalign.config.training import (
    CheckpointConfig,
    DropoutConfig,
    LoraConfig,
    LoraTarget,
    OptimizerConfig,
    ParallelConfig,
    StageConfig,
    TrainingConfig,
    ValidationConfig,
)

__all__ = [
    "CheckpointConfig",
    "ClusterConfig",
    "Count",
    "CurationConfig",
    "DropoutConfig",
    "EvaluationConfig",
    "Fraction",
    "GateConfig",
    "InputConfig",
    "LoraConfig",
    "LoraTarget",
    "ModelsConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "PairsConfig",
    "ParallelConfig",
    "PoolConfig",
    "Positive",
    "ProcessConfig",
    "QualityConfig",
    "RunConfig",
    "SamplingSettings",
    "Scale",
    "Section",
    "ShardsConfig",
    "StageConfig",
    "StorageConfig",
    "TrackingConfig",
    "TrainingConfig",
    "ValidationConfig",
    "VideoConfig",
    "apply_overrides",
    "check_config",
    "describe_problems",
    "make_fingerprint",
    "set_values",
]
