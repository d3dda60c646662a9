"""The output folder of nvidia-cosmos/cosmos-curate: ``clips/<uuid>.mp4`` described by ``metas/v0/<uuid>.json``.

A description has ``source_video``, ``duration_span``, the clip's ``framerate`` and ``windows`` (``start_frame``, ``end_frame``
inclusive, and one ``<model>_caption`` for each captioning model). Clips that cosmos-curate itself rejected lie in
``filtered_clips/`` and count as filtered.

Source: ``cosmos_curate/pipelines/video/read_write/metadata_writer_stage.py`` of that repository.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import PurePosixPath

from refalign.curation.sources.rows import SourceRow, blaming, read_sidecar
from refalign.errors import DataError
from refalign.io import storage
from refalign.io.untrusted import parse_json

METAS = "metas/v0/"


def iter_cosmos(names: set[str], folder: str) -> Iterator[SourceRow]:
    """Every clip that a description names, and every clip without one."""
    metas = sorted(name for name in names if name.startswith(METAS) and name.endswith(".json"))
    described = {meta: f"clips/{PurePosixPath(meta).stem}.mp4" for meta in metas}
    for meta, clip in described.items():
        rejected = clip.replace("clips/", "filtered_clips/", 1)
        row = SourceRow(clip, storage.join(folder, clip), takes=(meta, clip, rejected))
        try:
            said = _read_meta(storage.join(folder, meta))
        except DataError as error:
            yield replace(row, fault=error)
            continue
        if clip in names:
            yield replace(row, said=said)
        elif rejected in names or "filtered_clips" in str(said["clip_location"]):
            yield replace(row, fault=DataError("FILTERED_BEFORE", "cosmos-curate filtered it out"))
        else:
            yield replace(row, fault=DataError("MISSING", "no such clip in the folder"))
    for name in sorted(names - set(described.values())):
        if name.startswith("clips/") and name.endswith(".mp4"):
            yield SourceRow(name, storage.join(folder, name), takes=(name,))


def _read_meta(location: str) -> dict[str, object]:
    """Caption, shots and source group, as a sidecar would say them."""
    data = read_sidecar(location)
    with blaming("BAD_SIDECAR", f"{METAS}{PurePosixPath(location).name} is no description of cosmos-curate"):
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


def _caption_of(window: Mapping[str, object]) -> object:
    """The first model's caption, an enhanced one before a plain one."""
    captions = {key: value for key, value in window.items() if key.endswith("_caption") and value}
    enhanced = [value for key, value in captions.items() if key.endswith("_enhanced_caption")]
    return next(iter([*enhanced, *captions.values()]), "")
