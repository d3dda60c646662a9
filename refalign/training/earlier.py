"""Earlier trainings of the same output: what a new one differs in, and whether it may go on from a checkpoint of theirs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
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
"""Settings that change how training runs, not what it computes: a run may go on under others."""
_GROUPS = frozenset({"lora", "parallel", "optimizer", "dropout"})
_SHOWN = 5


@dataclass(frozen=True)
class Earlier:
    """A training that was begun with other settings.

    Attributes:
        checkpoint: its newest one, and the steps that it stands for.
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
        launch = json.loads((other / LAUNCH_FILE).read_text())
        checkpoint = latest_checkpoint(other / "checkpoints")
        if checkpoint is None:
            continue
        old, state = _describe(launch["config"], Path(launch["shards"])), load_state(checkpoint)
        # Shards have others after a takedown.
        old["samples"], new["samples"] = state.shard_digest, digest or state.shard_digest
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
    """What exists, how it differs, and how to go on from it; one line."""
    shown = "; ".join(earlier.differences[:_SHOWN])
    more = len(earlier.differences) - _SHOWN
    return (
        f"{earlier.folder.name} has {earlier.steps} steps but differs: {shown}{f'; and {more} more' if more > 0 else ''}. "
        f"Training starts anew. To start from its weights: --set training.start_from={earlier.folder}"
    )


def decisive_settings(training: dict[str, Any]) -> dict[str, Any]:
    """Dotted name -> value of those settings of a plain ``training`` section that are not `KNOBS`."""
    plain = {}
    for name, value in training.items():
        inner = {f"{name}.{below}": each for below, each in value.items()} if name in _GROUPS and isinstance(value, dict) else {}
        plain |= inner or {name: value}
    return {f"training.{name}": value for name, value in plain.items() if not {name, name.partition(".")[0]} & KNOBS}


def _describe(config: dict[str, Any], shards: Path) -> dict[str, Any]:
    """The settings that decide a training's result."""
    plain = decisive_settings(config["training"])
    plain |= {f"objective.{name}": value for name, value in config["objective"].items()}
    return plain | {"seed": config["seed"], "models.base": config["models"]["base"], "shards": shards.name}


def _compare(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    for name in (name for name in new if name != "training.stages" and old.get(name) != new[name]):
        yield f"{name}: {old.get(name)} -> {new[name]}"
    before, after = old["training.stages"], new["training.stages"]
    for number in range(max(len(before), len(after))):
        if number >= len(before) or number >= len(after):
            yield f"training.stages: {len(before)} -> {len(after)} stages"
            return
        for field in (field for field in after[number] if before[number].get(field) != after[number][field]):
            yield f"training.stages.{number}.{field}: {before[number].get(field)} -> {after[number][field]}"


def _is_beginning(old: dict[str, Any], new: dict[str, Any], steps: int) -> bool:
    """Whether all that the checkpoint came from is the same in the new training."""
    if any(old.get(name) != new[name] for name in new if name != "training.stages"):
        return False
    before, after = old["training.stages"], new["training.stages"]
    for number, stage in enumerate(before):
        if steps <= 0:
            return True
        if number >= len(after):
            return False
        reached, grown = steps < stage["steps"] or number == len(before) - 1, after[number]
        # A cosine depends on where it ends; a constant rate does not.
        same_length = grown["steps"] == stage["steps"] or (reached and stage["schedule"] == "constant")
        if {**stage, "steps": 0} != {**grown, "steps": 0} or not same_length or grown["steps"] < min(steps, stage["steps"]):
            return False
        steps -= stage["steps"]
    return True
