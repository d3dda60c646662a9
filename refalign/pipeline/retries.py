"""What is tried again: parts whose faults may have passed, whose faulty files have changed, or that a person names.

A part with such outcomes is not done. To reopen it, the manifests of the steps that are made of it go first, then its own, and
then its commit is marked; a run that is killed in between finds a step that is not done.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from refalign.pipeline.outcomes import Outcome, may_pass
from refalign.pipeline.places import changed_at
from refalign.pipeline.reuse import find_owner
from refalign.pipeline.steps import Step, iter_step_folders
from refalign.pipeline.summary import load_summary

_STEPS = ("subjects", "shards")
"""Those that read videos."""
_SHORT = "TOO_SHORT"
"""No fault, but what a download that has not ended may look like."""


def find_retries(step: Step, locations: Mapping[str, str]) -> list[str]:
    """Parts of a step, finished or not, that the next run makes again.

    Args:
        locations: where each video lies now, by its name.
    """
    manifest = step.load_manifest()
    if manifest and not any(count["quarantined"] or _SHORT in count["filtered"] for count in manifest["counts"].values()):
        return []
    return [
        name
        for name, commit in step.load_parts(step.list_commits()).items()
        if not find_owner(step, commit) and (may_pass(commit) or _has_changed(commit, locations))
    ]


def stamp_faults(outcomes: Sequence[Outcome], locations: Mapping[str, str]) -> dict[str, Any]:
    """What a commit says of the files of faulty videos: the time of their last change, by name."""
    faulty = [each.item for each in outcomes if each.level == "video" and (each.status == "quarantined" or each.reason == _SHORT)]
    stamps = {name: changed_at(locations[name]) for name in faulty if name in locations}
    return {"stamps": stamps} if stamps else {}


def _has_changed(commit: Mapping[str, Any], locations: Mapping[str, str]) -> bool:
    stamps = commit.get("stamps", {})
    return any(name in locations and changed_at(locations[name]) != stamp for name, stamp in stamps.items())


def reopen(step: Step, names: Sequence[str], *, forget_tries: bool = False) -> None:
    """Lets parts be made again, and with them whatever was made of this step.

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
    """Every quarantined item of the last story and of unfinished steps: its step, its part, and its outcome.

    The part is empty for a file that was refused before any part was made: every run looks at it anew.
    """
    current = set((load_summary(output) or {}).get("folders", {}).values())
    for folder in iter_step_folders(output):
        step = Step.open(folder)
        manifest = step.load_manifest()
        if step.name not in _STEPS or (manifest and current and folder.name not in current):
            continue
        of_parts: set[tuple[str, str]] = set()
        for name, commit in step.load_parts(step.list_commits()).items():
            for outcome in (Outcome(**each) for each in commit.get("outcomes", ())):
                of_parts.add((outcome.level, outcome.item))
                if outcome.status == "quarantined":
                    yield step, name, outcome
        for outcome in (Outcome(**each) for each in (manifest or {}).get("outcomes", ())):
            if outcome.status == "quarantined" and (outcome.level, outcome.item) not in of_parts:
                yield step, "", outcome


def retry_quarantined(output: Path) -> int:
    """Reopens every part with a quarantined item and returns their number; the next run of the same command makes them.

    Raises:
        BackendUnavailable: as `reopen`.
    """
    parts: dict[str, tuple[Step, set[str]]] = {}
    for step, name, _ in iter_quarantined(output):
        if name and not find_owner(step, step.load_commit(name) or {}):
            parts.setdefault(step.folder.name, (step, set()))[1].add(name)
    for step, names in parts.values():
        reopen(step, sorted(names), forget_tries=True)
    return sum(len(names) for _, names in parts.values())
