"""Versions of a step: the same settings on other input. A new one refers to the parts of earlier ones that are still whole.

A commit records its part's ``work``: a digest for every item, of all that the item's rows or bytes depend on besides the
settings. A part of an earlier finished version is adopted if each of its items is wanted, and unchanged: the new version gets a
commit of its own with the ``location`` of the old data, on a disk as in an object store. What is left is cut into new parts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

from refalign.io.storage import in_parallel
from refalign.io.writing import delete_file, write_json
from refalign.pipeline.outcomes import Outcome
from refalign.pipeline.steps import Step, iter_step_folders
from refalign.pipeline.tombstones import load_kept


def digest_work(*described: Any) -> str:
    """16 hexadecimal digits of what an item depends on; plain values."""
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]


def adopt_parts(step: Step, wanted: Collection[str]) -> dict[str, list[str]]:
    """Lets a step refer to parts of earlier versions and returns these parts' names with their work.

    Once a step has made parts of its own, nothing more is adopted.

    Args:
        wanted: digests of all work that is planned.
    """
    commits = dict(zip(names := step.list_commits(), in_parallel(step.load_commit, names), strict=True))
    adopted = {name: commit["work"] for name, commit in commits.items() if commit and find_owner(step, commit)}
    has_own = any(commit and "work" in commit and name not in adopted for name, commit in commits.items())
    wanted = set(wanted)
    stale = [name for name, work in adopted.items() if step.load_part(name) is None or not wanted.issuperset(work)]
    for name in stale:
        delete_file(step.locate_commit(name))
        del adopted[name]
    if has_own:
        return adopted
    open_work = wanted - {item for work in adopted.values() for item in work}
    free: dict[tuple[str, str], Iterator[str]] = {}
    taken = {*adopted, *load_kept(step.folder)}
    for version in _iter_versions(step):
        parts = (version.load_manifest() or {})["parts"]
        for part, commit in zip(parts, in_parallel(version.load_part, parts), strict=True):
            work = (commit or {}).get("work")
            if not commit or not work or not open_work.issuperset(work) or _has_faults(commit):
                continue
            kind = _split_name(part)
            name = next(free.setdefault(kind, _iter_names(*kind, taken)))
            location = version.locate(part, commit).removeprefix(f"{step.root}/")
            write_json(step.locate_commit(name), {**commit, "part": name, "location": location})
            open_work.difference_update(work)
            adopted[name] = work
    return dict(sorted(adopted.items()))


def cut_parts(
    step: Step | None, items: Iterable[str], size: int, prefix: str, suffix: str, taken: Collection[str]
) -> dict[str, list[str]]:
    """Cuts what is to be made into parts of ``size`` items, under names that are not taken.

    Parts that a takedown deleted keep the items that were left in them, and the rest is cut without these: as it was before.

    Args:
        items: in order; digests of videos' work, or ids of clips (`refalign.pipeline.tombstones.Tombstone.parts`).
    """
    kept = load_kept(step.folder) if step else {}
    rest = dict.fromkeys(items)
    parts: dict[str, list[str]] = {}
    for name in (name for name in kept if name.startswith(f"{prefix}-")):
        parts[name] = [item for item in kept[name] if item in rest]
        for item in parts[name]:
            del rest[item]
    names, left = _iter_names(prefix, suffix, {*taken, *kept}), list(rest)
    parts |= {next(names): left[start : start + size] for start in range(0, len(left), size)}
    return {name: part for name, part in parts.items() if part}


def find_referred(step: Step) -> set[str]:
    """Names of the folders of other versions that hold data of this one."""
    manifest = step.load_manifest()
    if manifest is not None and "versions" in manifest:
        return set(manifest["versions"])
    commits = in_parallel(step.load_commit, step.list_commits())
    return {owner for commit in commits if commit and (owner := find_owner(step, commit))}


def _iter_versions(step: Step) -> Iterator[Step]:
    """Earlier finished versions whose parts lie below the same root, the largest first."""
    found = []
    for folder in iter_step_folders(step.folder.parent):
        version = Step.open(folder)
        if version.name != step.name or version.folder == step.folder or version.root != step.root:
            continue
        manifest = version.load_manifest()
        if manifest and step.recipe and manifest.get("recipe") == step.recipe:
            found.append((-len(manifest["parts"]), folder.name, version))
    yield from (version for _, _, version in sorted(found, key=lambda each: each[:2]))


def find_owner(step: Step, commit: dict[str, Any]) -> str:
    """The folder that holds the data of a commit, if it is not the step's own."""
    owner = commit.get("location", "").partition("/")[0]
    return "" if owner == step.folder.name else owner


def _has_faults(commit: dict[str, Any]) -> bool:
    """What was quarantined is tried again in a new version, so the whole part is."""
    return any(Outcome(**outcome).status == "quarantined" for outcome in commit.get("outcomes", ()))


def _iter_names(prefix: str, suffix: str, taken: Collection[str]) -> Iterator[str]:
    names = (f"{prefix}-{number:06d}{suffix}" for number in count())
    return (name for name in names if name not in taken)


def _split_name(part: str) -> tuple[str, str]:
    """``train`` and ``.tar`` of ``train-000003.tar``."""
    path = Path(part)
    return path.stem.rpartition("-")[0], path.suffix
