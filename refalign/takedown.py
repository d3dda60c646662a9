"""Takedown: a source leaves every finished version of subjects, pairs and shards, and never comes back.

The request is written down first, with all that it leads to (`pipeline.tombstones`), and marked finished last. In between
every part that holds something of the source is written anew beside the old data, its commit is moved to the new ones, and
what no commit refers to is deleted. Whatever ends the process, the same command does the rest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from refalign.curation import launch as subjects_step
from refalign.curation import pairs as pairs_step
from refalign.errors import ArtifactError
from refalign.io.storage import in_parallel, iter_files, join, kind_of, read_table
from refalign.io.tables import CLIP_SCHEMA, PAIR_SCHEMA, VERDICT_SCHEMA, VERDICTS_PART, check_table
from refalign.io.writing import delete_file, delete_folder
from refalign.pipeline.clean import iter_places
from refalign.pipeline.outcomes import Outcome
from refalign.pipeline.steps import Step, iter_step_folders, write_json
from refalign.pipeline.summary import REPORTS, load_summary
from refalign.pipeline.tombstones import Tombstone, load_tombstones, save_tombstone
from refalign.shards.launch import describe_shards
from refalign.shards.takedown import holds_clips, rewrite_shard

_STEPS = ("shards", "evaluate", "pairs", "subjects")
"""In the order in which they are rewritten: what says what belongs to a source goes last."""
_COLUMNS = ["clip_id", "video_id", "video_path", "source_group", "start_s", "fps", "num_frames"]


def run_takedown(output: Path, source: str, *, reason: str, tracking_uri: str | None) -> None:
    """Takes a source down, clears MLflow's files of it, and prints what was removed and which models were trained on it.

    Raises:
        ArtifactError, BackendUnavailable: see `take_down`; MLflow does not answer. The same command does the rest.
    """
    from refalign.tracking import takedown as tracking

    stone = take_down(output, source, reason=reason)
    videos = {*stone.video_ids, *(clip["video_id"] for clip in stone.clips.values())}
    print(f"removed   {len(stone.clips)} clips of {len(videos)} videos ({source}) from every version below {output}")
    models = []
    if tracking.has_tracking(tracking_uri, output):
        tracking.delete_pictures(tracking_uri, output, stone.folders)
        models = tracking.find_trained_models(tracking_uri, output, stone.digests)
    for model in models:
        aliases = f" ({', '.join(model.aliases)})" if model.aliases else ""
        what = f"{model.name} version {model.version}{aliases}" if model.version else "trained and not registered"
        print(f"model     {what}: MLflow run {model.run_id}, shards {model.digest}")
    print(
        f"{len(models)} models were trained on it; train them again or withdraw them" if models else "no model was trained on it"
    )
    close_requests(output)


def take_down(output: Path, source: str, *, reason: str = "") -> Tombstone:
    """Removes a source from everything below ``output`` and returns what that was; the request stays open until `close_requests`.

    Args:
        source: a video's name in its input, its location or id, a source group, or a clip's id.

    Raises:
        ArtifactError: nothing here is called that, or several videos are.
        BackendUnavailable: a process works in one of the step folders, or the object store does not answer.
    """
    output = Path(output).resolve()
    steps = [Step.open(folder) for folder in iter_step_folders(output)]
    with ExitStack() as stack:
        for step in steps:
            stack.enter_context(step.lease())
        known = {stone.source: stone for stone in load_tombstones(output)}
        stone = _resolve(steps, source, reason, known.get(source), output)
        save_tombstone(output, stone)
        pending = [each for each in load_tombstones(output) if not each.finished]
        clips = {clip_id: each for each in pending for clip_id in each.clips}
        for name in _STEPS:
            for step in steps:
                if step.name == name:
                    _rewrite_step(step, clips, [video_id for each in pending for video_id in each.video_ids])
        _sweep(steps)
        _forget_reports(output, {step.folder.name: step for step in steps})
    return stone


def close_requests(output: Path) -> None:
    """Marks every takedown as finished."""
    for stone in load_tombstones(output):
        if not stone.finished:
            save_tombstone(output, dataclasses.replace(stone, finished=_now()))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _resolve(steps: list[Step], source: str, reason: str, known: Tombstone | None, output: Path) -> Tombstone:
    """The tombstone with all clips of the source that are found now, and those that an earlier attempt had found."""
    rows, names = _load_clips(steps)
    named = {video_id for name, video_id in names if name == source}
    groups = (source,) if any(row["source_group"] == source for row in rows) else ()
    videos = {row["video_id"] for row in rows if source in (row["video_id"], row["source_group"], row["video_path"])} | named
    videos |= {video_id for _, video_id in names if video_id == source}
    clip_ids = {row["clip_id"] for row in rows if row["clip_id"] == source}
    if not videos and not clip_ids:
        ending = {row["video_path"]: row["video_id"] for row in rows if row["video_path"].endswith(f"/{source}")}
        if len(set(ending.values())) > 1:
            raise ArtifactError(f"{source}: several videos end so ({', '.join(sorted(ending)[:5])}); give one whole location.")
        videos = set(ending.values())
    if not videos and not clip_ids and known is None:
        raise ArtifactError(
            f"{output}: no video, source group or clip is called {source}; give a name below the input folder, a location, or an "
            "id as the clip rows (subjects-*/parts) have it. Nothing was changed."
        )
    found = {row["clip_id"]: _describe_clip(row) for row in rows if row["video_id"] in videos or row["clip_id"] in clip_ids}
    # A version with other settings cuts its clips elsewhere; what overlaps a removed clip shows the same.
    touched = {clip["video_id"] for clip in found.values()}
    for row in (row for row in rows if row["video_id"] in touched):
        if any(_overlap(_describe_clip(row), clip) for clip in list(found.values())):
            found[row["clip_id"]] = _describe_clip(row)
    stone = known or Tombstone(source, reason, _now())
    folders = [step for step in steps if _holds(step, found)]
    digests = {digest for step in folders if step.name == "shards" for digest in _list_digests(step)}
    grown = dataclasses.replace(
        stone,
        video_ids=sorted({*stone.video_ids, *videos}),
        source_groups=sorted({*stone.source_groups, *groups}),
        clips={**stone.clips, **found},
        digests=sorted({*stone.digests, *digests}),
        folders=sorted({*stone.folders, *(step.folder.name for step in folders)}),
    )
    return grown if grown == stone else dataclasses.replace(grown, finished="")


def _describe_clip(row: dict[str, Any]) -> dict[str, Any]:
    end_s = row["start_s"] + row["num_frames"] / row["fps"]
    return {"video_id": row["video_id"], "start_s": row["start_s"], "end_s": end_s}


def _overlap(clip: dict[str, Any], other: dict[str, Any]) -> bool:
    return clip["video_id"] == other["video_id"] and clip["start_s"] < other["end_s"] and other["start_s"] < clip["end_s"]


def _load_clips(steps: list[Step]) -> tuple[list[dict[str, Any]], set[tuple[str, str]]]:
    """All clip rows without their subjects, and the (name, id) of every video that was looked at."""
    rows: dict[str, dict[str, Any]] = {}
    names: set[tuple[str, str]] = set()
    for step in (each for each in steps if each.name == "subjects"):
        for part, commit in _iter_commits(step):
            names |= set(commit["videos"].items())
            rows |= {row["clip_id"]: row for row in read_table(step.locate(part, commit), _COLUMNS).to_pylist()}
    return list(rows.values()), names


def _iter_commits(step: Step) -> Iterator[tuple[str, dict[str, Any]]]:
    names = step.list_commits()
    for name, commit in zip(names, in_parallel(step.load_part, names), strict=True):
        if commit is not None:
            yield name, commit


def _holds(step: Step, clips: dict[str, Any]) -> bool:
    """Whether there is something of the clips in what the step made, as far as a person may have seen or trained on it."""
    if step.name == "shards":
        return any(holds_clips(commit, clips) for _, commit in _iter_commits(step))
    if step.name == "evaluate":
        return any(_shows(sample, clips) for sample in (step.load_manifest() or {}).get("samples", []))
    if step.name == "subjects":
        videos = {clip["video_id"] for clip in clips.values()}
        return any(not videos.isdisjoint(commit["videos"].values()) for _, commit in _iter_commits(step))
    return False


def _list_digests(step: Step) -> list[str]:
    """Digests that name the step's shards, now and before earlier takedowns."""
    manifest = step.load_manifest()
    return [manifest["digest"], *manifest.get("earlier_digests", [])] if manifest else []


