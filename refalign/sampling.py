"""One video file from a registered model or an exported folder: what `pipelines/generate.py` does."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from refalign.errors import ConfigError
from refalign.exports import load_export_settings, make_generation_settings
from refalign.pictures import read_image, write_mp4
from refalign.presets import load_preset

_DEFAULT_TRACKING = Path("runs/toy")


def generate_file(
    model: str,
    *,
    prompt: str,
    references: Sequence[Path],
    output: Path,
    seed: int = 0,
    settings: Sequence[str] = (),
    tracking_uri: str | None = None,
) -> Path:
    """Loads the model, generates one video and writes it as H.264 mp4. The same seed gives the same video.

    Args:
        model: ``models:/name@alias``, ``models:/name/version``, or an exported folder.
        settings: ``name=value`` of what the model was exported with: num_frames, height, width, fps, num_inference_steps,
            guidance_scale, reference_guidance_scale, negative_prompt.
        tracking_uri: MLflow of a ``models:/`` name; None is ``MLFLOW_TRACKING_URI``, else the database in ``runs/toy``.

    Raises:
        ArtifactError: the model is missing or incomplete.
        DataError: a reference is no picture.
        ConfigError: an unknown setting, or a size that does not fit.
    """
    pictures = [read_image(path) for path in references]
    if output.suffix != ".mp4":
        raise ConfigError(f"--output {output}: expected a name that ends in .mp4.")
    folder = find_model(model, tracking_uri)
    chosen = _choose_settings(folder, settings)

    import torch

    from refalign.generation import RefAlignPipeline

    fps = chosen.pop("fps")
    pipeline = RefAlignPipeline.from_pretrained(str(folder))
    if torch.cuda.is_available():
        pipeline.enable_model_cpu_offload()
    generator = torch.Generator().manual_seed(seed)
    frames = pipeline(prompt, pictures, generator=generator, output_type="uint8", **chosen).frames[0]
    output.parent.mkdir(parents=True, exist_ok=True)
    aside = output.with_name(f".{output.name}")
    write_mp4(aside, frames.numpy(), fps)
    aside.replace(output)
    return output


def find_model(model: str, tracking_uri: str | None) -> Path:
    """Folder of a ``models:/`` name or of a path, as `generate_file` takes them."""
    if not model.startswith("models:/"):
        return Path(model).expanduser()
    from refalign.tracking.client import make_tracking_uri
    from refalign.tracking.registry import resolve_model

    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    return resolve_model(model, make_tracking_uri(uri, _DEFAULT_TRACKING))


def _choose_settings(folder: Path, settings: Sequence[str]) -> dict[str, Any]:
    """What the export recorded (else the paper's sizes), with the given values in its place."""
    chosen = make_generation_settings(load_preset("wan2_1_1_3b")) | load_export_settings(folder).get("generation", {})
    for fact in ("max_sequence_length", "shift"):  # of the model, not to be chosen
        del chosen[fact]
    for text in settings:
        name, found, raw = text.partition("=")
        if not found or name not in chosen:
            raise ConfigError(f"--set {text}: expected name=value with a name of {', '.join(chosen)}.")
        try:
            chosen[name] = type(chosen[name])(raw)
        except ValueError as error:
            raise ConfigError(f"--set {text}: expected a {type(chosen[name]).__name__}.") from error
    return chosen
