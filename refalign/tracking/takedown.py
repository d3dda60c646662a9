"""What MLflow knows of data that were taken down: the models trained on them, and the pictures of them among its files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refalign.pipeline.summary import REPORTS
from refalign.tracking.client import make_tracking_uri, one_line_errors, open_client

_PICTURES = {"shards": ("contact_sheets",), "evaluate": ("videos",)}


@dataclass(frozen=True)
class TrainedModel:
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
    where = make_tracking_uri(uri, output)
    client = open_client(where)
    found: list[TrainedModel] = []
    with one_line_errors(where):
        for digest in digests:
            for version in client.search_model_versions(f"tags.`refalign.shard_digest` = '{digest}'"):
                model = client.get_model_version(version.name, version.version)
                found.append(TrainedModel(model.name, str(model.version), tuple(model.aliases), digest, model.run_id or ""))
        stories = {_parent(client, model.run_id) for model in found}
        experiments = [each.experiment_id for each in client.search_experiments()]
        for digest in digests:
            for run in client.search_runs(experiments, f"datasets.digest = '{digest[:36]}' and tags.`refalign.step` = 'train'"):
                if _parent(client, run.info.run_id) not in stories:
                    found.append(TrainedModel("", "", (), digest, run.info.run_id))
    return found


def delete_pictures(uri: str | None, output: Path, folders: Sequence[str]) -> int:
    """Deletes contact sheets, videos and reports that runs of these step folders hold; returns how many runs had some.

    Raises:
        BackendUnavailable: MLflow does not answer.
    """
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    where = make_tracking_uri(uri, output)
    client = open_client(where)
    touched = 0
    with one_line_errors(where):
        experiments = [each.experiment_id for each in client.search_experiments()]
        for folder in folders:
            for run in client.search_runs(experiments, f"tags.`refalign.folder` = '{folder}'"):
                parent = client.get_run(run.data.tags["mlflow.parentRunId"])
                for holder, names in ((run, _PICTURES.get(folder.partition("-")[0], ())), (parent, REPORTS)):
                    there = {file.path for file in client.list_artifacts(holder.info.run_id)} & set(names)
                    for name in there:
                        get_artifact_repository(holder.info.artifact_uri).delete_artifacts(name)
                    touched += bool(there)
    return touched


def _parent(client: Any, run_id: str | None) -> str:
    return client.get_run(run_id).data.tags.get("mlflow.parentRunId", run_id) if run_id else ""
