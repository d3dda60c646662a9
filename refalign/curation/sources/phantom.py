"""Phantom-Data (Koala36M part): a parquet of captions and cross pairs over clips that the user has fetched.

The clips lie anywhere below the table's folder, named ``<vid>.<video suffix>``. ``vid`` is ``<source video>_<start>_<end>``,
and the source video is the group in which pairs are looked for; clips that only serve as references are curated too.

The boxes of ``cross_pair`` are not used: they have no masks, and users measured that 14% of them (16:9; 29% of square videos) lie
outside of the only picture size that fits the others, which the data set does not record. Subjects are detected as usual.

Source: Chen et al., "Phantom-Data", and the README of Phantom-video/Phantom-Data; the released table calls ``vid`` ``video_id``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from refalign.config import InputConfig
from refalign.curation.sources.folder import is_hidden, is_video
from refalign.curation.sources.listing import list_files
from refalign.curation.sources.source_video import SourceVideo, read_text, refuse
from refalign.curation.sources.tables import iter_parquet
from refalign.errors import ConfigError, DataError
from refalign.io import storage
from refalign.io.untrusted import parse_json
from refalign.pipeline.outcomes import Outcome

LICENSE = "non-commercial research only (Phantom-Data)"
_ID_COLUMNS = ("vid", "video_id")


def is_phantom(columns: list[str]) -> bool:
    """Whether a parquet's columns are those of Phantom-Data's training table."""
    return {"video_caption", "cross_pair"} <= set(columns) and bool(set(_ID_COLUMNS) & set(columns))


def iter_phantom(
    files: list[str], folder: str, columns: list[str], config: InputConfig, named: set[str]
) -> Iterator[SourceVideo | Outcome]:
    """Every row of the tables, then the clips that only their references name; the names of all go into ``named``.

    Raises:
        ConfigError: a table is damaged, or no clip lies in the folder.
    """
    print("Phantom-Data is released for non-commercial research only; every row made from it says so.", flush=True)
    clips = {PurePosixPath(name).stem: name for name in list_files(folder)[0] if is_video(name) and not is_hidden(name)}
    if not clips:
        raise ConfigError(f"--input {folder}: Phantom-Data's table without clips; put them below this folder, as <vid>.mp4.")
    column = next(name for name in _ID_COLUMNS if name in columns)
    seen: set[str] = set()
    referred: set[str] = set()
    for file in files:
        for number, row in enumerate(iter_parquet(file, (column, "video_caption", "cross_pair")), start=1):
            here = f"{PurePosixPath(file).name} row {number}"
            try:
                vid = read_text(row, column, "")
                if vid not in clips:
                    raise DataError("MISSING" if vid else "BAD_ROW", f"{vid or here}: no clip of this name below {folder}")
                named.add(clips[vid])
                referred.update(_read_referred(row["cross_pair"]))
                seen.add(vid)
                yield _make_source(clips[vid], vid, read_text(row, "video_caption", ""), folder, config)
            except DataError as error:
                yield refuse(row[column] if isinstance(row[column], str) else here, error)
    for vid in sorted((referred - seen) & clips.keys()):
        named.add(clips[vid])
        yield _make_source(clips[vid], vid, "", folder, config)


def _make_source(clip: str, vid: str, caption: str, folder: str, config: InputConfig) -> SourceVideo:
    return SourceVideo(
        path=storage.resolve(storage.join(folder, clip)),
        name=clip,
        caption=caption,
        license=LICENSE if config.license == "unknown" else f"{config.license}; {LICENSE}",
        source_group=vid.rsplit("_", 2)[0],
    )


def _read_referred(cross_pair: Any) -> Iterator[str]:
    """Clips that the references of a row come from; the published column is JSON text, as a struct or map it does as well."""
    try:
        pairs = parse_json(cross_pair) if isinstance(cross_pair, str | bytes) else cross_pair
        pairs = dict(pairs or {})
        for pair in pairs.values():
            for group in (pair or {}).get("refer_result") or ():
                for reference in group if isinstance(group, list) else [group]:
                    yield str(reference["vid"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError("BAD_ANNOTATION", f"cross_pair cannot be read: {error!r}") from error
