"""OpenS2V-5M: clips of local videos with boxes, masks, scores and captions in one JSON object by clip name.

Such a file is gigabytes, and one entry tens of kilobytes. Planning streams it and remembers where each entry lies; a worker
reads the entries of its own videos.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from refalign.config import InputConfig
from refalign.curation.sources.source_video import SourceVideo, refuse
from refalign.errors import ConfigError, DataError
from refalign.io import storage
from refalign.io.untrusted import parse_json
from refalign.pipeline.outcomes import Outcome
from refalign.pipeline.places import is_there

_CHUNK_BYTES = 1 << 20
_HEAD_BYTES = 4096
_SEPARATORS = b", \t\r\n"


def is_opens2v(file: str) -> bool:
    """Whether the file looks like an OpenS2V annotation, from its first bytes."""
    with storage.open_file(file) as stream:
        head = bytes(stream.read(_HEAD_BYTES))
    return head.lstrip()[:1] == b"{" and b'"metadata"' in head and b'"cut"' in head


def iter_opens2v(
    files: list[str], folder: str, config: InputConfig, named: set[str] | None = None
) -> Iterator[SourceVideo | Outcome]:
    """Every entry of the annotations, in their order; of two entries with one name the first.

    An entry's path is taken from ``folder``, or else from the annotation's own folder, or one between the two.

    Args:
        named: the locations that entries name are added to it.

    Raises:
        ConfigError: an annotation is not valid JSON.
    """
    seen: set[str] = set()
    named = set() if named is None else named
    for file in files:
        bases = _list_bases(file, folder)
        for name, entry, start, end, digest in _iter_entries(file):
            if name in seen:
                yield refuse(name, DataError("DUPLICATE", "a second entry of this name"))
                continue
            seen.add(name)
            try:
                path = _find_path(entry, folder, bases)
                named.add(path)
                source = _make_source(name, entry, path, config)
                at = {"file": file, "start": start, "end": end, "digest": digest, "cut": list(entry["metadata"]["cut"])}
                yield replace(source, annotation_at=at)
            except DataError as error:
                yield refuse(name, error)
            except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
                yield refuse(name, DataError("BAD_ANNOTATION", f"a field is missing or has a wrong value: {error!r}"))


def load_annotation(name: str, at: dict[str, Any]) -> dict[str, Any]:
    """The entry that `iter_opens2v` found.

    Raises:
        DataError: BAD_ANNOTATION: the file has changed since the plan was made, or the entry contradicts itself.
    """
    with storage.open_file(at["file"]) as stream:
        stream.seek(at["start"])
        data = bytes(stream.read(at["end"] - at["start"]))
    if _digest(data) != at["digest"]:
        raise DataError("BAD_ANNOTATION", f"{name}: {at['file']} has changed since the run was planned; run the command again")
    try:
        entry = parse_json(b"{" + data + b"}")[name]
        _check_entry(entry)
    except DataError as error:
        raise DataError(error.reason, f"{name}: {error}") from error
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
        raise DataError("BAD_ANNOTATION", f"{name}: a field is missing or has a wrong value: {error!r}") from error
    return entry


def _iter_entries(file: str) -> Iterator[tuple[str, Any, int, int, str]]:
    """Yields name, entry, first and last byte + 1 of the entry with its name, and a digest of these bytes.

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
                yield from _read_entries(b"".join(pending), position, names, is_last=depth == 0)
                pending.clear()
                names.clear()
        parser.close()
    except (ijson.JSONError, ValueError, SystemError) as error:  # the last is how its C code says that a number is too long
        reason = str(error.__cause__ or error).partition("\n")[0]
        raise ConfigError(
            f"{file}: this OpenS2V annotation is not valid JSON before byte {position} ({reason}); restore the file."
        ) from error


def _read_entries(data: bytes, position: int, names: list[str], *, is_last: bool) -> Iterator[tuple[str, Any, int, int, str]]:
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
        yield name, entry, end - len(data), end, _digest(data)


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


