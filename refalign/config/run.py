"""All sections in one frozen tree."""

from __future__ import annotations

from pydantic import model_validator

from refalign.config.cluster import ClusterConfig, TrackingConfig
from refalign.config.data import (
    CurationConfig,
    InputConfig,
    ModelsConfig,
    PairsConfig,
    QualityConfig,
    ShardsConfig,
    StorageConfig,
    VideoConfig,
)
from refalign.config.evaluation import EvaluationConfig
from refalign.config.section import Natural, Section
from refalign.config.training import ObjectiveConfig, TrainingConfig


class RunConfig(Section):
    """All settings of a run. Equal settings and equal input give equal step folders."""

    seed: Natural = 0
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
            raise ValueError("objective.alignment=repa aligns frame tokens, which are stored only with shards.frame_tokens=true")
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
