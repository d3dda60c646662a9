"""Where videos come from: a folder, or a folder with an OpenS2V annotation. Both give the same `SourceVideo` rows.

A folder's video may have a sidecar of the same name: ``clip.txt`` (the caption) or ``clip.json`` with any of ``caption``,
``license``, ``consent``, ``source_group`` (videos that may show the same subjects: a channel, an owner, a long recording) and
``shots`` (a list of ``start_s``, ``end_s``, ``caption``, where the caption changes within the video).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refalign.config import InputConfig
from refalign.errors import ConfigError, DataError

VIDEO_SUFFIXES = frozenset(
    (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".ogv", ".3gp")
)


@dataclass(frozen=True)
class SourceVideo:
    """One file to curate, with what its source says about it.

    Attributes:
        name: path relative to the input folder, posix style; unique and stable.
        shots: captions of parts of the video; where one covers the middle of a clip it is the clip's.
        annotation: an OpenS2V clip entry; None where subjects must be detected.
    """

    path: Path
    name: str
    caption: str = ""
    license: str = "unknown"
    consent: str = "unknown"
    source_group: str = ""
    shots: tuple[dict[str, Any], ...] = ()
    annotation: dict[str, Any] | None = None

    def caption_at(self, time_s: float) -> str:
        """The caption that holds at a time."""
        return next((shot["caption"] for shot in self.shots if shot["start_s"] <= time_s < shot["end_s"]), self.caption)


def list_sources(config: InputConfig, folder: Path) -> list[SourceVideo | DataError]:
    """Everything in the input folder, sorted by name; what cannot be used stands as a `DataError` in its place.

    Raises:
        ConfigError: the folder is missing, no folder, or holds no file.
    """
    if not folder.exists():
        raise ConfigError(f"--input {folder}: no such folder; give a folder of videos.")
    if not folder.is_dir():
        raise ConfigError(f"--input {folder}: not a folder; give the folder that holds the videos.")
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    annotations = [path for path in files if path.suffix == ".json" and _is_opens2v(path)]
    sources = list(_iter_opens2v(annotations, config, folder) if annotations else _iter_folder(files, config, folder))
    if not sources:
        raise ConfigError(f"--input {folder}: no file in it; give a folder of videos ({', '.join(sorted(VIDEO_SUFFIXES))}).")
    return sources


def _iter_folder(files: list[Path], config: InputConfig, folder: Path) -> Iterator[SourceVideo | DataError]:
    videos = [path for path in files if path.suffix.lower() in VIDEO_SUFFIXES]
    sidecars = {path.with_suffix(suffix) for path in videos for suffix in (".json", ".txt")}
    for path in files:
        name = path.relative_to(folder).as_posix()
        if path in sidecars:
            continue
        if path.suffix.lower() not in VIDEO_SUFFIXES:
            yield DataError("NOT_A_VIDEO", f"{name}: not a video by its suffix")
            continue
        try:
            said = _read_sidecar(path)
        except DataError as error:
            yield DataError(error.reason, f"{name}: {error}")
            continue
        yield SourceVideo(
            path=path.resolve(),
            name=name,
            caption=str(said.get("caption", "")),
            license=str(said.get("license", config.license)),
            consent=str(said.get("consent", "unknown")),
            source_group=str(said.get("source_group", name)),
            shots=said.get("shots", ()),
        )


def _read_sidecar(video: Path) -> dict[str, Any]:
    try:
        if (sidecar := video.with_suffix(".json")).is_file():
            said = json.loads(sidecar.read_text())
            if not isinstance(said, dict):
                raise DataError("BAD_SIDECAR", f"{sidecar.name} holds a {type(said).__name__}, expected an object")
            shots = [
                {"start_s": float(shot["start_s"]), "end_s": float(shot["end_s"]), "caption": str(shot["caption"])}
                for shot in said.get("shots", ())
            ]
            return {**said, "shots": tuple(shots)}
        if (sidecar := video.with_suffix(".txt")).is_file():
            return {"caption": sidecar.read_text().strip()}
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise DataError("BAD_SIDECAR", f"the sidecar cannot be read: {error!r}") from error
    return {}


def _is_opens2v(path: Path) -> bool:
    """Whether the file looks like an OpenS2V annotation, from its first bytes (such files are gigabytes)."""
    with path.open("rb") as file:
        head = file.read(4096)
    return head.lstrip()[:1] == b"{" and b'"metadata"' in head and b'"cut"' in head


def _iter_opens2v(annotations: list[Path], config: InputConfig, folder: Path) -> Iterator[SourceVideo | DataError]:
    seen: set[str] = set()
    for file in annotations:
        try:
            entries = json.loads(file.read_text())
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{file}: this OpenS2V annotation is not valid JSON ({error}); restore the file.") from error
        for clip_name, entry in sorted(entries.items()):
            if clip_name in seen:
                continue
            seen.add(clip_name)
            try:
                yield _make_opens2v_source(clip_name, entry, config, folder)
            except DataError as error:
                yield error
            except (KeyError, TypeError, IndexError, AttributeError) as error:
                yield DataError("BAD_ANNOTATION", f"{clip_name}: the entry lacks {error}")


def _make_opens2v_source(clip_name: str, entry: dict[str, Any], config: InputConfig, folder: Path) -> SourceVideo:
    metadata = entry["metadata"]
    captions = metadata.get("cap") or [""]
    path = folder / metadata["path"]
    if not path.resolve().is_relative_to(folder.resolve()):
        raise DataError("OUTSIDE", f"{clip_name}: its path {metadata['path']!r} leaves the input folder")
    return SourceVideo(
        path=path.resolve(),
        name=clip_name,
        caption=str(captions[0] if isinstance(captions, list) else captions),
        license="Apache-2.0 (annotation)" if config.license == "unknown" else config.license,
        # The part of a long video: OpenS2V names them <video>_part<k>_step...
        source_group=clip_name.split("_part")[0],
        annotation=entry,
    )
