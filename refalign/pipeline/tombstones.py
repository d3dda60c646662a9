"""What was taken down: ``tombstones.jsonl`` in the output folder, which every later plan reads."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypedDict

from refalign.errors import ArtifactError
from refalign.io.untrusted import parse_json_object
from refalign.io.writing import write_bytes

FILE_NAME = "tombstones.jsonl"


class Clip(TypedDict):
    """Where a clip is from: its video, and the time in it in seconds."""

    video_id: str
    video_path: str
    source_group: str
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Tombstone:
    """One source that must not be used.

    Attributes:
        source: what the request named.
        reason: why, in the words of whoever asked.
        date: of the request, ISO 8601.
        video_ids: videos that are removed as a whole, by content, so that a copy under another name is removed too.
        source_groups: groups that are removed as a whole, with videos that are still to come.
        clips: clips that are removed, by id.
        held: folders of the steps that held any of them; for shards, the digests of those that did.
        parts: the deleted parts of subjects and shards, by folder and name, with the items that stay in each: digests of the work
            of videos, and ids of clips. Later plans keep them together, so that no other part changes.
        beside: clips of other sources in such parts; they may be taken down before the parts are made again.
        finished: when all of it had been deleted; empty before.
    """

    source: str
    reason: str
    date: str
    video_ids: list[str] = field(default_factory=list)
    source_groups: list[str] = field(default_factory=list)
    clips: dict[str, Clip] = field(default_factory=dict)
    held: dict[str, list[str]] = field(default_factory=dict)
    parts: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    beside: dict[str, Clip] = field(default_factory=dict)
    finished: str = ""

    def explain(self, item: str) -> str:
        """One line for an outcome."""
        return f"{item}: taken down on {self.date[:10]} ({self.reason or 'no reason given'})"


def load_tombstones(output: Path) -> list[Tombstone]:
    """All of an output folder, the oldest first.

    Raises:
        ArtifactError: the file is damaged.
    """
    path = Path(output) / FILE_NAME
    if not path.is_file():
        return []
    try:
        return [Tombstone(**parse_json_object(line)) for line in path.read_text().splitlines()]
    except (ValueError, TypeError) as error:
        raise ArtifactError(f"{path}: damaged ({error}); restore it: without it, what was taken down comes back.") from error


def save_tombstone(output: Path, stone: Tombstone) -> None:
    """Adds it, or replaces the one of the same source."""
    stones = {each.source: each for each in load_tombstones(output)} | {stone.source: stone}
    lines = [json.dumps(asdict(each), ensure_ascii=False, sort_keys=True) for each in stones.values()]
    write_bytes(Path(output) / FILE_NAME, "".join(f"{line}\n" for line in lines).encode())


def check_finished(output: Path, *, besides: str = "") -> None:
    """Refuses to go on while a takedown is unfinished, except that of the source ``besides``.

    Raises:
        ArtifactError: a takedown was interrupted.
    """
    for stone in load_tombstones(output):
        if not stone.finished and stone.source != besides:
            raise ArtifactError(
                f"{output}: the takedown of {stone.source} was interrupted; finish it first: "
                f"pipelines/shards.py remove --source {stone.source} --output {output}"
            )


def load_kept(folder: Path) -> dict[str, list[str]]:
    """The parts of a step that takedowns deleted, with the items that stay in them (`Tombstone.parts`)."""
    kept: dict[str, list[str]] = {}
    for stone in load_tombstones(folder.parent):
        kept |= stone.parts.get(folder.name, {})
    return kept


def find_tombstone(stones: Iterable[Tombstone], video_id: str, name: str, path: str, group: str) -> Tombstone | None:
    """The one that removes a video, by its content, its name, its location or its source group."""
    for stone in stones:
        if video_id in stone.video_ids or group in stone.source_groups or stone.source in (name, path):
            return stone
    return None


def find_removed_times(stones: Sequence[Tombstone], video_id: str) -> list[list[float]]:
    """Start and end in seconds of the clips of a video that were taken down one by one."""
    return sorted(
        [clip["start_s"], clip["end_s"]]
        for stone in stones
        if video_id not in stone.video_ids
        for clip in stone.clips.values()
        if clip["video_id"] == video_id
    )
