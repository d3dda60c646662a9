"""What can be known to fail before anything is started."""

from __future__ import annotations

from pathlib import Path

from refalign.config import RunConfig
from refalign.io.storage import check_disk_space
from refalign.io.writing import check_store
from refalign.models.loading import check_local, load_grid
from refalign.pipeline.tombstones import check_finished

_SMALLEST_FREE_BYTES = 2 * 2**30


def check_start(config: RunConfig, output: Path) -> None:
    """What can be known to fail before anything is started.

    Raises:
        GeometryError: the clip's size does not fit the base model's grid.
        ArtifactError: a local model is missing, the disk is nearly full, or a takedown was interrupted.
        ConfigError: the folder of evaluation pictures is missing or holds none, the store of parts cannot be written, or the
            output lies in the input.
    """
    check_finished(output)
    if config.input.path:
        from refalign.curation.sources import check_apart

        check_apart(config.input.path, (output, config.storage.parts))
    for name in ("base", "vision_encoder", "detector", "text_image", "aesthetic", "captioner"):
        if getattr(config.models, name):
            check_local(getattr(config.models, name), f"models.{name}")
    load_grid(config.models).check(config.video.height_px, config.video.width_px, config.video.num_frames)
    if config.evaluation.judge:
        from refalign.evaluation.judging import load_judge

        load_judge(config.evaluation.judge)
    if config.quality.evaluation_references:
        from refalign.curation.selection import list_pictures

        list_pictures(config.quality.evaluation_references)
    if config.training.start_from:
        check_local(f"{config.training.start_from}/export/transformer", "training.start_from")
    if config.storage.parts:
        check_store(config.storage.parts)
    check_disk_space(output, _SMALLEST_FREE_BYTES)
