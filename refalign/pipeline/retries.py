"""Which parts are made again: their faults may have passed, their faulty files have changed, or a person asks for it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypedDict

from refalign.pipeline.outcomes import Commit, Outcome, PartsManifest
from refalign.pipeline.places import changed_at
from refalign.pipeline.steps import Step, iter_step_folders
from refalign.pipeline.summary import Head, load_head

_STEPS = ("subjects", "shards")
"""Those that read videos."""
_SHORT = "TOO_SHORT"
"""Not a fault, but an unfinished download may look like it."""


class Stamps(TypedDict, total=False):
    """What a commit says of the files of faulty videos: the time of their last change, by name."""

    stamps: dict[str, int | None]


def find_retries(step: Step, locations: Mapping[str, str]) -> list[str]:
    """Parts of a step, finished or not, that the next run makes again.

    Args:
        locations: where each video lies now, by its name.
    """
    manifest = step.read_manifest(PartsManifest)
    if manifest and not any(count.quarantined or _SHORT in count.filtered for count in manifest.counts.values()):
        return []
    return [
        name
        for name, commit in step.load_parts(step.list_commits()).items()
        if not step.find_owner(commit) and (commit.may_pass or _has_changed(commit, locations))
    ]


def stamp_faults(outcomes: Sequence[Outcome], locations: Mapping[str, str]) -> Stamps:
    """What `find_retries` compares later; empty if no video is faulty."""
    faulty = [each.item for each in outcomes if each.level == "video" and (each.status == "quarantined" or each.reason == _SHORT)]
    stamps = {name: changed_at(locations[name]) for name in faulty if name in locations}
    return {"stamps": stamps} if stamps else {}


def _has_changed(commit: Commit, locations: Mapping[str, str]) -> bool:
    stamps = commit.get("stamps", {})
    return any(name in locations and changed_at(locations[name]) != stamp for name, stamp in stamps.items())


def reopen(step: Step, names: Sequence[str], *, forget_tries: bool = False) -> None:
    """Lets parts be made again, and with them whatever was made of this step.

    Manifests are deleted before commits are marked, so that a run that is killed in between finds steps that are not done.

    Raises:
        BackendUnavailable: a process works in the step's folder, or the object store does not answer.
    """
    if not names:
        return
    with step.lease():
        for folder in iter_step_folders(step.folder.parent):
            later = Step.open(folder)
            if step.folder.name in (later.load_manifest() or {}).get("made_of", ()):
                later.discard_manifest()
        step.reopen(names, forget_tries=forget_tries)


def iter_quarantined(output: Path) -> Iterator[tuple[Step, str, Outcome]]:
    """Every quarantined item of the last run and of unfinished steps: its step, its part, and its outcome.

    The part is empty if a file was refused before any part was made.
    """
    current = set((load_head(output) or Head()).folders.values())
    for step in map(Step.open, iter_step_folders(output)):
        finished = step.load_manifest()
        if step.name not in _STEPS or (finished and current and step.folder.name not in current):
            continue
        of_parts: set[tuple[str, str]] = set()
        for name, commit in step.load_parts(step.list_commits()).items():
            for outcome in commit.outcomes:
                of_parts.add((outcome.level, outcome.item))
                if outcome.status == "quarantined":
                    yield step, name, outcome
        for outcome in PartsManifest.model_validate(finished).outcomes if finished else ():
            if outcome.status == "quarantined" and (outcome.level, outcome.item) not in of_parts:
                yield step, "", outcome


def retry_quarantined(output: Path) -> int:
    """Reopens (`reopen`) every part with a quarantined item and returns their number."""
    parts: dict[Step, set[str]] = defaultdict(set)
    for step, name, _ in iter_quarantined(output):
        if name and not step.find_owner(step.load_commit(name) or Commit()):
            parts[step].add(name)
    for step, names in parts.items():
        reopen(step, sorted(names), forget_tries=True)
    return sum(map(len, parts.values()))
