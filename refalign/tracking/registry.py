"""The model registry: one version per evaluated checkpoint, and the way from a model URI to a folder.

A version is found by its key, the fingerprint of what was evaluated: registering again, also after a kill, adds no other. All of
it raises `BackendUnavailable` where MLflow does not answer or refuses.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

from refalign.config import RunConfig
from refalign.errors import ArtifactError
from refalign.generation.settings import FACTS, make_generation_settings
from refalign.io.storage import sha256_of
from refalign.io.untrusted import hide_secrets
from refalign.tracking.client import NOT_FOUND, Client, Tag, ignored, one_line_errors, open_client
from refalign.tracking.run import TrackedRun

if TYPE_CHECKING:
    from mlflow.models import ModelSignature

CHALLENGER = "challenger"
_EXPORT = "export"  # also in model_file.py, which runs where this module need not exist
_MARKER = "transformer/config.json"  # in every export; the other parts may be named by hub id instead
_MAX_DESCRIPTION = 5000  # of MLflow's database
_PACKAGES = ("mlflow", "torch", "diffusers", "transformers", "accelerate", "tokenizers", "safetensors", "pydantic", "jaxtyping")
_PACKAGES += ("numpy", "pandas", "pillow", "av")
_PACKAGE_FOLDER = Path(__file__).resolve().parents[1]


class RegisteredModel(NamedTuple):
    """A version in the registry."""

    name: str
    version: str
    alias: str
    uri: str


class Version(NamedTuple):
    """A registered version and what the gate said of it; of a training run without one, only ``digest`` and ``run_id``.

    Attributes:
        digest: of the shards that it was trained on.
    """

    digest: str
    run_id: str
    name: str = ""
    version: str = ""
    aliases: tuple[str, ...] = ()
    gate: str = ""
    reason: str = ""


def digest_weights(export_folder: Path) -> str:
    """16 hexadecimal digits over every safetensors file of an export, by name and content."""
    files = sorted(Path(export_folder).rglob("*.safetensors"))
    lines = [f"{file.relative_to(export_folder)} {sha256_of(file)}" for file in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def register_model(
    tracked: TrackedRun, config: RunConfig, *, key: str, export_folder: Path, card: str, tags: Mapping[str, str]
) -> RegisteredModel:
    """Adds the exported checkpoint to the registry as a models-from-code pyfunc, or finds its version; `CHALLENGER` moves there.

    Args:
        key: fingerprint of the evaluated checkpoint.
        export_folder: what `refalign.generation.pipeline.RefAlignPipeline.from_pretrained` opens; it is copied.
        card: the model card, in Markdown.
        tags: of a new version.

    Raises:
        ArtifactError: ``export_folder`` is no diffusers folder.
    """
    if not (Path(export_folder) / _MARKER).is_file():
        raise ArtifactError(f"{export_folder}: no exported model ({_MARKER} is missing); run the train step again.")
    run_id, client, name = tracked.child("register"), tracked.client, config.tracking.model_name
    client.log_text(run_id, card, "model_card.md")
    if found := client.search_model_versions(f"name = '{name}' and tags.`{Tag.KEY}` = '{key}'"):
        version = min((str(item.version) for item in found), key=int)
    else:
        model_id = _find_logged_model(tracked, key) or _log_model(tracked, config, key, Path(export_folder))
        with ignored("RESOURCE_ALREADY_EXISTS"):
            client.create_registered_model(name)
        made = client.create_model_version(
            name,
            f"models:/{model_id}",
            run_id=run_id,
            model_id=model_id,
            tags={Tag.KEY: key, **tags},
            description=card[:_MAX_DESCRIPTION],
        )
        version = str(made.version)
    client.set_registered_model_alias(name, CHALLENGER, version)
    return RegisteredModel(name, version, CHALLENGER, f"models:/{name}@{CHALLENGER}")


def list_numbers(client: Client, name: str) -> list[int]:
    """Numbers of a model's versions, in order; none where there is no such model."""
    return sorted({int(item.version) for item in client.search_model_versions(f"name = '{name}'")})


def has_version(uri: str, name: str, version: str) -> bool:
    """Whether the registry still has a version."""
    return version in map(str, list_numbers(open_client(uri), name))


def resolve_model(source: str, tracking_uri: str) -> Path:
    """Folder with the weights of ``models:/name@alias``, ``models:/name/version`` or a local folder.

    Models of a remote server are downloaded once, into ``~/.cache/refalign/models``.

    Raises:
        ArtifactError: there is no such model or folder, or its weights are not those that were registered.
    """
    if not source.startswith("models:/"):
        return _check_export(Path(source).expanduser(), source)
    reference = unquote(source.removeprefix("models:/"))
    name, separator, chosen = reference.partition("@" if "@" in reference else "/")
    if not name or not chosen:
        raise ArtifactError(f"{source}: expected models:/<name>@<alias>, models:/<name>/<version> or a local folder.")
    client = open_client(tracking_uri)
    find = client.get_model_version_by_alias if separator == "@" else client.get_model_version
    version = None
    with ignored(*NOT_FOUND):
        version = find(name, chosen)
    if version is None:
        known = ", ".join(map(str, list_numbers(client, name)))
        has = f"it has versions {known} of {name}" if known else f"it has no model {name}"
        raise ArtifactError(
            f"{source}: not in the registry at {hide_secrets(tracking_uri)}; {has}. "
            "Finish a run of pipelines/full.py there, give its tracking URI, or give a local folder."
        )
    files = client.get_model_version_download_uri(name, version.version)
    with one_line_errors(tracking_uri):
        folder = _fetch(files, f"{name}-{version.version}-{version.creation_timestamp}")
    export = _check_export(_find_export(folder), source)
    promised = (version.tags or {}).get(Tag.WEIGHTS)
    if promised and (found := digest_weights(export)) != promised:
        raise ArtifactError(
            f"{source}: the weights in {export} have digest {found}, version {version.version} was registered with {promised}; "
            "they were changed since. Restore them, or register the model again."
        )
    return export


