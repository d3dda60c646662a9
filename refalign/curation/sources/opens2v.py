"""OpenS2V-5M: clips of local videos with boxes, masks, scores and captions in one JSON object by clip name.

Such a file is gigabytes, and one entry tens of kilobytes. Planning streams it and remembers where each entry lies; a worker
reads the entries of its own videos.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, FiniteFloat, StrictInt, StrictStr, model_validator

from refalign.config import InputConfig
from refalign.curation.sources.rows import EntryLocation, SourceRow, Text, blaming
from refalign.errors import ConfigError, DataError
from refalign.io import storage
from refalign.io.untrusted import parse_json
from refalign.pipeline.places import is_there

_CHUNK_BYTES = 1 << 20
_HEAD_BYTES = 4096
_SEPARATORS = b", \t\r\n"
_MALFORMED = "a field is missing or has a wrong value"

Corners = tuple[FiniteFloat, FiniteFloat, FiniteFloat, FiniteFloat]
Score = Annotated[FiniteFloat, BeforeValidator(lambda value: value or 0.0)]


class Found(BaseModel):
    """One entity of an entry. A box may stand over the frame's edge, as detectors draw them; what lies outside is cut off later.

    Attributes:
        bbox: x0, y0, x1, y1, in pixels of the crop.
        size: height and width of the mask; ``counts`` are its run lengths (`refalign.curation.masks.decode_rle`).
    """

    class_name: Text
    bbox: Corners
    aes_score: Score = 0.0
    gme_score: Score = 0.0
    size: tuple[int, int]
    counts: StrictStr

    @model_validator(mode="after")
    def _has_area(self) -> Found:
        x0, y0, x1, y1 = self.bbox
        if not (x0 < x1 and y0 < y1):
            raise ValueError(f"box {list(self.bbox)}: expected x0 < x1, y0 < y1")
        return self


class Annotation(BaseModel):
    """An entry, with numbers that a video can have.

    Attributes:
        cut: first frame, and last frame + 1, of the clip in its video.
        frame: the one that boxes and masks are about, from the first of the cut.
        crop: x0, x1, y0, y1, in pixels of the frame as stored.
        background: classes that are the scene.
    """

    cut: tuple[StrictInt, StrictInt]
    frame: StrictInt
    crop: Corners
    background: frozenset[StrictStr] = frozenset()
    found: tuple[Found, ...] = ()

    @model_validator(mode="after")
    def _lies_inside(self) -> Annotation:
        first, end = self.cut
        if not (0 <= first < end and 0 <= self.frame < end - first):
            raise ValueError(f"cut [{first}, {end}] and frame {self.frame}: expected 0 <= first < end, frame inside")
        left, right, top, bottom = self.crop
        if not (0 <= left < right and 0 <= top < bottom):
            raise ValueError(f"crop {list(self.crop)} (x0, x1, y0, y1) is empty or begins outside of the frame")
        return self

    @property
    def region_xyxy_px(self) -> tuple[int, int, int, int]:
        """The crop, in whole pixels."""
        left, right, top, bottom = map(int, self.crop)
        return left, top, right, bottom


def is_opens2v(file: str) -> bool:
    """Whether the file looks like an OpenS2V annotation, from its first bytes."""
    with storage.open_file(file) as stream:
        head = bytes(stream.read(_HEAD_BYTES))
    return head.lstrip()[:1] == b"{" and b'"metadata"' in head and b'"cut"' in head


def iter_opens2v(files: list[str], folder: str, config: InputConfig) -> Iterator[SourceRow]:
    """Every entry of the annotations, in their order; of two entries with one name the first.

    An entry's path is taken from ``folder``, or else from the annotation's own folder, or one between the two.

    Raises:
        ConfigError: an annotation is not valid JSON.
    """
    seen: set[str] = set()
    terms = {"license": "Apache-2.0 (annotation)"} if config.license == "unknown" else {}
    for file in files:
        bases = _list_bases(file, folder)
        for name, entry, location in _iter_entries(file):
            row = SourceRow(name, blame="BAD_ANNOTATION")
            try:
                if name in seen:
                    raise DataError("DUPLICATE", "a second entry of this name")
                seen.add(name)
                with blaming("BAD_ANNOTATION", _MALFORMED):
                    path = _find_path(entry["metadata"]["path"], folder, bases)
                    row = replace(row, path=path, takes=(path.removeprefix(f"{folder.rstrip('/')}/"),))
                    location = replace(location, cut=str(list(entry["metadata"]["cut"])))
                    row = replace(row, said=terms | _read_said(name, entry), entry=location)
            except DataError as error:
                row = replace(row, fault=error)
            yield row


def load_annotation(name: str, at: EntryLocation) -> Annotation:
    """The entry that `iter_opens2v` found.

    Raises:
        DataError: BAD_ANNOTATION: the file has changed since the plan was made, or the entry contradicts itself.
    """
    with storage.open_file(at.file) as stream:
        stream.seek(at.start)
        data = bytes(stream.read(at.end - at.start))
    if _digest(data) != at.digest:
        raise DataError("BAD_ANNOTATION", f"{name}: {at.file} has changed since the run was planned; run the command again")
    with blaming("BAD_ANNOTATION", f"{name}: {_MALFORMED}"):
        return parse_annotation(parse_json(b"{" + data + b"}")[name])


def parse_annotation(entry: Any) -> Annotation:
    """What is used of an entry.

    Raises:
        ValueError, TypeError, LookupError, AttributeError: a field is missing or has a wrong value.
    """
    metadata, marked = entry["metadata"], entry["annotation"]
    frame = marked["ann_frame_data"]["ann_frame_idx"]
    masks = marked["mask_annotation"][str(frame)]
    found = []
    for number, each in enumerate(marked["ann_frame_data"]["annotations"], start=1):
        mask = masks[str(number)]
        found.append(each | {"size": mask["size"], "counts": mask["counts"]})
    background = (entry.get("word_tags") or {}).get("background") or ()
    said = {"cut": metadata["cut"], "frame": frame, "crop": metadata["crop"], "background": background, "found": found}
    return Annotation.model_validate(said)


def _iter_entries(file: str) -> Iterator[tuple[str, Any, EntryLocation]]:
    """The entries of an annotation, each with where it and its name lie.

    ijson tells where entries end: it is fed pieces that end with a closing brace, so that an entry ends where a piece does.
    Its own values are not used, because their cost grows with the square of the nesting.
    """
    import ijson
    from ijson.utils import sendable_list

    events: list[tuple[str, Any]] = sendable_list()
    parser = ijson.basic_parse_coro(events)
    pending: list[bytes] = []
    names: list[str] = []
    position, depth = 0, 0
    try:
        for piece in _iter_pieces(file):
            position += len(piece)
            pending.append(piece)
            parser.send(piece)
            for event, value in events:
                names += [value] if event == "map_key" and depth == 1 else []
                depth += event.startswith("start_") - event.startswith("end_")
            ended = bool(events) and events[-1][0] == "end_map" and depth <= 1
            del events[:]
            if ended:
                yield from _read_entries(file, b"".join(pending), position, names, is_last=depth == 0)
                pending.clear()
                names.clear()
        parser.close()
    except (ijson.JSONError, ValueError, SystemError) as error:  # the last is how its C code says that a number is too long
        reason = str(error.__cause__ or error).partition("\n")[0]
        raise ConfigError(
            f"{file}: this OpenS2V annotation is not valid JSON before byte {position} ({reason}); restore the file."
        ) from error


def _read_entries(
    file: str, data: bytes, position: int, names: list[str], *, is_last: bool
) -> Iterator[tuple[str, Any, EntryLocation]]:
    """The entry, or one after others that are no objects, in the bytes that end at ``position``; None where it is too deep."""
    data, end = (data.rstrip()[:-1], position - 1) if is_last else (data, position)
    data = data.lstrip(_SEPARATORS)
    if data.startswith(b"{"):  # of the file
        data = data[1:].lstrip(_SEPARATORS)
    if not data:
        return
    try:
        entries = parse_json(b"{" + data + b"}")
    except ValueError:  # nested too deeply: ijson has found no other fault
        entries = dict.fromkeys(names)
    for name, entry in entries.items():
        yield name, entry, EntryLocation(file, end - len(data), end, _digest(data), "")


def _iter_pieces(file: str) -> Iterator[bytes]:
    with storage.open_file(file) as stream:
        while chunk := bytes(stream.read(_CHUNK_BYTES)):
            begin = 0
            while (end := chunk.find(b"}", begin) + 1) > 0:
                yield chunk[begin:end]
                begin = end
            if begin < len(chunk):
                yield chunk[begin:]


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _list_bases(file: str, folder: str) -> list[str]:
    """The folders that an annotation's paths may be relative to, the input folder first."""
    bases, base = [folder], storage.parent(file)
    while base.startswith(f"{folder.rstrip('/')}/"):
        bases.append(base)
        base = storage.parent(base)
    return bases


