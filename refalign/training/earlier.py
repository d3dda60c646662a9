"""Earlier trainings of the same output: how a new one differs, and whether it may resume from a checkpoint of theirs.

Their settings are compared as plain values: another version of this program may have written them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refalign.config import RunConfig
from refalign.io.storage import load_json
from refalign.pipeline.steps import iter_step_folders
from refalign.training.records import FILE_NAME, truncate_records

LAUNCH_FILE = "launch.json"
KNOBS = frozenset(
    {
        "micro_batch",
        "activation_checkpointing",
        "compile",
        "checkpoint",
        "validation",
        "parallel.ranks",
        "parallel.min_ranks",
        "parallel.max_restarts",
        "parallel.shards_per_replica",
    }
)
"""Settings that change how training runs, not what it computes: a run may resume under others."""
_GROUPS = frozenset({"lora", "parallel", "optimizer", "dropout"})
_SHOWN = 5

Plain = Mapping[str, Any]
"""Settings by dotted name."""


@dataclass(frozen=True)
class Earlier:
    """A training that was begun with other settings.

    Attributes:
        checkpoint: its newest one, after ``steps`` steps.
        differences: ``setting: old -> new``, by name.
        is_beginning: the new training's first ``steps`` steps are exactly those of this one.
    """

    folder: Path
    checkpoint: Path
    steps: int
    differences: tuple[str, ...]
    is_beginning: bool


def find_earlier(folder: Path, config: RunConfig, shards: Path) -> list[Earlier]:
    """Trainings beside ``folder`` that have a checkpoint, the longest first."""
    from refalign.training.checkpoint import latest_checkpoint, load_state

    new, found = _describe(config.model_dump(mode="json"), shards), []
    digest = (load_json(str(shards / "manifest.json")) or {}).get("digest")
    for other in iter_step_folders(folder.parent):
        if not other.name.startswith("train-") or other == folder or not (other / LAUNCH_FILE).is_file():
            continue
        if (checkpoint := latest_checkpoint(other / "checkpoints")) is None:
            continue
        launch, state = json.loads((other / LAUNCH_FILE).read_text()), load_state(checkpoint)
        # Compared by their digest: after a takedown the same folder of shards has other samples.
        old = _describe(launch["config"], Path(launch["shards"])) | {"samples": state.shard_digest}
        new["samples"] = digest or state.shard_digest
        found.append(Earlier(other, checkpoint, state.step, tuple(_compare(old, new)), _is_beginning(old, new, state.step)))
    return sorted(found, key=lambda each: -each.steps)


def go_on_from(earlier: Earlier, folder: Path) -> None:
    """Gives a new training the checkpoint and the metrics of one that it continues."""
    target = folder / "checkpoints" / earlier.checkpoint.name
    aside = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(earlier.checkpoint, aside)
    shutil.copyfile(earlier.folder / FILE_NAME, folder / FILE_NAME)
    truncate_records(folder / FILE_NAME, earlier.steps)
    aside.replace(target)


def describe_earlier(earlier: Earlier) -> str:
    """What exists, how it differs, and how to start from it; one line."""
    shown = "; ".join(earlier.differences[:_SHOWN])
    more = len(earlier.differences) - _SHOWN
    return (
        f"{earlier.folder.name} has {earlier.steps} steps but differs: {shown}{f'; and {more} more' if more > 0 else ''}. "
        f"Training starts anew. To start from its weights: --set training.start_from={earlier.folder}"
    )


def decisive_settings(training: Plain) -> dict[str, Any]:
    """Dotted name -> value of those settings of a plain ``training`` section that are not `KNOBS`."""
    plain = {}
    for name, value in training.items():
        is_group = name in _GROUPS and isinstance(value, dict)
        plain |= {f"{name}.{below}": each for below, each in value.items()} if is_group else {name: value}
    return {f"training.{name}": value for name, value in plain.items() if name not in KNOBS}


def _describe(config: Plain, shards: Path) -> dict[str, Any]:
    """The settings that decide a training's result."""
    plain = decisive_settings(config["training"]) | {f"objective.{name}": value for name, value in config["objective"].items()}
    return plain | {"seed": config["seed"], "models.base": config["models"]["base"], "shards": shards.name}


def _compare(old: Plain, new: Plain) -> Iterator[str]:
    for name in (name for name in new if name != "training.stages" and old.get(name) != new[name]):
        yield f"{name}: {old.get(name)} -> {new[name]}"
    stages, grown = old["training.stages"], new["training.stages"]
    for number, (before, after) in enumerate(zip(stages, grown, strict=False)):
        for field in (field for field in after if before.get(field) != after[field]):
            yield f"training.stages.{number}.{field}: {before.get(field)} -> {after[field]}"
    if len(stages) != len(grown):
        yield f"training.stages: {len(stages)} -> {len(grown)} stages"


def _is_beginning(old: Plain, new: Plain, steps: int) -> bool:
    """Whether all that led to the checkpoint after ``steps`` steps is the same in the new training."""
    if any(old.get(name) != new[name] for name in new if name != "training.stages"):
        return False
    stages, grown = old["training.stages"], new["training.stages"]
    for number, before in enumerate(stages):
        if steps <= 0:
            return True
        if number >= len(grown):
            return False
        after, is_last_reached = grown[number], steps < before["steps"] or number == len(stages) - 1
        # A cosine depends on where it ends; a constant rate does not.
        may_grow = is_last_reached and before["schedule"] == "constant" and after["steps"] >= min(steps, before["steps"])
        if before | {"steps": 0} != after | {"steps": 0} or not (after["steps"] == before["steps"] or may_grow):
            return False
        steps -= before["steps"]
    return True
