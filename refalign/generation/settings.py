"""``refalign.json`` of an exported model: where its frozen parts are, and the settings that it is meant for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from refalign.config import Count, Positive, RunConfig, SamplingSettings, describe_problems
from refalign.config.presets import load_preset
from refalign.errors import ArtifactError, ConfigError
from refalign.io.storage import in_parallel, sha256_of
from refalign.io.untrusted import parse_json_object
from refalign.io.writing import write_json

FILE_NAME = "refalign.json"
FACTS = ("max_references", "max_sequence_length", "shift")
"""Settings that belong to the model; nobody chooses them for a video."""
_SEED = TypeAdapter(Annotated[int, Field(ge=0, lt=2**32)])


class GenerationSettings(SamplingSettings):
    """What one video is made with; the names are those of `refalign.generation.pipeline.RefAlignPipeline`.

    Attributes:
        max_references: most references of one training sample.
        max_sequence_length: text tokens that the Transformer attends to, padding included.
        shift: of the noise levels.
    """

    num_frames: Count
    height: Count
    width: Count
    fps: Annotated[float, Field(gt=0.0, le=1000.0)]
    max_references: Count
    max_sequence_length: Count
    shift: Positive

    def change(self, values: Mapping[str, object]) -> GenerationSettings:
        """The settings with other values, which may be text.

        Raises:
            ConfigError: an unknown name, a fact of the model, or a value out of range.
        """
        choices = [name for name in type(self).model_fields if name not in FACTS]
        if unknown := [name for name in values if name not in choices]:
            raise ConfigError(f"{', '.join(unknown)}: no such setting of generation; choose from {', '.join(choices)}.")
        try:
            return type(self).model_validate(self.model_dump() | dict(values))
        except ValidationError as error:
            raise ConfigError(f"{describe_problems(error)}.") from error

    def list_options(self) -> dict[str, Any]:
        """Arguments for a call of the pipeline."""
        return self.model_dump(exclude={"fps", *FACTS})


class Export(BaseModel):
    """What ``refalign.json`` says.

    Attributes:
        base, base_revision: hub id of the frozen parts, if they were not copied into the folder.
        files: sha256 of every other file by its path; empty if the folder has no digests.
    """

    base: str | None = None
    base_revision: str | None = None
    generation: GenerationSettings
    files: dict[str, str] = {}


def check_seed(seed: object) -> int:
    """The seed as a number of 32 bits; torch's generator uses no more.

    Raises:
        ConfigError: it is no whole number from 0 to 4294967295.
    """
    try:
        return _SEED.validate_python(seed)
    except ValidationError as error:
        raise ConfigError(f"seed={seed!r}: expected a whole number from 0 to {2**32 - 1}.") from error


def make_generation_settings(config: RunConfig) -> GenerationSettings:
    """The defaults of generation for a model of this run."""
    video, sampled = config.video, config.evaluation.model_dump(include=set(SamplingSettings.model_fields))
    return GenerationSettings(
        **sampled,
        num_frames=video.num_frames,
        height=video.height_px,
        width=video.width_px,
        fps=video.fps,
        max_references=config.curation.max_references,
        max_sequence_length=config.models.max_text_tokens,
        shift=config.objective.shift,
    )


def published_settings() -> GenerationSettings:
    """The defaults of the preset ``wan2_1_1_3b``, for models without their own."""
    return make_generation_settings(load_preset("wan2_1_1_3b"))


def write_export_settings(folder: Path, config: RunConfig, *, base_is_copied: bool) -> None:
    """Writes the file; a base that was not copied into ``folder`` is named by its hub id."""
    base = {} if base_is_copied else {"base": config.models.base, "base_revision": config.models.base_revision}
    write_json(folder / FILE_NAME, {**base, "generation": make_generation_settings(config).model_dump()})


def load_export_settings(folder: Path) -> Export:
    """The file of an exported folder; for a folder without it (stock diffusers), the published settings and no base.

    Raises:
        ArtifactError: the folder is missing, or the file is damaged.
    """
    if not folder.is_dir():
        raise ArtifactError(f"{folder}: no such model folder; give an exported folder or models:/name@alias.")
    path = folder / FILE_NAME
    try:
        stored = parse_json_object(path.read_text()) if path.is_file() else {}
        known = {name: value for name, value in stored.get("generation", {}).items() if name in GenerationSettings.model_fields}
        return Export.model_validate(stored | {"generation": published_settings().model_dump() | known})
    except (ValueError, AttributeError) as error:
        cause = describe_problems(error) if isinstance(error, ValidationError) else error
        raise ArtifactError(f"{path}: damaged ({cause}); export the model again.") from error


def write_digests(folder: Path) -> None:
    """Adds the digest of every file of a finished export, for `check_digests`."""
    stored = parse_json_object((folder / FILE_NAME).read_text())
    write_json(folder / FILE_NAME, {**stored, "files": _digest_files(folder)})


def check_digests(folder: Path) -> None:
    """Compares the files of an export with their digests; a folder without digests passes.

    Raises:
        ArtifactError: a file is missing or damaged, or as `load_export_settings`.
    """
    expected = load_export_settings(folder).files
    found = _digest_files(folder) if expected else {}
    for name, digest in expected.items():
        if found.get(name) != digest:
            fault = "missing" if name not in found else "damaged, its bytes are not those that were exported"
            raise ArtifactError(f"{folder / name}: {fault}; export the model again, or restore the file.")


def _digest_files(folder: Path) -> dict[str, str]:
    """sha256 of every other file, by its path relative to the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != FILE_NAME)
    return dict(zip((path.relative_to(folder).as_posix() for path in files), in_parallel(sha256_of, files), strict=True))
