"""Settings from plain values and from the command line, and the fingerprint that names step folders."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ValidationError

from refalign.config.run import RunConfig
from refalign.errors import ConfigError
from refalign.io.untrusted import hide_secrets, parse_json


def apply_overrides(config: RunConfig, overrides: Iterable[str]) -> RunConfig:
    """Returns ``config`` with ``a.b=value`` settings applied; values are read as JSON, else as text.

    List items are addressed by number: ``training.stages.0.steps=50``.

    Raises:
        ConfigError: the text is no assignment, the key is unknown, or the value is refused.
    """
    tree = config.model_dump(mode="json")
    for text in overrides:
        key, found, raw = text.partition("=")
        if not found:
            raise ConfigError(f"--set {text}: expected section.field=value, for example --set training.global_batch=8.")
        try:
            value = parse_json(raw)
        except ValueError:
            value = raw
        _assign(tree, key.strip(), value)
    return check_config(tree)


def check_config(tree: dict[str, Any]) -> RunConfig:
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


def _assign(tree: dict[str, Any], key: str, value: Any) -> None:
    node: Any = tree
    *path, last = key.split(".")
    for depth, part in enumerate(path):
        node = _child(node, part, ".".join(path[: depth + 1]))
    _child(node, last, key)
    if isinstance(node, list):
        node[int(last)] = value
    else:
        node[last] = value


def _child(node: Any, part: str, key: str) -> Any:
    if isinstance(node, dict) and part in node:
        return node[part]
    if isinstance(node, list) and part.isdigit() and int(part) < len(node):
        return node[int(part)]
    if isinstance(node, dict):
        known = ", ".join(sorted(node))
        raise ConfigError(f"unknown setting {key!r}: there is no {part!r} here; known: {known}.")
    raise ConfigError(f"unknown setting {key!r}: {part!r} is not below a section.")


def make_fingerprint(*parts: Any) -> str:
    """12 hexadecimal digits of sha256 over canonical JSON of sections and plain values."""
    plain = [part.model_dump(mode="json") if isinstance(part, BaseModel) else part for part in parts]
    canonical = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]