def _rewrite_step(step: Step, clips: dict[str, Tombstone], video_ids: Sequence[str]) -> None:
    def explain(clip_id: str) -> str:
        return clips[clip_id].explain(clip_id)

    manifest = step.load_manifest()
    if step.name == "evaluate":
        _rewrite_evaluation(step, manifest, clips)
    elif manifest is None and step.name != "subjects":
        if clips:  # their plans are made of clips that are gone: they begin again
            delete_folder(join(step.location, "parts"))
    elif step.name == "shards":
        for name, commit in _iter_commits(step):
            if holds_clips(commit, clips):
                rewrite_shard(step, name, commit, clips, explain)
        _commit_again(step, describe_shards)
    elif step.name == "pairs":
        for name, commit in _iter_commits(step):
            _rewrite_pairs(step, name, commit, clips)
        verdicts = read_table(step.locate(VERDICTS_PART))
        _commit_again(step, lambda records: pairs_step.describe_pairs(records, verdicts))
    else:
        for name, commit in _iter_commits(step):
            _rewrite_clips(step, name, commit, clips, video_ids, explain)
        _commit_again(step, lambda records: subjects_step.describe_subjects(records, _planned_outcomes(manifest, records)))


def _commit_again(step: Step, describe: Callable[[Sequence[dict[str, Any]]], dict[str, Any]]) -> None:
    """Brings the manifest of a finished step to what its commits say now."""
    manifest = step.load_manifest()
    if manifest is None:
        return
    records = [record for part in manifest["parts"] if (record := step.load_part(part))]
    if len(records) != len(manifest["parts"]):
        raise ArtifactError(f"{step.folder}: parts are missing; delete its manifest.json, run the step again, then this command.")
    described = describe(records)
    if described.get("digest") != manifest.get("digest"):
        described["earlier_digests"] = [*manifest.get("earlier_digests", []), manifest["digest"]]
    if {**manifest, **described} != manifest:
        step.commit({**manifest, **described})


