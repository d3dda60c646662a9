"""Phantom-Data (Koala36M part): a parquet of captions and cross pairs over clips that the user has fetched.

The clips lie anywhere below the table's folder, named ``<vid>.<video suffix>``. ``vid`` is ``<source video>_<start>_<end>``,
and the source video is the group in which pairs are looked for; clips that only serve as references are curated too.

The boxes of ``cross_pair`` are not used: they have no masks, and users measured that 14% of them (16:9; 29% of square videos) lie
outside of the only picture size that fits the others, which the data set does not record. Subjects are detected as usual.

Source: Chen et al., "Phantom-Data", and the README of Phantom-video/Phantom-Data; the released table calls ``vid`` ``video_id``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from refalign.config import InputConfig
from refalign.curation.sources.folder import is_hidden, is_video
from refalign.curation.sources.rows import SourceRow, blaming
from refalign.curation.sources.tables import iter_parquet
from refalign.errors import ConfigError, DataError
from refalign.io import storage
from refalign.io.untrusted import parse_json

LICENSE = "non-commercial research only (Phantom-Data)"
_ID_COLUMNS = ("vid", "video_id")


def is_phantom(columns: Collection[str]) -> bool:
    """Whether a parquet's columns are those of Phantom-Data's training table."""
    return {"video_caption", "cross_pair"} <= set(columns) and bool(set(_ID_COLUMNS) & set(columns))


def iter_phantom(
    files: Sequence[str], columns: Collection[str], names: Iterable[str], folder: str, config: InputConfig
) -> Iterator[SourceRow]:
    """Every row of the tables, then the clips that only their references name.

    Args:
        names: of all files below ``folder``.

    Raises:
        ConfigError: a table is damaged, or no clip lies in the folder.
    """
    print("Phantom-Data is released for non-commercial research only; every row made from it says so.", flush=True)
    clips = {PurePosixPath(name).stem: name for name in names if is_video(name) and not is_hidden(name)}
    if not clips:
        raise ConfigError(f"--input {folder}: Phantom-Data's table without clips; put them below this folder, as <vid>.mp4.")
    terms = LICENSE if config.license == "unknown" else f"{config.license}; {LICENSE}"

    def make_row(vid: str, caption: object) -> SourceRow:
        said = {"caption": caption, "license": terms, "source_group": vid.rsplit("_", 2)[0]}
        return SourceRow(clips[vid], storage.join(folder, clips[vid]), said=said, takes=(clips[vid],))

    column = next(name for name in _ID_COLUMNS if name in columns)
    seen: set[str] = set()
    referred: set[str] = set()
    for file in files:
        for number, cells in enumerate(iter_parquet(file, (column, "video_caption", "cross_pair")), start=1):
            here = f"{PurePosixPath(file).name} row {number}"
            vid = cells[column]
            if not isinstance(vid, str) or not vid.strip():
                yield SourceRow(here, fault=DataError("BAD_ROW", f"{here}: its {column} is {vid!r}, expected text"))
            elif vid not in clips:
                yield SourceRow(vid, fault=DataError("MISSING", f"{vid}: no clip of this name below {folder}"))
            else:
                row = make_row(vid, cells["video_caption"])
                try:
                    referred |= _read_referred(cells["cross_pair"])
                    seen.add(vid)
                except DataError as error:
                    row = replace(row, name=vid, fault=error)
                yield row
    for vid in sorted((referred - seen) & clips.keys()):
        yield make_row(vid, "")


def _read_referred(cell: Any) -> set[str]:
    """Clips that the references of a row come from; the published column is JSON text, as a struct or map it does as well."""
    with blaming("BAD_ANNOTATION", "cross_pair cannot be read"):
        pairs: Mapping[str, Any] = dict((parse_json(cell) if isinstance(cell, str | bytes) else cell) or {})
        groups = [group for pair in pairs.values() for group in (pair or {}).get("refer_result") or ()]
        return {str(each["vid"]) for group in groups for each in (group if isinstance(group, list) else [group])}
