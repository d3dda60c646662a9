"""One way to load a pretrained part, from a local folder or a hub id, with one-line errors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refalign.config import ModelsConfig, make_fingerprint
from refalign.errors import ArtifactError
from refalign.geometry import Grid
from refalign.io.storage import digest_sampled
from refalign.io.untrusted import parse_json_object

if TYPE_CHECKING:
    from torch import Tensor  # slow to import; the driver reads configs without it

ENCODERS = ("vae", "text_encoder", "tokenizer")
"""Subfolders of a base model with its frozen parts."""


def looks_local(source: str) -> bool:
    """Whether ``source`` means a path rather than a hub id or the name of published weights."""
    return Path(source).expanduser().exists() or source.startswith((".", "/", "~")) or source.count("/") > 1


def check_local(source: str, setting: str) -> None:
    """Raises an `ArtifactError` if ``source`` is a path where nothing is, before anything is started for it."""
    if looks_local(source) and not Path(source).expanduser().exists():
        raise ArtifactError(f"{setting}={source}: nothing is there; give a folder in the hub's layout, or a hub id.")


def identify_model(source: str, revision: str | None = None, *, parts: Sequence[str] = ()) -> str:
    """What a fingerprint says of a model: the content of a local one, id and revision of a hub's.

    Args:
        parts: subfolders that count; none: all of it.
    """
    path = Path(source).expanduser()
    if not path.exists():
        return f"{source}@{revision}"
    folders = [path / part for part in parts] or [path]
    files = sorted(file for folder in folders for file in folder.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return make_fingerprint([[file.relative_to(path).as_posix(), digest_sampled(str(file))] for file in files])


def load_model_config(source: str, *, subfolder: str | None = None, revision: str | None = None) -> dict[str, Any]:
    """The ``config.json`` of a model; arguments and errors are those of `load_pretrained`. No weight is read."""
    if looks_local(source):
        path = Path(source).expanduser() / (subfolder or "") / "config.json"
        if not path.is_file():
            raise ArtifactError(f"{path}: not found; give a folder in the hub's layout or a hub id.")
        try:
            return parse_json_object(path.read_text())
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{path}: damaged ({error}); restore it.") from error
    from huggingface_hub import hf_hub_download

    try:
        return parse_json_object(Path(hf_hub_download(source, "config.json", subfolder=subfolder, revision=revision)).read_text())
    except Exception as error:
        raise ArtifactError(_advise(source, subfolder, error)) from error


def load_grid(models: ModelsConfig) -> Grid:
    """The grid of the base model, from a local folder's config files. For a hub id it is Wan2.1's, and the hub is not asked.

    The encoders of the shards step check the real one.

    Raises:
        ArtifactError: a config.json is missing or damaged.
        GeometryError: VAE and Transformer make no grid.
    """
    if not looks_local(models.base):
        return Grid()
    return Grid.of(*(load_model_config(models.base, subfolder=part) for part in ("vae", "transformer")))


def load_pretrained(cls: Any, source: str, *, subfolder: str | None = None, revision: str | None = None, **kwargs: Any) -> Any:
    """Calls ``cls.from_pretrained`` on a local folder or a hub id.

    Args:
        source: an existing local folder, or a hub id such as ``facebook/dinov3-vitl16-pretrain-lvd1689m``.
        subfolder: folder below ``source`` (``vae``, ``transformer`` ... in the diffusers layout).
        revision: hub revision; ignored for local folders.

    Raises:
        ArtifactError: a file is missing, or is a pickle or code, the hub cannot be reached, or the model is gated.
    """
    if looks_local(source):
        source, revision = str(Path(source).expanduser()), None
        if not (folder := Path(source, subfolder or "")).is_dir():
            raise ArtifactError(f"{folder}: no such model folder; give a folder in the hub's layout or a hub id.")
    given = {"subfolder": subfolder, "revision": revision}
    kwargs |= {name: value for name, value in given.items() if value}
    has_weights = hasattr(cls, "load_state_dict")
    if not has_weights:  # the Auto classes: without this they ask at the terminal whether to run a folder's own code
        kwargs["trust_remote_code"] = False
    if has_weights or hasattr(cls, "from_config"):
        kwargs["use_safetensors"] = True  # a .bin file is a pickle
    try:
        return cls.from_pretrained(source, **kwargs)
    except Exception as error:
        raise ArtifactError(_advise(source, subfolder, error)) from error


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU, read when they are used; an `ArtifactError` if it is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        text = " ".join(str(error).split())[:160]
        raise ArtifactError(f"{path}: not a readable safetensors file ({text}); restore it.") from error


def _advise(source: str, subfolder: str | None, error: Exception) -> str:
    """One line that says what to do, from the hub clients' many exceptions."""
    name = f"{source}/{subfolder}" if subfolder else source
    text = " ".join(str(error).split())[:200]
    if looks_local(source):
        return f"{name}: this folder cannot be loaded ({text}); check that it is complete and of the hub's layout."
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    kinds = {type(link).__name__ for link in chain}
    if "GatedRepoError" in kinds or "gated" in text.lower():
        return f"{name}: gated on the hub; accept its licence on the model page, then set HF_TOKEN and run again."
    if "RepositoryNotFoundError" in kinds:
        return f"{name}: no such model on the hub (or it is private); check the id, or set HF_TOKEN."
    return f"{name}: could not be loaded from the hub ({text}); check the network, or give a local folder instead."