def _find_path(entry: dict[str, Any], folder: str, bases: list[str]) -> str:
    relative = entry["metadata"]["path"]
    if not isinstance(relative, str):
        raise DataError("BAD_ANNOTATION", f"its path is {relative!r}, expected text")
    paths = [storage.resolve(relative, base) for base in bases] if not storage.is_remote(relative) else [""]
    path = paths[0] if len(paths) == 1 else next((path for path in paths if is_there(path)), paths[0])
    if not _lies_in(path, folder):
        raise DataError("OUTSIDE", f"its path {relative!r} leaves the input folder")
    return path


def _make_source(name: str, entry: dict[str, Any], path: str, config: InputConfig) -> SourceVideo:
    metadata = entry["metadata"]
    entry["annotation"]["ann_frame_data"]["ann_frame_idx"]
    captions = metadata.get("cap") or [""]
    caption = (captions[0] if isinstance(captions, list) else captions) or ""
    if not isinstance(caption, str) or not storage.is_utf8(name + caption):
        raise DataError("BAD_ANNOTATION", f"its name or caption {caption!r} is no UTF-8 text")
    return SourceVideo(
        path=path,
        name=name,
        caption=caption,
        license="Apache-2.0 (annotation)" if config.license == "unknown" else config.license,
        # The part of a long video: OpenS2V names them <video>_part<k>_step...
        source_group=name.split("_part")[0],
    )


def _lies_in(path: str, folder: str) -> bool:
    """Whether the path stays in the folder, links followed: an annotation comes from strangers."""
    if storage.is_remote(folder):
        return path.startswith(f"{folder.rstrip('/')}/")
    try:
        return bool(path) and Path(path).resolve().is_relative_to(Path(folder).resolve())
    except (OSError, RuntimeError):  # a loop of links
        return True


def _check_entry(entry: dict[str, Any]) -> None:
    """Refuses numbers that no frame can have, before anything is decoded.

    A box may stand over the frame's edge, as detectors draw them; what lies outside is cut off later.
    """
    metadata, marked = entry["metadata"], entry["annotation"]
    first, end = metadata["cut"]
    frame = marked["ann_frame_data"]["ann_frame_idx"]
    if not all(isinstance(value, int) for value in (first, end, frame)) or not 0 <= first < end or not 0 <= frame < end - first:
        raise DataError(
            "BAD_ANNOTATION", f"cut [{first!r}, {end!r}] and frame {frame!r}: expected 0 <= first < end, frame inside"
        )
    left, right, top, bottom = (float(value) for value in metadata["crop"])
    if not (0 <= left < right < math.inf and 0 <= top < bottom < math.inf):
        raise DataError("BAD_ANNOTATION", f"crop {metadata['crop']} (x0, x1, y0, y1) is empty or begins outside of the frame")
    tags = (entry.get("word_tags") or {}).get("background") or []
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise DataError("BAD_ANNOTATION", f"word_tags.background is {tags!r}: expected a list of words")
    masks = marked["mask_annotation"][str(frame)]
    for index, found in enumerate(marked["ann_frame_data"]["annotations"]):
        x0, y0, x1, y1 = (float(value) for value in found["bbox"])
        scores = (float(found.get("aes_score") or 0), float(found.get("gme_score") or 0))
        if not (math.isfinite(x0 + y0 + x1 + y1) and x0 < x1 and y0 < y1 and all(map(math.isfinite, scores))):
            raise DataError("BAD_ANNOTATION", f"box {found['bbox']}, scores {scores}: expected finite x0 < x1, y0 < y1")
        if not isinstance(found["class_name"], str) or not storage.is_utf8(found["class_name"]):
            raise DataError("BAD_ANNOTATION", f"class_name {found['class_name']!r}: expected UTF-8 text")
        mask = masks[str(index + 1)]
        if not (isinstance(mask["counts"], str) and len(mask["size"]) == 2):
            raise DataError("BAD_ANNOTATION", f"mask {index + 1}: expected size [height, width] and counts as text")
