"""Takedown: what holds something of a source is deleted in every version, and the next run makes it again without the source.

The request is written down first, with all that it leads to (`pipeline.tombstones`), and marked finished last; no run starts in
between. Whatever ends the process, the same command does the rest. A part is gone with its commit, and data that no commit refers
to are deleted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from refalign.errors import ArtifactError
from refalign.io.storage import find_size, in_parallel, iter_files, join, kind_of, read_table
from refalign.io.tables import VERDICTS_PART
from refalign.io.writing import delete_file, delete_folder, write_json
from refalign.pipeline.clean import iter_places
from refalign.pipeline.steps import Step, iter_step_folders
from refalign.pipeline.summary import REPORTS, load_summary
from refalign.pipeline.tombstones import Clip, Tombstone, check_finished, load_tombstones, save_tombstone

_STEPS = ("subjects", "pairs", "shards", "evaluate")
"""Those that hold something of a source; each is made of those before it."""
_COLUMNS = ["clip_id", "video_id", "video_path", "source_group", "start_s", "fps", "num_frames"]


@dataclasses.dataclass(frozen=True)
class _Held:
    """What a step holds: its manifest, the commits of its parts, and of a subjects step each part's clips by id."""

    step: Step
    manifest: dict[str, Any] | None
    commits: Mapping[str, dict[str, Any]]
    clips: dict[str, dict[str, Clip]]


def run_takedown(output: Path, source: str, *, reason: str, tracking_uri: str | None) -> None:
    """Takes a source down, clears MLflow's files of it, and prints what was removed, which models saw it, and what to do next.

    Raises:
        ArtifactError, BackendUnavailable: see `take_down`; MLflow does not answer. The same command does the rest.
    """
    from refalign.tracking import takedown as tracking

    output = Path(output).resolve()
    stone = take_down(output, source, reason=reason)
    videos = {*stone.video_ids, *(clip["video_id"] for clip in stone.clips.values())}
    print(f"removed   {len(stone.clips)} clips of {len(videos)} videos ({source}) from every version below {output}")
    models = []
    if tracking.has_tracking(tracking_uri, output):
        tracking.delete_pictures(tracking_uri, output, list(stone.held))
        digests = {digest for of_step in stone.held.values() for digest in of_step}
        models = tracking.find_trained_models(tracking_uri, output, sorted(digests))
    for model in models:
        aliases = f" ({', '.join(model.aliases)})" if model.aliases else ""
        what = f"{model.name} version {model.version}{aliases}" if model.version else "trained and not registered"
        print(f"model     {what}: MLflow run {model.run_id}, shards {model.digest}")
    print(
        f"{len(models)} models were trained on it; train them again or withdraw them" if models else "no model was trained on it"
    )
    close_request(output, stone)
    print(
        "next      run the same command as before: the parts that held the source are gone, and it makes them again without it; "
        "until then the shards are not finished"
    )


def take_down(output: Path, source: str, *, reason: str = "") -> Tombstone:
    """Deletes all that holds something of a source and returns what that was; the request stays open until `close_request`.

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
        held = [_look_into(step) for name in _STEPS for step in steps if step.name == name]
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
    # What an evaluation measured of a model shows nobody, and is a .json itself.
    names = [name for name in step.list_commits() if not name.startswith("separability-")]
    commits = {name: commit for name, commit in zip(names, in_parallel(step.load_commit, names), strict=True) if commit}
    clips: dict[str, dict[str, Clip]] = {}
    for name, commit in commits.items() if step.name == "subjects" else ():
        location = step.locate(name, commit)
        rows = read_table(location, _COLUMNS).to_pylist() if find_size(location) is not None else []
        clips[name] = {row["clip_id"]: _describe_clip(row) for row in rows}
    return _Held(step, step.load_manifest(), commits, clips)


def _describe_clip(row: dict[str, Any]) -> Clip:
    return {
        "video_id": row["video_id"],
        "video_path": row["video_path"],
        "source_group": row["source_group"],
        "start_s": row["start_s"],
        "end_s": row["start_s"] + row["num_frames"] / row["fps"],
    }


def _resolve(held: list[_Held], stones: list[Tombstone], source: str, reason: str, output: Path) -> Tombstone:
    """The tombstone with all clips of the source that are known, from parts that are here or that went with another source's."""
    clips = {clip_id: clip for stone in stones for clip_id, clip in stone.beside.items()}
    videos: set[str] = set()
    for each in held:
        for part, of_part in each.clips.items():
            clips |= of_part
            videos |= {video_id for name, video_id in each.commits[part]["videos"].items() if source in (name, video_id)}
    groups = {clip["source_group"] for clip in clips.values() if clip["source_group"] == source}
    videos |= {clip["video_id"] for clip in clips.values() if source in clip.values()}
    if not videos and source not in clips:
        ending = {clip["video_path"]: clip["video_id"] for clip in clips.values() if clip["video_path"].endswith(f"/{source}")}
        videos = set(ending.values())
        if len(videos) > 1:
            raise ArtifactError(f"{source}: several videos end so ({', '.join(sorted(ending)[:5])}); give one whole location.")
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


