"""Versions of a step: the same settings on other input. A new version reuses the parts of earlier ones that are still whole.

A commit records its part's ``work``: a digest for every item, of all that its rows or bytes depend on besides the settings. A
part is adopted if each of its items is wanted, unchanged and without fault: the new version gets a commit of its own with the
``location`` of the old data. What is left is cut into new parts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator
from itertools import count
from pathlib import Path

from refalign.io.storage import in_parallel
from refalign.io.writing import delete_file, write_json
from refalign.pipeline.outcomes import PartsManifest
from refalign.pipeline.steps import Step, iter_step_folders
from refalign.pipeline.tombstones import load_kept


def digest_work(*described: object) -> str:
    """16 hexadecimal digits of what an item depends on; plain values."""
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]


def adopt_parts(step: Step, wanted: Collection[str]) -> dict[str, list[str]]:
    """Lets a step refer to parts of earlier versions and returns these parts' names with their work.

    Once a step has made parts of its own, nothing more is adopted. ``wanted`` are the digests of all planned work.
    """
    wanted = set(wanted)
    commits = step.load_commits()
    has_own = any("work" in commit and not step.find_owner(commit) for commit in commits.values())
    adopted = {name: commit.work for name, commit in commits.items() if step.find_owner(commit)}
    for name in [name for name, work in adopted.items() if step.load_part(name) is None or not wanted.issuperset(work)]:
        delete_file(step.locate_commit(name))
        del adopted[name]
    if has_own:
        return adopted
    open_work = wanted.difference(*adopted.values())
    free: dict[tuple[str, str], Iterator[str]] = {}
    taken = {*adopted, *load_kept(step.folder)}
    for version, parts in _list_versions(step):
        for part, commit in zip(parts, in_parallel(version.load_part, parts), strict=True):
            if not commit or not commit.work or not open_work.issuperset(commit.work):
                continue
            if any(outcome.status == "quarantined" for outcome in commit.outcomes):
                continue  # a new version tries what was quarantined again, so it makes the whole part
            kind = Path(part).stem.rpartition("-")[0], Path(part).suffix  # "train" and ".tar" of train-000003.tar
            name = next(free.setdefault(kind, _iter_names(*kind, taken)))
            location = version.locate(part, commit).removeprefix(f"{step.root}/")
            write_json(step.locate_commit(name), {**commit, "part": name, "location": location})
            open_work.difference_update(commit.work)
            adopted[name] = commit.work
    return dict(sorted(adopted.items()))


def cut_parts(
    step: Step | None, items: Iterable[str], size: int, prefix: str, suffix: str, taken: Collection[str]
) -> dict[str, list[str]]:
    """Cuts what is to be made into parts of ``size`` items, under names that are not taken.

    Parts that a takedown deleted keep the items that were left in them; the rest is cut as it was before.

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
    return {owner for commit in step.load_commits().values() if (owner := step.find_owner(commit))}


def _list_versions(step: Step) -> list[tuple[Step, tuple[str, ...]]]:
    """Earlier finished versions whose parts lie below the same root, and their parts; those with most parts first."""
    found = []
    for version in map(Step.open, iter_step_folders(step.folder.parent)):
        if version.name != step.name or version.folder == step.folder or version.root != step.root:
            continue
        manifest = version.load_manifest()
        if manifest and step.recipe and manifest.get("recipe") == step.recipe:
            found.append((version, PartsManifest.model_validate(manifest).parts))
    return sorted(found, key=lambda each: (-len(each[1]), each[0].folder.name))


def _iter_names(prefix: str, suffix: str, taken: Collection[str]) -> Iterator[str]:
    names = (f"{prefix}-{number:06d}{suffix}" for number in count())
    return (name for name in names if name not in taken)
