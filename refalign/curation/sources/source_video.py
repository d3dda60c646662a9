"""One video to curate, as every kind of source describes it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from refalign.config import InputConfig
from refalign.errors import DataError
from refalign.io import storage
from refalign.pipeline.outcomes import Outcome

CAPTION_NAMES = ("caption", "text", "prompt", "video_caption")
"""What sidecars and tables call a caption; the first that says something holds."""


@dataclass(frozen=True)
class SourceVideo:
    """One file to curate, with what its source says about it.

    Attributes:
        path: absolute local path, or an ``s3://`` or ``gs://`` URI.
        name: what reports call it, unique within the input: the path below the input folder, or a clip's name.
        source_group: videos that may show the same subjects; pairs are made within a group, and splits never cut one.
        shots: captions of parts of the video; where one covers the middle of a clip it is the clip's.
        annotation_at: where an OpenS2V entry lies (``file``, ``start``, ``end``), its ``cut`` and ``digest``; None where
            subjects must be detected. Entries are tens of kilobytes and millions: they are read where they are used.
        annotation: the entry itself, once `open_source` has read it.
    """

    path: str
    name: str
    caption: str = ""
    license: str = "unknown"
    consent: str = "unknown"
    source_group: str = ""
    shots: tuple[dict[str, Any], ...] = ()
    annotation_at: dict[str, Any] | None = None
    annotation: dict[str, Any] | None = None

    def caption_at(self, time_s: float) -> str:
        """The caption that holds at a time."""
        return next((shot["caption"] for shot in self.shots if shot["start_s"] <= time_s < shot["end_s"]), self.caption)

    def to_identity(self) -> dict[str, Any]:
        """What the rows made of this video depend on; where its files lie is not part of it."""
        described = {key: value for key, value in asdict(self).items() if key not in ("path", "annotation", "annotation_at")}
        return {**described, "annotation": self.annotation_at["digest"] if self.annotation_at else None}


def make_source(path: str, name: str, said: dict[str, Any], config: InputConfig) -> SourceVideo:
    """The source that a sidecar or a table row describes; keys it does not know are left alone.

    Args:
        said: any of ``caption`` (or another of `CAPTION_NAMES`), ``license``, ``consent``, ``source_group`` and ``shots``; None,
            NaN and empty texts count as not said.

    Raises:
        DataError: BAD_SIDECAR: a value of another type than text, or a shot without its times.
    """
    return SourceVideo(
        path=path,
        name=name,
        caption=read_caption(said)[1],
        license=read_text(said, "license", config.license),
        consent=read_text(said, "consent", "unknown"),
        source_group=read_text(said, "source_group", name),
        shots=_read_shots(said.get("shots")),
    )


def read_caption(said: dict[str, Any]) -> tuple[str, str]:
    """The name that holds the caption, and the caption; two empty texts where there is none.

    Raises:
        DataError: as `read_text`, of ``caption``; under the other names something else may stand, which is no caption.
    """
    for name in CAPTION_NAMES:
        if (name == "caption" or isinstance(said.get(name), str)) and (text := read_text(said, name, "")):
            return name, text
    return "", ""


def read_text(said: dict[str, Any], key: str, default: str) -> str:
    """A text of a description, or the default where it says nothing.

    Raises:
        DataError: BAD_SIDECAR: not a text, or one that UTF-8 cannot write.
    """
    text = said.get(key)
    if text is None or text != text:  # tables write NaN where nothing stands
        return default
    if not isinstance(text, str):
        raise DataError("BAD_SIDECAR", f"{key} is a {type(text).__name__}, expected text")
    if not storage.is_utf8(text):
        raise DataError("BAD_SIDECAR", f"{key} holds half a surrogate pair, expected UTF-8 text")
    return text if text.strip() else default


def _read_time(value: Any, what: str) -> float:
    try:
        time_s = float(value)
    except (TypeError, ValueError, OverflowError):
        time_s = math.nan
    if not math.isfinite(time_s):
        raise DataError("BAD_SIDECAR", f"{what} is missing or not a number")
    return time_s


def _read_shots(shots: Any) -> tuple[dict[str, Any], ...]:
    if shots is None:
        return ()
    if not isinstance(shots, list | tuple) or not all(isinstance(shot, dict) for shot in shots):
        raise DataError("BAD_SIDECAR", "shots is no list of objects with start_s, end_s and caption")
    read: list[dict[str, Any]] = []
    for number, shot in enumerate(shots):
        times = {name: _read_time(shot.get(name), f"shots[{number}]: {name}") for name in ("start_s", "end_s")}
        read.append(times | {"caption": read_text(shot, "caption", "")})
    return tuple(read)


def refuse(name: str, error: DataError) -> Outcome:
    """The outcome of something that cannot become a source."""
    name = storage.show_name(name)
    message = str(error)
    return Outcome("video", name, error.reason, message if message.startswith(name) else f"{name}: {message}")
