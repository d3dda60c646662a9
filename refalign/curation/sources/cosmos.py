"""The output folder of nvidia-cosmos/cosmos-curate: ``clips/<uuid>.mp4`` described by ``metas/v0/<uuid>.json``.

A description has ``source_video``, ``duration_span``, the clip's ``framerate`` and ``windows`` (``start_frame``, ``end_frame``
inclusive, and one ``<model>_caption`` for each captioning model). Clips that cosmos-curate itself rejected lie in
``filtered_clips/`` and count as filtered.

Source: ``cosmos_curate/pipelines/video/read_write/metadata_writer_stage.py`` of that repository.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from refalign.config import InputConfig
from refalign.curation.sources.folder import read_description
from refalign.curation.sources.source_video import SourceVideo, make_source, refuse
from refalign.errors import DataError
from refalign.io import storage
from refalign.io.untrusted import parse_json
from refalign.pipeline.outcomes import Outcome

METAS = "metas/v0/"


def iter_cosmos(names: set[str], folder: str, config: InputConfig, named: set[str]) -> Iterator[SourceVideo | Outcome]:
    """Every clip that a description names, and every clip without one; their names and the descriptions' go into ``named``."""
    metas = sorted(name for name in names if name.startswith(METAS) and name.endswith(".json"))
    described = set()
    for meta in metas:
        clip = f"clips/{PurePosixPath(meta).stem}.mp4"
        described.add(clip)
        named |= {meta, clip, clip.replace("clips/", "filtered_clips/", 1)}
        try:
            said = _read_meta(storage.join(folder, meta))
            if clip not in names:
                rejected = clip.replace("clips/", "filtered_clips/", 1) in names or "filtered_clips" in said["clip_location"]
                reason = "FILTERED_BEFORE" if rejected else "MISSING"
                raise DataError(reason, "cosmos-curate filtered it out" if rejected else "no such clip in the folder")
            yield make_source(storage.resolve(storage.join(folder, clip)), clip, said, config)
        except DataError as error:
            yield refuse(clip, error)
    for name in sorted(names - described):
        if name.startswith("clips/") and name.endswith(".mp4"):
            named.add(name)
            yield make_source(storage.resolve(storage.join(folder, name)), name, {}, config)


def _read_meta(location: str) -> dict[str, Any]:
    """Caption, shots and source group, as a sidecar would say them."""
    data = read_description(location)
    try:
        meta = parse_json(data)
        fps = float(meta.get("framerate") or meta["framerate_source"])
        shots = [
            {"start_s": window["start_frame"] / fps, "end_s": (window["end_frame"] + 1) / fps, "caption": caption}
            for window in meta.get("windows") or ()
            if (caption := _caption_of(window))
        ]
        return {
            "caption": shots[0]["caption"] if shots else "",
            "shots": shots,
            "source_group": str(meta["source_video"] or ""),
            "clip_location": str(meta.get("clip_location") or ""),
        }
    except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError, OverflowError) as error:
        name = PurePosixPath(location).name
        raise DataError("BAD_SIDECAR", f"{METAS}{name} is no description of cosmos-curate: {error!r}") from error


def _caption_of(window: dict[str, Any]) -> str:
    """The first model's caption, an enhanced one before a plain one."""
    captions = {key: value for key, value in window.items() if key.endswith("_caption") and value}
    enhanced = [value for key, value in captions.items() if key.endswith("_enhanced_caption")]
    return next(iter([*enhanced, *captions.values()]), "")