def _planned_outcomes(manifest: dict[str, Any] | None, records: Sequence[dict[str, Any]]) -> list[Outcome]:
    """Those of the manifest that belong to no part."""
    of_parts = {(outcome["level"], outcome["item"]) for record in records for outcome in record["outcomes"]}
    found = [Outcome(**outcome) for outcome in (manifest or {}).get("outcomes", [])]
    return [outcome for outcome in found if (outcome.level, outcome.item) not in of_parts]


def _rewrite_clips(
    step: Step,
    name: str,
    commit: dict[str, Any],
    clips: dict[str, Tombstone],
    video_ids: Sequence[str],
    explain: Callable[[str], str],
) -> None:
    table = check_table(read_table(step.locate(name, commit)), CLIP_SCHEMA, name)
    kept = table.filter(pa.array([clip_id not in clips for clip_id in table["clip_id"].to_pylist()], pa.bool_()))
    emptied = set(table["video_id"].to_pylist()) - set(kept["video_id"].to_pylist())
    gone = {video for video, video_id in commit["videos"].items() if video_id in video_ids or video_id in emptied}
    outcomes = []
    for outcome in commit["outcomes"]:
        is_gone = outcome["item"] in (clips if outcome["level"] == "clip" else gone)
        message = explain(outcome["item"]) if outcome["item"] in clips else f"{outcome['item']}: taken down"
        outcomes.append({**outcome, "reason": "TAKEN_DOWN", "message": message} if is_gone and not outcome["reason"] else outcome)
    if len(kept) == len(table) and outcomes == commit["outcomes"]:
        return
    if step.load_manifest() is None:  # unfinished: it is made again, by a plan that knows the tombstone
        delete_file(step.locate_commit(name))
        return

    def write(path: Path) -> dict[str, Any]:
        pq.write_table(kept, path)
        return {**subjects_step.describe_rows(kept), "outcomes": outcomes}

    step.rewrite_part(name, commit, write)


