"""Moves the alias ``champion`` of a registered model, forward and back; one process at a time.

MLflow cannot compare and set an alias in one step, but its database refuses a second registered model of one name. So an empty
model ``<name>.promotion`` is the lock, and its description names the holder. All of it raises `BackendUnavailable` where MLflow
does not answer or another promotion is at work.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from refalign.errors import ArtifactError, BackendUnavailable
from refalign.tracking.client import NOT_FOUND, Client, Tag, ignored, open_client
from refalign.tracking.registry import Version, find_versions

CHAMPION = "champion"
_HISTORY_TAG = "refalign.champions"
_STALE_LOCK_S = 600.0


def find_version(uri: str, name: str, alias: str) -> str | None:
    """Number of the version behind an alias, or None."""
    return _at_alias(open_client(uri), name, alias)


def record_decision(uri: str, name: str, version: str, *, decision: Mapping[str, Any], champion: str | None) -> None:
    """Writes what the gate said onto the version: tags, the evidence as a file, and the table of comparisons.

    Args:
        decision: `refalign.evaluation.gate.Decision` as plain values, with the scores by prompt under "champion_scores" and
            "challenger_scores".
        champion: version it was compared with; None for the base model.
    """
    client, against = open_client(uri), _name_version(champion)
    client.set_model_version_tag(name, version, Tag.DECISION, "passed" if decision["passed"] else "refused")
    client.set_model_version_tag(name, version, Tag.REASON, f"against {against}: {decision['reason']}"[:5000])
    if run_id := client.get_model_version(name, version).run_id:
        client.log_text(run_id, json.dumps({"against": against, **decision}, indent=1), f"gate/version-{version}.json")
        if rows := decision["comparisons"]:
            columns = {column: [row[column] for row in rows] for column in rows[0]}
            client.log_table(run_id, columns, f"gate/version-{version}-comparisons.json")


def promote(uri: str, name: str, version: str, *, expected: str | None) -> None:
    """Makes ``version`` champion, in place of ``expected``, which the evidence is about.

    Raises:
        ArtifactError: another version became champion since.
    """
    client = open_client(uri)
    with _lock(client, name):
        if (present := _at_alias(client, name, CHAMPION)) != expected:
            raise ArtifactError(
                f"{name}: version {version} was compared with {_name_version(expected)}, but {_name_version(present)} "
                "is champion now; another promotion won. Run pipelines/register.py promote again: it compares with that one."
            )
        client.set_registered_model_alias(name, CHAMPION, version)
        _write_history(client, name, [*_history(client, name), version])


def rollback(uri: str, name: str) -> tuple[str, str]:
    """Gives the alias back; returns the version that had it and the one that has it. Raises `ArtifactError`: none was before."""
    client = open_client(uri)
    with _lock(client, name):
        history = _history(client, name)
        present = _at_alias(client, name, CHAMPION)
        if present is None or len(history) < 2:
            raise ArtifactError(f"{name}: no champion before this one; pipelines/register.py list shows the versions.")
        client.set_registered_model_alias(name, CHAMPION, history[-2])
        _write_history(client, name, history[:-1])
        return present, history[-2]


def list_versions(uri: str, name: str) -> list[Version]:
    """Every version, newest first. Raises `ArtifactError`: there is no such model."""
    found = find_versions(open_client(uri), f"name = '{name}'")
    if not found:
        raise ArtifactError(f"{name}: no version of it in this registry; finish a run of pipelines/full.py first.")
    return found


@contextmanager
def _lock(client: Client, name: str) -> Iterator[None]:
    lock, holder, is_mine = f"{name}.promotion", f"process {os.getpid()} on {socket.gethostname()}", False
    with ignored("RESOURCE_ALREADY_EXISTS"):
        client.create_registered_model(lock, description=holder)
        is_mine = True
    if not is_mine:
        held = client.get_registered_model(lock)
        age_s = time.time() - held.creation_timestamp / 1000
        if age_s < _STALE_LOCK_S:
            by = f"{held.description}, since {age_s:.0f} s"
            raise BackendUnavailable(f"{name}: another promotion is at work ({by}); wait for it, then try again.")
        client.delete_registered_model(lock)  # its process ended without giving it back
        client.create_registered_model(lock, description=holder)
    try:
        yield
    finally:
        client.delete_registered_model(lock)


def _at_alias(client: Client, name: str, alias: str) -> str | None:
    with ignored(*NOT_FOUND):
        return str(client.get_model_version_by_alias(name, alias).version)
    return None


def _name_version(version: str | None) -> str:
    return f"version {version}" if version else "the base model"


def _history(client: Client, name: str) -> list[str]:
    return json.loads(client.get_registered_model(name).tags.get(_HISTORY_TAG, "[]"))


def _write_history(client: Client, name: str, versions: list[str]) -> None:
    client.set_registered_model_tag(name, _HISTORY_TAG, json.dumps(versions))
