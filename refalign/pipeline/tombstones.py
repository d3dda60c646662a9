"""What was taken down: ``tombstones.jsonl`` in the output folder, which every later plan consults."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from refalign.errors import ArtifactError
from refalign.io.untrusted import parse_json_object
from refalign.io.writing import write_bytes

FILE_NAME = "tombstones.jsonl"


@dataclass(frozen=True)
class Tombstone:
    """One source that must not be used.

    Attributes:
        source: what the request named.
        reason: why, in the words of whoever asked.
        date: of the request, ISO 8601.
        video_ids: videos that go as a whole, by content: a copy under another name does not come back either.
        source_groups: groups that go as a whole, with videos that are still to come.
        clips: clips that go, by id, with their ``video_id``, ``start_s``, ``end_s`` and number of ``subjects``.
        digests: of the shards that held any of them.
        folders: of the steps that held any of them.
        finished: when all parts had been rewritten; empty before.
    """

    source: str
    reason: str
    date: str
    video_ids: list[str] = field(default_factory=list)
    source_groups: list[str] = field(default_factory=list)
    clips: dict[str, dict[str, Any]] = field(default_factory=dict)
    digests: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
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
    """Adds it, in place of the one of the same source."""
    stones = {each.source: each for each in load_tombstones(output)} | {stone.source: stone}
    lines = [json.dumps(asdict(each), ensure_ascii=False, sort_keys=True) for each in stones.values()]
    write_bytes(Path(output) / FILE_NAME, "".join(f"{line}\n" for line in lines).encode())


def check_finished(output: Path) -> None:
    """Refuses to go on with data of which a part was to be removed.

    Raises:
        ArtifactError: a takedown was interrupted.
    """
    for stone in load_tombstones(output):
        if not stone.finished:
            raise ArtifactError(
                f"{output}: the takedown of {stone.source} was interrupted; finish it first: "
                f"pipelines/shards.py remove --source {stone.source} --output {output}"
            )


def find_tombstone(stones: Iterable[Tombstone], video_id: str, name: str, path: str, group: str) -> Tombstone | None:
    """The one that a video lies under, by its content, its name, its location or its source group."""
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
