"""Texts of others: JSON that may be hostile, and secrets that must not be repeated."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

Hook = Callable[[list[tuple[str, Any]]], object]
"""Makes the value of an object, as in `json.loads`."""
_USER = re.compile(r"://[^/\s]*@")
_PASSWORD = re.compile(r"://[^/\s]*:[^/\s]*@|https?://[^/\s]*@")
_IN_QUERY = re.compile(r"([?&][^=&\s]*(?:password|token|secret|signature)[^=&\s]*=)[^&\s'\"]+", re.IGNORECASE)


def parse_json(text: str | bytes, *, object_pairs_hook: Hook | None = None) -> Any:
    """The value of a JSON text of others. Raises `ValueError`: no JSON, nested too deeply, or a number with too many digits."""
    try:
        return json.loads(text, object_pairs_hook=object_pairs_hook)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def parse_json_object(text: str | bytes, *, object_pairs_hook: Hook | None = None) -> dict[str, Any]:
    """The same for a text that must be an object. Raises `ValueError` as `parse_json`, or where it is none."""
    found = parse_json(text, object_pairs_hook=object_pairs_hook)
    if not isinstance(found, dict):
        raise ValueError(f"a {type(found).__name__}, expected an object")
    return found


def hide_secrets(text: str) -> str:
    """The text with user name, password and signatures left out of every URI in it."""
    return _IN_QUERY.sub(r"\1...", _USER.sub("://...@", text))


def holds_password(uri: str) -> bool:
    """Whether a URI holds a secret; a database's user name alone is none."""
    return bool(_PASSWORD.search(uri) or _IN_QUERY.search(uri))
