"""Settings from plain values and from the command line, and the fingerprint that names step folders."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, JsonValue, ValidationError

from refalign.config.run import RunConfig
from refalign.errors import ConfigError
from refalign.io.untrusted import hide_secrets, parse_json

NEW_NAMES = {
    "cluster.worker_cpus": "cluster.train.cpus",
    "cluster.worker_gpus": "cluster.train.gpus",
    "cluster.worker_resources": "cluster.train.resources",
    "training.checkpoint_every": "training.checkpoint.every",
    "training.keep_best": "training.checkpoint.keep_best",
    "training.keep_checkpoints": "training.checkpoint.keep",
    "training.on_damaged_checkpoint": "training.checkpoint.on_damaged",
    "training.drop_both": "training.dropout.both",
    "training.drop_references": "training.dropout.references",
    "training.drop_text": "training.dropout.text",
    "training.lora_alpha": "training.lora.alpha",
    "training.lora_rank": "training.lora.rank",
    "training.lora_targets": "training.lora.targets",
    "training.clip_grad_norm": "training.optimizer.clip_grad_norm",
    "training.ema_decay": "training.optimizer.ema_decay",
    "training.warmup_steps": "training.optimizer.warmup_steps",
    "training.weight_decay": "training.optimizer.weight_decay",
    "training.context_parallel": "training.parallel.context",
    "training.max_restarts": "training.parallel.max_restarts",
    "training.min_workers": "training.parallel.min_ranks",
    "training.num_workers": "training.parallel.ranks",
    "training.shards_per_replica": "training.parallel.shards_per_replica",
    "training.gradient_norms_every": "training.validation.gradient_norms_every",
    "training.validate_every": "training.validation.every",
    "training.validation_samples": "training.validation.samples",
}
"""Names that settings had before they were grouped -> their names now."""


def apply_overrides(config: RunConfig, overrides: Iterable[str]) -> RunConfig:
    """Returns ``config`` with ``a.b=value`` settings applied; values are read as JSON, else as text.

    List items are addressed by number: ``training.stages.0.steps=50``.

    Raises:
        ConfigError: a text is no assignment, a key is unknown, or a value is refused.
    """
    values: dict[str, JsonValue] = {}
    for text in overrides:
        key, equals, raw = text.partition("=")
        if not equals:
            raise ConfigError(f"--set {text}: expected section.field=value, for example --set training.global_batch=8.")
        try:
            value = parse_json(raw)
        except ValueError:
            value = raw
        values[key.strip()] = value
    return set_values(config, values)


def set_values(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """Returns ``config`` with other values, by dotted name: ``{"training.checkpoint.every": 10}``.

    Raises:
        ConfigError: a name is unknown, or a value is refused.
    """
    tree = config.model_dump(mode="json")
    for key, value in values.items():
        if key in NEW_NAMES:
            raise ConfigError(f"{key} is called {NEW_NAMES[key]} now.")
        if key == "training.optimizer" and isinstance(value, str):
            raise ConfigError("training.optimizer is a group now; set training.optimizer.name.")
        node: Any = tree
        *path, last = key.split(".")
        for part in path:
            node = node[_find(node, part, key)]
        node[_find(node, last, key)] = value
    return check_config(tree)


def _find(node: object, part: str, key: str) -> str | int:
    """The key or number of ``part`` in a section or a list."""
    if isinstance(node, dict):
        if part not in node:
            raise ConfigError(f"unknown setting {key!r}: there is no {part!r} here; known: {', '.join(sorted(node))}.")
        return part
    if isinstance(node, list) and part.isdigit() and int(part) < len(node):
        return int(part)
    raise ConfigError(f"unknown setting {key!r}: {part!r} is not below a section.")


def check_config(tree: object) -> RunConfig:
    """Builds a `RunConfig` from plain values, turning pydantic's report into one `ConfigError`."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{describe_problems(error)}.") from error


def describe_problems(error: ValidationError) -> str:
    """Pydantic's report as one line: each field, what is wrong with it, and its value."""
    problems = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        got = "" if item["type"] in ("value_error", "missing") else f" (got {hide_secrets(repr(item['input']))[:200]})"
        problems.append(f"{where}: {message}{got}" if where and where not in message else message + got)
    return "; ".join(problems)


def make_fingerprint(*parts: object) -> str:
    """12 hexadecimal digits of sha256 over canonical JSON of sections and plain values."""
    plain = [part.model_dump(mode="json") if isinstance(part, BaseModel) else part for part in parts]
    canonical = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]