def _find_doomed(held: list[_Held], clips: Collection[str]) -> dict[str, list[str]]:
    """Parts that go, by step folder; a folder without such parts is made of others that go, and is not finished any more."""
    doomed: dict[str, list[str]] = {}
    for each in held:
        is_outdated = not doomed.keys().isdisjoint((each.manifest or {}).get("made_of", ()))
        found = _list_doomed(each, set(clips), is_outdated)
        if found or is_outdated:
            doomed[each.step.folder.name] = found
    return doomed


def _list_doomed(each: _Held, clips: set[str], is_outdated: bool) -> list[str]:
    if each.step.name == "subjects":
        return [name for name, rows in each.clips.items() if not clips.isdisjoint(rows)]
    if each.step.name == "pairs":  # all of them depend on the verdicts on all clips; pictures of an evaluation do not
        is_outdated |= each.manifest is None
        return [name for name in each.commits if is_outdated and name.startswith((VERDICTS_PART, "pairs-"))]
    if each.step.name == "shards":
        return [name for name, commit in each.commits.items() if not clips.isdisjoint(_list_clips(commit))]
    if each.manifest is None:
        return list(each.commits)
    shown = [sample["key"] for sample in each.manifest.get("samples", ()) if not clips.isdisjoint(_list_shown(sample))]
    # What a champion's videos were made from is said by another step; the gate makes them again.
    return [name for name in each.commits if name.startswith("champion-") or any(key in name for key in shown)]


def _list_clips(commit: dict[str, Any]) -> list[str]:
    """Clips that are in a shard, that could not be encoded for it, and that give references."""
    references = [clip_id for sample in commit["samples"] for clip_id in sample["reference_clips"]]
    return [outcome["item"] for outcome in commit["outcomes"]] + references


def _list_shown(sample: dict[str, Any]) -> list[str]:
    return [sample["key"], *(reference["subject_id"].rpartition("-s")[0] for reference in sample["references"])]


def _note(stone: Tombstone, stones: list[Tombstone], held: list[_Held], doomed: dict[str, list[str]]) -> Tombstone:
    """The tombstone with what is not known any more once the parts are gone; it is open again if there are any."""
    folders, parts, beside, is_new = dict(stone.held), dict(stone.parts), dict(stone.beside), stone not in stones
    for each in held:
        folder, gone = each.step.folder.name, doomed.get(each.step.folder.name, [])
        digests = {digest for other in stones for digest in other.held.get(folder, ())}
        if each.step.name == "shards" and each.manifest:
            digests.add(each.manifest["digest"])
        # Unfinished shards may have held it before another takedown.
        if gone or (digests and not each.manifest and not stone.finished):
            folders[folder] = sorted(digests)
        if gone and each.step.name in ("subjects", "shards"):
            is_new = True
            parts[folder] = parts.get(folder, {}) | {name: _list_kept(each.commits[name], stone.clips) for name in gone}
        for name in gone if each.step.name == "subjects" else ():
            beside |= {clip_id: clip for clip_id, clip in each.clips[name].items() if clip_id not in stone.clips}
    finished = "" if is_new else stone.finished
    return dataclasses.replace(stone, held=folders, parts=parts, beside=beside, finished=finished)


def _list_kept(commit: dict[str, Any], clips: Collection[str]) -> list[str]:
    """What stays of a part, as plans name it: videos by their work, which says nothing of them, and clips by id."""
    if "samples" in commit:
        return [outcome["item"] for outcome in commit["outcomes"] if outcome["item"] not in clips]
    return list(commit.get("work", ()))


def _delete(held: list[_Held], doomed: dict[str, list[str]]) -> None:
    """Manifests, then commits, then all data that no commit refers to, in whatever version's folder they lie."""
    for each in held:
        if each.step.folder.name in doomed:
            each.step.discard_manifest()
    used: set[str] = set()
    for each in held:
        gone = doomed.get(each.step.folder.name, [])
        in_parallel(delete_file, [each.step.locate_commit(name) for name in gone])
        delete_folder(join(each.step.location, "attempts"))  # notes name videos
        used |= {each.step.locate(name, commit) for name, commit in each.commits.items() if name not in gone}
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
            # Without the story's name the next run writes the current summary again, even if nothing else is left to do.
            dropped = left_out | ({"story"} if place == output else set())
            write_json(place / "summary.json", {key: value for key, value in summary.items() if key not in dropped})
