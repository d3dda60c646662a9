"""The settings of a run: one frozen tree of sections.

Presets (`refalign.config.presets`) fill it; ``--set section.field=value`` changes single values. A number that follows from
others is a property here or in `refalign.geometry.Grid`, never a field.
"""

from refalign.config.cluster import ClusterConfig, PoolConfig, ProcessConfig
from refalign.config.data import CurationConfig, InputConfig, ModelsConfig, PairsConfig, QualityConfig, ShardsConfig, VideoConfig
from refalign.config.evaluation import EvaluationConfig, GateConfig, SamplingSettings
from refalign.config.overrides import apply_overrides, check_config, describe_problems, make_fingerprint, set_values
from refalign.config.run import RunConfig
from refalign.config.section import Count, Positive, Section
from refalign.config.training import (
    CheckpointConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    StageConfig,
    TrainingConfig,
    ValidationConfig,
)