def find_versions(client: Client, query: str) -> list[Version]:
    """The versions that MLflow finds for a query, newest first."""
    found = [client.get_model_version(item.name, item.version) for item in client.search_model_versions(query)]
    return [
        Version(
            digest=each.tags.get(Tag.SHARDS, ""),
            run_id=each.run_id or "",
            name=each.name,
            version=str(each.version),
            aliases=tuple(each.aliases),
            gate=each.tags.get(Tag.DECISION, "not asked"),
            reason=each.tags.get(Tag.REASON, ""),
        )
        for each in sorted(found, key=lambda each: -int(each.version))
    ]


def find_trained_models(client: Client, digests: Sequence[str]) -> list[Version]:
    """Versions tagged with one of the shard digests, then training runs with such a data set and no version."""

    def find_parent(run_id: str) -> str:
        return client.get_run(run_id).data.tags.get(Tag.PARENT, run_id)

    found = [each for digest in digests for each in find_versions(client, f"tags.`{Tag.SHARDS}` = '{digest}'")]
    registered = {find_parent(each.run_id) for each in found if each.run_id}
    for digest in digests:
        query = f"datasets.digest = '{digest[:36]}' and tags.`{Tag.STAGE}` = 'train'"
        runs = [run.info.run_id for run in client.search_runs(client.list_experiments(), query)]
        found += [Version(digest, run_id) for run_id in runs if find_parent(run_id) not in registered]
    return found


def _fetch(uri: str, cache_name: str) -> Path:
    """Local folder of a model's files; those of a local store are used in place."""
    import mlflow

    scheme = urlsplit(uri).scheme
    if scheme in ("", "file"):
        return Path(url2pathname(urlsplit(uri).path)) if scheme else Path(uri)
    cached = Path.home() / ".cache" / "refalign" / "models" / cache_name
    if not cached.is_dir():
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cached.parent, prefix=f".{cache_name}.") as aside:
            Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=aside)).rename(cached)
    return cached


def _find_export(folder: Path) -> Path:
    """MLflow names the copied folder after the one it came from; the model's own record says how."""
    from mlflow.exceptions import MlflowException
    from mlflow.models import Model
    from yaml import YAMLError

    try:
        export = folder / Model.load(str(folder)).flavors["python_function"]["artifacts"][_EXPORT]["path"]
    except (MlflowException, YAMLError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ArtifactError(f"{folder}: its MLmodel describes no model of refalign ({error!r}); register it again.") from error
    if not export.resolve().is_relative_to(folder.resolve()):
        raise ArtifactError(f"{folder}: its MLmodel names weights outside of it ({export}); register it again.")
    return export


def _check_export(folder: Path, source: str) -> Path:
    """The folder itself, or the ``export`` of a train step's folder."""
    for candidate in (folder, folder / _EXPORT):
        if (candidate / _MARKER).is_file():
            return candidate
    raise ArtifactError(f"{source}: no model there (looked for {folder / _MARKER}); give a models:/ URI or an exported folder.")


def _find_logged_model(tracked: TrackedRun, key: str) -> str | None:
    """A model that was uploaded whole before the process ended; an unfinished upload is not READY."""
    from mlflow.entities import LoggedModelStatus

    found = tracked.client.search_logged_models([tracked.experiment_id], filter_string=f"tags.`{Tag.KEY}` = '{key}'")
    return next((model.model_id for model in found if model.status == LoggedModelStatus.READY), None)


def _log_model(tracked: TrackedRun, config: RunConfig, key: str, export_folder: Path) -> str:
    """Uploads weights, this package's code and the model file. Returns the logged model's id."""
    import mlflow

    # MLflow warns of a missing input example, which would run the model here, and of missing type hints, which would drop
    # misspelt columns. Its own filter of warnings stands before any other.
    run_id, silent = tracked.child("register"), warnings.catch_warnings(record=True)
    with one_line_errors(tracked.uri), mlflow.start_run(run_id=run_id), tempfile.TemporaryDirectory() as folder, silent:
        code = Path(folder) / _PACKAGE_FOLDER.name
        shutil.copytree(_PACKAGE_FOLDER, code, ignore=shutil.ignore_patterns("weights", "__pycache__"))
        info = mlflow.pyfunc.log_model(
            name=config.tracking.model_name,
            python_model=str(Path(__file__).with_name("model_file.py")),
            artifacts={_EXPORT: str(export_folder)},
            model_config=make_generation_settings(config).model_dump(),
            signature=_make_signature(config),
            code_paths=[str(code)],
            pip_requirements=[f"{package}=={metadata.version(package).partition('+')[0]}" for package in _PACKAGES],
            tags={Tag.KEY: key},
        )
    return info.model_id


def _make_signature(config: RunConfig) -> ModelSignature:
    """Parameters and answer. Rows have no schema: MLflow drops columns that a schema lacks without a word, misspelt ones too."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    kinds = {int: "long", float: "double", str: "string"}
    settings = make_generation_settings(config).model_dump(exclude=set(FACTS))
    params = [ParamSpec(name, kinds[type(value)], value) for name, value in settings.items()]
    return ModelSignature(outputs=Schema([ColSpec("string", "video")]), params=ParamSchema(params))
