"""The table that every input becomes, and the rules that all formats share.

A format's reader yields one `SourceRow` for each video or file: where it lies and what is said of it, or why it cannot be used.
`finish_rows` reads sidecars, checks what is said, fills in what is not, and makes of each row a `SourceVideo` or an outcome.

A video may have sidecars of the same name: ``clip.txt`` (the caption) and ``clip.json`` with any of ``caption``, ``license``,
``consent``, ``source_group`` (videos that may show the same subjects: a channel, an owner, a long recording) and ``shots`` (a
list of ``start_s``, ``end_s``, ``caption``, where the caption changes within the video). Both are read; the JSON's caption holds
where both have one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, FiniteFloat, ValidationError

from refalign.config import CurationConfig, InputConfig
from refalign.errors import BackendUnavailable, DataError
from refalign.io import storage
from refalign.io.untrusted import parse_json_object
from refalign.pipeline.outcomes import Outcome, belongs_to_place
from refalign.pipeline.places import is_there

CAPTION_NAMES = ("caption", "text", "prompt", "video_caption")
"""What sidecars and tables call a caption; the first that says something holds."""
_MAX_SIDECAR_BYTES = 16 * 2**20


def _is_said(value: object) -> bool:
    """Tables write NaN where nothing stands."""
    return value is not None and value == value and not (isinstance(value, str) and not value.strip())


def _check_text(value: object) -> str:
    if not _is_said(value):
        return ""
    if not isinstance(value, str):
        raise ValueError(f"a {type(value).__name__}, expected text")
    if not storage.is_utf8(value):
        raise ValueError("half a surrogate pair, expected UTF-8 text")
    return value


Text = Annotated[str, BeforeValidator(_check_text)]
"""Empty where nothing is said."""


@dataclass(frozen=True)
class Shot:
    """The caption of a part of a video."""

    start_s: FiniteFloat
    end_s: FiniteFloat
    caption: Text = ""


class Description(BaseModel):
    """What a sidecar or a table row says of a video; other keys are left alone."""

    caption: Text = ""
    license: Text = ""
    consent: Text = ""
    source_group: Text = ""
    shots: Annotated[tuple[Shot, ...], BeforeValidator(lambda value: () if value is None else value)] = ()


@dataclass(frozen=True)
class EntryLocation:
    """Where an entry of an annotation lies, from byte ``start`` to before ``end``; ``digest`` is of these bytes.

    ``cut`` are the frames that it is about, as the entry writes them.
    """

    file: str
    start: int
    end: int
    digest: str
    cut: str


@dataclass(frozen=True)
class SourceRow:
    """What a format says of one video.

    Attributes:
        name: what reports call it.
        path: its location; relative ones are taken from ``folder``.
        said: what is said of it, unchecked, by the names of `Description`.
        sidecars: where its sidecars lie. None: beside it, if at all.
        blame: the reason of an outcome if ``said`` is not a `Description`.
        fault: why it cannot be used.
        takes: files of the input folder that this row accounts for.
    """

    name: str
    path: str = ""
    folder: str = ""
    said: Mapping[str, object] = field(default_factory=dict)
    sidecars: tuple[str, ...] | None = ()
    blame: str = "BAD_SIDECAR"
    entry: EntryLocation | None = None
    fault: DataError | None = None
    takes: tuple[str, ...] = ()


@dataclass(frozen=True)
class SourceVideo:
    """One file to curate, with what its source says about it.

    Attributes:
        path: absolute local path, or an ``s3://`` or ``gs://`` URI.
        name: what reports call it, unique within the input: the path below the input folder, or a clip's name.
        source_group: videos that may show the same subjects; pairs are made within a group, and splits never cut one.
        shots: captions of parts of the video; where one covers the middle of a clip it is the clip's.
        entry: its OpenS2V entry; None where subjects must be detected.
    """

    path: str
    name: str
    caption: str = ""
    license: str = "unknown"
    consent: str = "unknown"
    source_group: str = ""
    shots: tuple[Shot, ...] = ()
    entry: EntryLocation | None = None

    def caption_at(self, time_s: float) -> str:
        """The caption that holds at a time."""
        return next((shot.caption for shot in self.shots if shot.start_s <= time_s < shot.end_s), self.caption)

    def to_identity(self) -> dict[str, object]:
        """What the rows made of this video depend on; where its files lie is not part of it."""
        described = {key: value for key, value in asdict(self).items() if key not in ("path", "entry")}
        return {**described, "annotation": self.entry.digest if self.entry else None}


def finish_rows(rows: Iterable[SourceRow], config: InputConfig) -> list[SourceVideo | Outcome]:
    """The usable videos, and outcomes in place of the others. Sidecars are read in parallel: object stores answer slowly.

    Raises:
        BackendUnavailable: an object store does not answer.
    """

    def finish(row: SourceRow) -> SourceVideo | Outcome:
        try:
            if row.fault:
                raise row.fault
            path = storage.resolve(row.path, row.folder)
            said = _read_sidecars(row, path)
            with blaming(row.blame, "its description"):
                known = Description.model_validate({**said, "caption": said.get(find_caption(said))})
        except DataError as error:
            return refuse(row.name, error)
        return SourceVideo(
            path=path,
            name=row.name,
            caption=known.caption,
            license=known.license or config.license,
            consent=known.consent or "unknown",
            source_group=known.source_group or row.name,
            shots=known.shots,
            entry=row.entry,
        )

    return storage.in_parallel(finish, rows)


def identify_sources(
    sources: Sequence[SourceVideo | Outcome], config: CurationConfig
) -> Iterator[tuple[SourceVideo | Outcome, str]]:
    """Each source with its video id, in order; one whose file need not be opened to be refused becomes an outcome.

    Raises:
        BackendUnavailable: an object store does not answer, or none of the files is there.
    """

    def identify(source: SourceVideo | Outcome) -> tuple[SourceVideo | Outcome, str]:
        if isinstance(source, Outcome):
            return source, ""
        try:
            size_bytes = storage.size_of(source.path)
            if size_bytes == 0:
                raise DataError("EMPTY_FILE", "0 bytes")
            if size_bytes > config.max_video_bytes:
                raise DataError("TOO_LARGE", f"{size_bytes} bytes; curation.max_video_bytes is {config.max_video_bytes}")
            return source, storage.digest_sampled(source.path)
        except DataError as error:
            return refuse(source.name, error), ""

    identified = storage.in_parallel(identify, sources)
    videos = [(source.path, found) for source, (found, _) in zip(sources, identified) if isinstance(source, SourceVideo)]
    if videos and all(isinstance(found, Outcome) and belongs_to_place(found.reason) for _, found in videos):
        where = videos[0][0]
        raise BackendUnavailable(
            f"{where}: not there, nor any other of {len(videos)} videos that --input names; bring them back."
        )
    yield from identified


def refuse(name: str, error: DataError) -> Outcome:
    """The outcome of something that cannot become a source."""
    name = storage.show_name(name)
    message = str(error)
    return Outcome("video", name, error.reason, message if message.startswith(name) else f"{name}: {message}")


@contextmanager
def blaming(reason: str, what: str) -> Iterator[None]:
    """Makes a DataError of what Python raises where a description is not as expected."""
    try:
        yield
    except ValidationError as error:  # its message without the values, which may be of any size
        problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where, message = ".".join(map(str, problem["loc"])), problem["msg"].removeprefix("Value error, ")
        raise DataError(reason, ": ".join(filter(None, [what, where, message]))) from error
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise DataError(reason, f"{what}: {type(error).__name__}: {error}") from error


def find_caption(said: Mapping[str, object]) -> str:
    """The name that holds the caption. Under other names than ``caption`` something may stand that is no text, and no caption."""
    names = (name for name in CAPTION_NAMES if name == "caption" or isinstance(said.get(name), str))
    return next((name for name in names if _is_said(said.get(name))), "caption")


def name_sidecars(name: str) -> tuple[str, str]:
    """The names that a video's sidecars would have."""
    stem = name[: len(name) - len(PurePosixPath(name).suffix)]
    return f"{stem}.json", f"{stem}.txt"


def read_sidecar(location: str) -> bytes:
    """Its bytes.

    Raises:
        DataError: BAD_SIDECAR: it is far too large for a description; or as `storage.open_file`.
    """
    if storage.size_of(location) > _MAX_SIDECAR_BYTES:
        raise DataError("BAD_SIDECAR", f"{PurePosixPath(location).name} is larger than {_MAX_SIDECAR_BYTES} bytes")
    return storage.read_bytes(location)


def _read_sidecars(row: SourceRow, path: str) -> Mapping[str, object]:
    said = row.said
    sidecars = row.sidecars if row.sidecars is not None else filter(is_there, name_sidecars(path))
    for sidecar in sidecars:  # the JSON first
        if _is_said(said.get(find_caption(said))):
            break
        data = read_sidecar(sidecar)
        with blaming("BAD_SIDECAR", f"{PurePosixPath(sidecar).name} cannot be read"):
            is_text = sidecar.endswith(".txt")
            said = {**said, **({"caption": data.decode("utf-8-sig").strip()} if is_text else parse_json_object(data))}
    return said
