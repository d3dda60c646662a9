"""One video file from a registered model or an exported folder: what `pipelines/generate.py` does."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from refalign.errors import ConfigError
from refalign.generation.settings import check_seed, load_export_settings, published_settings
from refalign.io.images import read_image, write_mp4
from refalign.io.writing import open_aside

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
        output: a file name that ends in ``.mp4``.
        seed: 0 to 4294967295.
        settings: ``name=value`` of `refalign.generation.settings`, in place of what the model was exported with.
        tracking_uri: MLflow of a ``models:/`` name; None is ``MLFLOW_TRACKING_URI``, else the database in ``runs/toy``.

    Raises:
        ArtifactError: the model is missing or incomplete.
        DataError: a reference is no picture.
        ConfigError: an unknown setting or a value out of range, a size that does not fit, or an output that cannot be written.
    """
    # What is cheap to check comes first: the registry may download, and loading takes minutes at real size.
    seed, changes = check_seed(seed), dict(map(_split_setting, settings))
    published_settings().change(changes)
    _check_output(output)
    pictures = [read_image(path) for path in references]
    folder = find_model(model, tracking_uri)
    chosen = load_export_settings(folder).generation.change(changes)

    import torch

    from refalign.generation.pipeline import RefAlignPipeline

    pipeline = RefAlignPipeline.from_pretrained(str(folder))
    if torch.cuda.is_available():
        pipeline.enable_model_cpu_offload()
    generator = torch.Generator().manual_seed(seed)
    frames = pipeline(prompt, pictures, generator=generator, output_type="uint8", **chosen.list_options()).frames[0]
    with open_aside(str(output)) as aside:
        write_mp4(aside, frames.numpy(), chosen.fps)
    return output


def _split_setting(text: str) -> tuple[str, str]:
    name, found, raw = text.partition("=")
    if not found:
        raise ConfigError(f"--set {text}: expected name=value, for example --set num_frames=81.")
    return name.strip(), raw


def _check_output(output: Path) -> None:
    """Makes the folder of the file, and tries to write there."""
    if output.suffix.lower() != ".mp4":
        raise ConfigError(f"--output {output}: expected a name that ends in .mp4.")
    if output.is_dir():
        raise ConfigError(f"--output {output}: this is a folder; give the name of a file.")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output.parent):
            pass
    except OSError as error:
        raise ConfigError(f"--output {output}: cannot be written ({error.strerror}); choose another folder.") from error


def find_model(model: str, tracking_uri: str | None) -> Path:
    """Folder of a ``models:/`` name or of a path, as `generate_file` takes them.

    Raises:
        ArtifactError: there is no such model or folder.
    """
    from refalign.tracking.client import make_tracking_uri
    from refalign.tracking.registry import resolve_model

    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    return resolve_model(model, make_tracking_uri(uri, _DEFAULT_TRACKING))
