"""``refalign.json`` of an exported model: where its frozen parts are, and the sizes and guidance it was made for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from refalign.config import RunConfig
from refalign.errors import ArtifactError
from refalign.steps import write_json
from refalign.texts import parse_json_object

FILE_NAME = "refalign.json"


def make_generation_settings(config: RunConfig) -> dict[str, Any]:
    """What generation assumes unless it is told otherwise, under the names of `refalign.generation.RefAlignPipeline`."""
    video, evaluation = config.video, config.evaluation
    return {
        "num_frames": video.num_frames,
        "height": video.height_px,
        "width": video.width_px,
        "fps": video.fps,
        "num_inference_steps": evaluation.num_inference_steps,
        "guidance_scale": evaluation.guidance_scale,
        "reference_guidance_scale": evaluation.reference_guidance_scale,
        "negative_prompt": evaluation.negative_prompt,
        "max_sequence_length": config.models.max_text_tokens,
        "shift": config.objective.shift,
    }


def write_export_settings(folder: Path, config: RunConfig, *, base_is_copied: bool) -> None:
    """Writes the file; a base that was not copied into ``folder`` is named by its hub id."""
    base = {} if base_is_copied else {"base": config.models.base, "base_revision": config.models.base_revision}
    write_json(folder / FILE_NAME, {**base, "generation": make_generation_settings(config)})


def load_export_settings(folder: Path) -> dict[str, Any]:
    """What `write_export_settings` wrote; empty for a folder that was not exported from a run (stock diffusers).

    Raises:
        ArtifactError: the folder is missing, or the file is damaged.
    """
    if not folder.is_dir():
        raise ArtifactError(f"{folder}: no such model folder; give an exported folder or models:/name@alias.")
    path = folder / FILE_NAME
    try:
        return parse_json_object(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise ArtifactError(f"{path}: damaged ({error}); export the model again.") from error