def _rewrite_pairs(step: Step, name: str, commit: dict[str, Any], clips: dict[str, Tombstone]) -> None:
    """Pairs of removed clips go; the verdict on a removed clip says so."""
    if name != VERDICTS_PART and not name.startswith("pairs-"):
        return
    table = read_table(step.locate(name, commit))
    if name == VERDICTS_PART:
        check_table(table, VERDICT_SCHEMA, name)
        struck = {"split": "", "reason": "TAKEN_DOWN"}
        rows = [row | struck if row["clip_id"] in clips and not row["reason"] else row for row in table.to_pylist()]
        changed = pa.Table.from_pylist(rows, schema=VERDICT_SCHEMA)
        described: dict[str, Any] = {"rows": len(changed)}
    else:
        check_table(table, PAIR_SCHEMA, name)
        sides = zip(table["clip_id"].to_pylist(), table["reference_clip_id"].to_pylist(), strict=True)
        changed = table.filter(pa.array([not any(side in clips for side in pair) for pair in sides], pa.bool_()))
        described = pairs_step.describe_rows(changed)
    if changed.equals(table.cast(changed.schema)):
        return

    def write(path: Path) -> dict[str, Any]:
        pq.write_table(changed, path)
        return described

    step.rewrite_part(name, commit, write)


def _rewrite_evaluation(step: Step, manifest: dict[str, Any] | None, clips: dict[str, Tombstone]) -> None:
    """Videos and pictures made of removed clips go, and their scores with them."""
    from refalign.evaluation.fidelity import average_scores

    if manifest is None:
        if clips:
            delete_folder(str(step.parts_folder))
        return
    kept = [sample for sample in manifest["samples"] if not _shows(sample, clips)]
    if len(kept) < len(manifest["samples"]):
        scores = {label: average_scores([sample["scores"][label] for sample in kept]) for label in manifest["scores"]}
        step.commit({**manifest, "samples": kept, "num_samples": len(kept), "scores": scores})
    named = {file for sample in kept for file in _iter_evaluation_files(sample)}
    for name in step.list_commits():
        if f"parts/{name}" not in named:
            delete_file(step.locate_commit(name))


def _shows(sample: dict[str, Any], clips: Container[str]) -> bool:
    shown = {sample["key"], *(reference["subject_id"].rpartition("-s")[0] for reference in sample["references"])}
    return any(clip_id in clips for clip_id in shown)


def _iter_evaluation_files(sample: dict[str, Any]) -> Iterator[str]:
    yield from sample["videos"].values()
    yield from (reference["file"] for reference in sample["references"])


def _sweep(steps: list[Step]) -> None:
    """Deletes data that no commit of any step refers to."""
    used = {location for step in steps for location in in_parallel(step.locate, step.list_commits())}
    for step in steps:
        folder = join(step.location, "parts")
        if step.name not in _STEPS or kind_of(folder) != "folder":
            continue
        for name in iter_files(folder):
            if isinstance(name, str) and not name.endswith(".json") and (location := join(folder, name)) not in used:
                delete_file(location)


def _forget_reports(output: Path, steps: dict[str, Step]) -> None:
    """Reports hold pictures, and the summaries count: the next run writes them again."""
    for path in output.glob("ask-*.html"):
        path.unlink()
    left_out = {"report", "curation_report", "outcomes", "evaluation"}
    for place in iter_places(output):
        for name in REPORTS:
            (place / name).unlink(missing_ok=True)
        if (summary := load_summary(place)) is not None:
            # Without the story's name the next run writes the current summary again, even if nothing else is left to do.
            dropped = left_out | ({"story"} if place == output else set())
            write_json(place / "summary.json", {key: value for key, value in summary.items() if key not in dropped})
