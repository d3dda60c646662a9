"""The settings of a run: one frozen tree of sections.

Presets (`refalign.config.presets`) fill it; ``--set section.field=value`` changes single values. Numbers that follow from
others are properties here or in `refalign.geometry.Grid`, never fields.
"""

from refalign.config.cluster import ClusterConfig, PoolConfig, TrackingConfig
from refalign.config.data import CurationConfig, InputConfig, PairsConfig, QualityConfig, ShardsConfig, StorageConfig, VideoConfig
from refalign.config.evaluation import EvaluationConfig, GateConfig, SamplingSettings
from refalign.config.models import ModelsConfig
from refalign.config.objective import ObjectiveConfig
from refalign.config.overrides import apply_overrides, check_config, describe_problems, make_fingerprint
from refalign.config.run import RunConfig
from refalign.config.section import Count, Fraction, Positive, Scale, Section
from refalign.config.training import LoraTarget, StageConfig, TrainingConfig

__all__ = [
    "ClusterConfig",
    "Count",
    "CurationConfig",
    "EvaluationConfig",
    "Fraction",
    "GateConfig",
    "InputConfig",
    "LoraTarget",
    "ModelsConfig",
    "ObjectiveConfig",
    "PairsConfig",
    "PoolConfig",
    "Positive",
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
    "VideoConfig",
    "apply_overrides",
    "check_config",
    "describe_problems",
    "make_fingerprint",
]