def _find_path(relative: object, folder: str, bases: list[str]) -> str:
    if not isinstance(relative, str):
        raise DataError("BAD_ANNOTATION", f"its path is {relative!r}, expected text")
    paths = [storage.resolve(relative, base) for base in bases] if not storage.is_remote(relative) else [""]
    path = paths[0] if len(paths) == 1 else next((path for path in paths if is_there(path)), paths[0])
    if not _lies_in(path, folder):
        raise DataError("OUTSIDE", f"its path {relative!r} leaves the input folder")
    return path


def _read_said(name: str, entry: Any) -> dict[str, object]:
    if not storage.is_utf8(name):
        raise DataError("BAD_ANNOTATION", "its name is no UTF-8 text")
    entry["annotation"]["ann_frame_data"]["ann_frame_idx"]
    captions = entry["metadata"].get("cap")
    # The part of a long video: OpenS2V names them <video>_part<k>_step...
    group = name.split("_part")[0]
    return {"caption": (captions[0] if captions and isinstance(captions, list) else captions) or "", "source_group": group}


def _lies_in(path: str, folder: str) -> bool:
    """Whether the path stays in the folder, links followed: an annotation comes from strangers."""
    if storage.is_remote(folder):
        return path.startswith(f"{folder.rstrip('/')}/")
    try:
        return bool(path) and Path(path).resolve().is_relative_to(Path(folder).resolve())
    except (OSError, RuntimeError):  # a loop of links
        return True
