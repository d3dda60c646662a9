"""Takedown: what holds something of a source is deleted in every version; the next run makes it again without the source.

The request is written down first, with all that it leads to (`pipeline.tombstones`), and marked finished last; no run starts in
between. After a kill the same command does the rest. A part goes with its commit, and data without a commit are deleted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from refalign.errors import ArtifactError
from refalign.io.storage import find_size, in_parallel, iter_files, join, kind_of, read_table
from refalign.io.tables import VERDICTS_PART
from refalign.io.writing import delete_file, delete_folder, write_json
from refalign.pipeline.clean import iter_places
from refalign.pipeline.steps import Step, iter_step_folders
from refalign.pipeline.summary import REPORTS, load_summary
from refalign.pipeline.tombstones import Clip, Tombstone, check_finished, load_tombstones, save_tombstone

_STAGES = ("subjects", "pairs", "shards", "evaluate")
"""Those that hold something of a source; each is made of those before it."""
_COLUMNS = ["clip_id", "video_id", "video_path", "source_group", "start_s", "fps", "num_frames"]


class _Part(NamedTuple):
    """What a takedown must know of a part.

    Attributes:
        shows: ids of the clips that it holds something of; None where that is not known.
        items: what it was made of, as plans name it: digests of the work of videos, or ids of clips.
        clips: of a subjects part, by id; its ``videos`` are ids by name.
    """

    location: str
    shows: frozenset[str] | None = frozenset()
    items: Sequence[str] = ()
    clips: Mapping[str, Clip] = MappingProxyType({})
    videos: Mapping[str, str] = MappingProxyType({})


class _Held(NamedTuple):
    """A step folder with its committed parts; ``digest`` is that of finished shards."""

    step: Step
    is_finished: bool
    made_of: frozenset[str]
    digest: str
    parts: Mapping[str, _Part]


def run_takedown(output: Path, source: str, *, reason: str, tracking_uri: str | None) -> None:
    """Takes a source down, also in MLflow, and prints what was removed, which models saw it, and what to do next.

    Raises:
        ArtifactError, BackendUnavailable: as `take_down`, or MLflow does not answer. The same command does the rest.
    """
    from refalign.tracking.client import make_tracking_uri, open_client
    from refalign.tracking.registry import Version, find_trained_models
    from refalign.tracking.run import delete_pictures

    output = Path(output).resolve()
    stone = take_down(output, source, reason=reason)
    videos = {*stone.video_ids, *(clip["video_id"] for clip in stone.clips.values())}
    print(f"removed   {len(stone.clips)} clips of {len(videos)} videos ({source}) from every version below {output}")
    models: list[Version] = []
    if tracking_uri or (output / "mlflow.db").is_file():
        client = open_client(make_tracking_uri(tracking_uri, output))
        delete_pictures(client, list(stone.held))
        models = find_trained_models(client, sorted({digest for of_step in stone.held.values() for digest in of_step}))
    for model in models:
        aliases = f" ({', '.join(model.aliases)})" if model.aliases else ""
        what = f"{model.name} version {model.version}{aliases}" if model.version else "trained and not registered"
        print(f"model     {what}: MLflow run {model.run_id}, shards {model.digest}")
    advice = f"{len(models)} models were trained on it; train them again or withdraw them"
    print(advice if models else "no model was trained on it")
    close_request(output, stone)
    print(
        "next      run the same command as before: the parts that held the source are gone, and it makes them again without it; "
        "until then the shards are not finished"
    )


def take_down(output: Path, source: str, *, reason: str = "") -> Tombstone:
    """Deletes all that holds something of a source and returns what it was; the request stays open until `close_request`.

    Args:
        source: a video's name in its input, its location or id, a source group, or a clip's id.

    Raises:
        ArtifactError: nothing here is called that, several videos are, or the takedown of another source was interrupted.
        BackendUnavailable: a process works in one of the step folders, or the object store does not answer.
    """
    output = Path(output).resolve()
    check_finished(output, besides=source)
    steps = [Step.open(folder) for folder in iter_step_folders(output)]
    with ExitStack() as stack:
        for step in steps:
            stack.enter_context(step.lease())
        stones = load_tombstones(output)
        held = [_look_into(step) for name in _STAGES for step in steps if step.name == name]
        stone = _resolve(held, stones, source, reason, output)
        doomed = _find_doomed(held, stone.clips)
        stone = _note(stone, stones, held, doomed)
        save_tombstone(output, stone)
        if not stone.finished:
            _delete(held, doomed)
            _forget_reports(output)
    return stone


def close_request(output: Path, stone: Tombstone) -> None:
    """Marks a takedown as finished."""
    save_tombstone(output, stone if stone.finished else dataclasses.replace(stone, finished=_now()))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _look_into(step: Step) -> _Held:
    manifest = step.load_manifest()
    # What an evaluation measured of a model shows nobody, and is a .json itself.
    names = [name for name in step.list_commits() if not name.startswith("separability-")]
    commits = zip(names, in_parallel(step.load_commit, names), strict=True)
    parts = {name: _describe_part(step, name, commit, manifest) for name, commit in commits if commit}
    said = manifest or {}
    return _Held(step, manifest is not None, frozenset(said.get("made_of", ())), said.get("digest", ""), parts)


def _describe_part(step: Step, name: str, commit: dict[str, Any], manifest: dict[str, Any] | None) -> _Part:
    location = step.locate(name, commit)
    if step.name == "subjects":
        rows = read_table(location, _COLUMNS).to_pylist() if find_size(location) is not None else []
        clips: dict[str, Clip] = {
            row["clip_id"]: {
                "video_id": row["video_id"],
                "video_path": row["video_path"],
                "source_group": row["source_group"],
                "start_s": row["start_s"],
                "end_s": row["start_s"] + row["num_frames"] / row["fps"],
            }
            for row in rows
        }
        return _Part(location, frozenset(clips), commit.get("work", ()), clips, commit["videos"])
    if step.name == "shards":
        items = [outcome["item"] for outcome in commit["outcomes"]]
        references = [clip_id for sample in commit["samples"] for clip_id in sample["reference_clips"]]
        return _Part(location, frozenset(items + references), items)
    if step.name == "evaluate":
        # What a champion's videos were made from is said by another step; the gate makes them again.
        if manifest is None or name.startswith("champion-"):
            return _Part(location, None)
        shown = [sample for sample in manifest.get("samples", ()) if sample["key"] in name]
        references = [reference["subject_id"].rpartition("-s")[0] for sample in shown for reference in sample["references"]]
        return _Part(location, frozenset([sample["key"] for sample in shown] + references))
    return _Part(location)


def _resolve(held: Sequence[_Held], stones: Sequence[Tombstone], source: str, reason: str, output: Path) -> Tombstone:
    """The tombstone with all known clips of the source, of parts that are here or went with another source."""
    clips = {clip_id: clip for stone in stones for clip_id, clip in stone.beside.items()}
    videos: set[str] = set()
    for part in (part for each in held for part in each.parts.values()):
        clips |= part.clips
        videos |= {video_id for name, video_id in part.videos.items() if source in (name, video_id)}
    groups = {source} if any(clip["source_group"] == source for clip in clips.values()) else set()
    videos |= {clip["video_id"] for clip in clips.values() if source in clip.values()}
    if not videos and source not in clips:
        ending = {clip["video_path"]: clip["video_id"] for clip in clips.values() if clip["video_path"].endswith(f"/{source}")}
        videos = set(ending.values())
        if len(videos) > 1:
            raise ArtifactError(
                f"{source}: several videos have this name ({', '.join(sorted(ending)[:5])}); give the whole location of one."
            )
    stone = next((stone for stone in stones if stone.source == source), None)
    if not videos and source not in clips and stone is None:
        raise ArtifactError(
            f"{output}: no video, source group or clip is called {source}; give a name below the input folder, a location, or an "
            "id as the clip rows (subjects-*/parts) have it. Nothing was changed."
        )
    found = {clip_id: clip for clip_id, clip in clips.items() if clip["video_id"] in videos or clip_id == source}
    # A version with other settings cuts its clips elsewhere; what overlaps a removed clip shows the same.
    times = [clip for clip in found.values() if clip["video_id"] not in videos]
    found |= {clip_id: clip for clip_id, clip in clips.items() if any(_overlap(clip, other) for other in times)}
    stone = stone or Tombstone(source, reason, _now())
    return dataclasses.replace(
        stone,
        video_ids=sorted({*stone.video_ids, *videos}),
        source_groups=sorted({*stone.source_groups, *groups}),
        clips={**stone.clips, **found},
    )


def _overlap(clip: Clip, other: Clip) -> bool:
    return clip["video_id"] == other["video_id"] and clip["start_s"] < other["end_s"] and other["start_s"] < clip["end_s"]


def _find_doomed(held: Sequence[_Held], clips: Collection[str]) -> dict[str, list[str]]:
    """Parts that go, by step folder; a folder with none is made of others that go, and is not finished any more."""
    doomed: dict[str, list[str]] = {}
    for each in held:
        is_outdated = not each.made_of.isdisjoint(doomed)
        if each.step.name == "pairs":  # all depend on the verdicts on all clips; pictures of an evaluation do not
            is_redone = is_outdated or not each.is_finished
            found = [name for name in each.parts if is_redone and name.startswith((VERDICTS_PART, "pairs-"))]
        else:
            found = [name for name, part in each.parts.items() if part.shows is None or not part.shows.isdisjoint(clips)]
        if found or is_outdated:
            doomed[each.step.folder.name] = found
    return doomed


def _note(stone: Tombstone, stones: Sequence[Tombstone], held: Sequence[_Held], doomed: Mapping[str, list[str]]) -> Tombstone:
    """The tombstone with what nobody knows once the parts are gone; it is open again if there are any."""
    folders, parts, beside, is_new = dict(stone.held), dict(stone.parts), dict(stone.beside), stone not in stones
    for each in held:
        folder = each.step.folder.name
        gone = {name: each.parts[name] for name in doomed.get(folder, ())}
        digests = {digest for other in stones for digest in other.held.get(folder, ())}
        if each.step.name == "shards" and each.is_finished:
            digests.add(each.digest)
        # Unfinished shards may have held it before another takedown.
        if gone or (digests and not each.is_finished and not stone.finished):
            folders[folder] = sorted(digests)
        if gone and each.step.name in ("subjects", "shards"):
            is_new = True
            kept = {name: [item for item in part.items if item not in stone.clips] for name, part in gone.items()}
            parts[folder] = parts.get(folder, {}) | kept
        for part in gone.values():
            beside |= {clip_id: clip for clip_id, clip in part.clips.items() if clip_id not in stone.clips}
    finished = "" if is_new else stone.finished
    return dataclasses.replace(stone, held=folders, parts=parts, beside=beside, finished=finished)


def _delete(held: Sequence[_Held], doomed: Mapping[str, list[str]]) -> None:
    """Manifests, then commits, then all data that no commit refers to, in whatever version's folder they lie."""
    for each in held:
        if each.step.folder.name in doomed:
            each.step.discard_manifest()
    used: set[str] = set()
    for each in held:
        gone = doomed.get(each.step.folder.name, [])
        in_parallel(delete_file, [each.step.locate_commit(name) for name in gone])
        delete_folder(join(each.step.location, "attempts"))  # notes name videos
        used |= {part.location for name, part in each.parts.items() if name not in gone}
    for each in held:
        folder = join(each.step.location, "parts")
        for name in iter_files(folder) if kind_of(folder) == "folder" else ():
            if isinstance(name, str) and not name.endswith(".json") and (location := join(folder, name)) not in used:
                delete_file(location)


def _forget_reports(output: Path) -> None:
    """Reports hold pictures, and the summaries count: the next run writes them again."""
    delete_folder(str(output / "ask"))
    left_out = {"report", "curation_report", "outcomes", "evaluation"}
    for place in iter_places(output):
        for name in REPORTS:
            (place / name).unlink(missing_ok=True)
        if (summary := load_summary(place)) is not None:
            # Without the run's name the next run writes the current summary again, even if nothing else is left to do.
            dropped = left_out | ({"story"} if place == output else set())
            write_json(place / "summary.json", {key: value for key, value in summary.items() if key not in dropped})
