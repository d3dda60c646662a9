"""What MLflow has of data that were removed: models that were trained on them, and pictures of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from refalign.pipeline.summary import REPORTS
from refalign.tracking.client import (
    DIGEST_TAG,
    FOLDER_TAG,
    PARENT_TAG,
    STAGE_TAG,
    Client,
    make_tracking_uri,
    one_line_errors,
    open_client,
)

_PICTURES = {"shards": ("contact_sheets",), "evaluate": ("videos",)}


class TrainedModel(NamedTuple):
    """A registered version, or a training run of which nothing was registered (``version`` is empty)."""

    name: str
    version: str
    aliases: tuple[str, ...]
    digest: str
    run_id: str


def has_tracking(uri: str | None, output: Path) -> bool:
    """Whether there is anything to ask: a server, or a database in the output folder."""
    return bool(uri) or (Path(output) / "mlflow.db").is_file()


def find_trained_models(uri: str | None, output: Path, digests: Sequence[str]) -> list[TrainedModel]:
    """Versions tagged with one of the shard digests, then training runs with such a data set and no version.

    Raises:
        BackendUnavailable: MLflow does not answer.
    """
    client = open_client(make_tracking_uri(uri, output))
    found: list[TrainedModel] = []
    for digest in digests:
        for version in client.search_model_versions(f"tags.`{DIGEST_TAG}` = '{digest}'"):
            model = client.get_model_version(version.name, version.version)
            found.append(TrainedModel(model.name, str(model.version), tuple(model.aliases), digest, model.run_id or ""))
    registered = {_parent(client, model.run_id) for model in found}
    for digest in digests:
        query = f"datasets.digest = '{digest[:36]}' and tags.`{STAGE_TAG}` = 'train'"
        runs = client.search_runs(_list_experiments(client), query)
        trained = [run.info.run_id for run in runs if _parent(client, run.info.run_id) not in registered]
        found += [TrainedModel("", "", (), digest, run_id) for run_id in trained]
    return found


def delete_pictures(uri: str | None, output: Path, folders: Sequence[str]) -> int:
    """Deletes contact sheets, videos and reports that runs of these step folders hold; returns how many runs had some.

    Raises:
        BackendUnavailable: MLflow does not answer.
    """
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    client = open_client(make_tracking_uri(uri, output))
    touched = 0
    for folder in folders:
        for run in client.search_runs(_list_experiments(client), f"tags.`{FOLDER_TAG}` = '{folder}'"):
            parent = client.get_run(run.data.tags[PARENT_TAG])
            for holder, names in ((run, _PICTURES.get(folder.partition("-")[0], ())), (parent, REPORTS)):
                there = {file.path for file in client.list_artifacts(holder.info.run_id)}.intersection(names)
                with one_line_errors(client.uri):
                    for name in there:
                        get_artifact_repository(holder.info.artifact_uri).delete_artifacts(name)
                touched += bool(there)
    return touched


def _list_experiments(client: Client) -> list[str]:
    return [each.experiment_id for each in client.search_experiments()]


def _parent(client: Client, run_id: str) -> str:
    return client.get_run(run_id).data.tags.get(PARENT_TAG, run_id) if run_id else ""
