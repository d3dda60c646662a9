"""The MLflow run of a run, with a child run for each stage.

Runs are found by their tags alone: the same settings in the same output folder continue the same runs, and nothing is opened,
logged or set twice. All of it raises `BackendUnavailable` where MLflow does not answer or refuses.
"""

from __future__ import annotations

import math
import subprocess
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from refalign.config import RunConfig, Section
from refalign.errors import BackendUnavailable
from refalign.io.untrusted import hide_secrets
from refalign.pipeline.steps import Step
from refalign.pipeline.summary import REPORTS
from refalign.tracking.client import Client, Tag, ignored, make_tracking_uri, one_line_errors, open_client

if TYPE_CHECKING:
    import numpy as np

Status = Literal["FINISHED", "FAILED", "KILLED"]
Record = Mapping[str, Any]
"""A line of ``metrics.jsonl``: values by name, one of them "step"."""
_MAX_TEXT = 500  # characters of a param
_MAX_PARAMS, _MAX_METRICS = 100, 1000  # of one request to MLflow
_KEYED_BY_TEXT = frozenset({"licenses", "consents", "splits", "models", "video"})


@dataclass
class TrackedRun:
    """The MLflow run of one run, used by the driver alone; ``params`` and ``children`` (run ids) are by stage."""

    client: Client
    experiment_id: str
    run_id: str
    params: Mapping[str, Mapping[str, str]]
    children: dict[str, str]
    _opened: set[str] = field(default_factory=set)

    @property
    def uri(self) -> str:
        return self.client.uri

    @classmethod
    def open(
        cls, config: RunConfig, *, output: Path, fingerprint: str, sections: Mapping[str, Sequence[str]] | None = None
    ) -> TrackedRun:
        """Starts the run, or continues it.

        Args:
            fingerprint: of all that the run's results depend on; in another ``output`` it is another run.
            sections: of the settings, by stage: the params of its run.
        """
        output = Path(output).resolve()
        output.mkdir(parents=True, exist_ok=True)
        client = open_client(make_tracking_uri(config.tracking.uri, output))
        experiment_id = _find_experiment(client, config.tracking.experiment, None if config.tracking.uri else output)
        tags = {"refalign.story": fingerprint, "refalign.output": output.as_uri()}  # a URI: no quotes in the query
        query = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
        if runs := client.search_runs([experiment_id], query):
            run_id = min(runs, key=lambda run: run.info.start_time).info.run_id
        else:
            tags["refalign.code"] = code_revision()
            run_id = client.create_run(experiment_id, tags=tags, run_name=f"run-{fingerprint}").info.run_id
        client.update_run(run_id, status="RUNNING")
        children = {
            run.data.tags[Tag.STAGE]: run.info.run_id
            for run in client.search_runs([experiment_id], f"tags.`{Tag.PARENT}` = '{run_id}'")
            if Tag.STAGE in run.data.tags
        }
        params = {stage: flatten({name: getattr(config, name) for name in names}) for stage, names in (sections or {}).items()}
        tracked = cls(client, experiment_id, run_id, params, children)
        tracked._log_params(run_id, flatten(config))
        return tracked

    def child(self, stage: str) -> str:
        """Id of a stage's own run, which the first call opens or continues."""
        if stage not in self._opened:
            if stage not in self.children:
                tags = {Tag.PARENT: self.run_id, Tag.STAGE: stage}
                self.children[stage] = self.client.create_run(self.experiment_id, tags=tags, run_name=stage).info.run_id
            self.client.update_run(self.children[stage], status="RUNNING")
            self._log_params(self.children[stage], self.params.get(stage, {}))
            self._opened.add(stage)
        return self.children[stage]

    def finish_child(self, stage: str) -> None:
        """Ends a stage's run."""
        self.client.set_terminated(self.child(stage), "FINISHED")
        self._opened.discard(stage)

    def finish(self, status: Status = "FINISHED") -> None:
        """Ends the run, and those of the stages that are still open."""
        for run_id in (*(self.children[stage] for stage in sorted(self._opened)), self.run_id):
            self.client.set_terminated(run_id, status)
        self._opened.clear()

    def log_totals(self, step: Step, manifest: Mapping[str, object], seconds: float | None) -> None:
        """Logs what a finished stage recorded: its numbers as metrics, its folder as tags, its manifest as a file."""
        self.set_tags(step.name, {Tag.FOLDER: step.folder.name, "refalign.fingerprint": step.fingerprint})
        took = {} if seconds is None else {"seconds": seconds}
        self.log_records(step.name, [{"step": 0, **dict(_iter_totals(manifest)), **took}])
        self.log_file(step.name, step.folder / "manifest.json")

    def log_records(self, stage: str, records: Sequence[Record]) -> None:
        """Logs the metrics that a stage's run lacks: the lines of a ``metrics.jsonl``, or totals at step 0."""
        RunMetrics(self.client, self.child(stage)).send(records)

    def set_tags(self, stage: str, tags: Mapping[str, str]) -> None:
        """Sets tags on a stage's run; unlike params they may change."""
        for key, value in tags.items():
            self.client.set_tag(self.child(stage), key, value)

    def log_file(self, stage: str | None, path: Path, folder: str | None = None) -> None:
        """Copies a file to a stage's run, or to the run itself (None); the same name is overwritten."""
        self.client.log_artifact(self.run_id if stage is None else self.child(stage), str(path), folder)

    def log_image(self, stage: str, image: np.ndarray, name: str) -> None:
        """Logs ``uint8 [H, W, 3]`` as a picture called ``name``, for example ``contact_sheets/train-000000.png``."""
        self.client.log_image(self.child(stage), image, artifact_file=name)

    def log_dataset(self, stage: str, *, name: str, folder: Path, digest: str) -> None:
        """Logs a folder as the data that a stage's run used; MLflow keeps 36 characters of the content's digest."""
        from mlflow.data.dataset_source_registry import resolve_dataset_source
        from mlflow.data.meta_dataset import MetaDataset
        from mlflow.entities import Dataset, DatasetInput, InputTag

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*interpreted in multiple ways.*")  # MLflow offers one source twice
            dataset = MetaDataset(resolve_dataset_source(str(folder)), name=name, digest=digest[:36])  # ty: ignore[abstract-class-instantiation]
        inputs = [DatasetInput(Dataset(**dataset.to_dict()), [InputTag("mlflow.data.context", "training")])]
        self.client.log_inputs(self.child(stage), datasets=inputs)

    def _log_params(self, run_id: str, params: Mapping[str, str]) -> None:
        """Logs the params that the run lacks: MLflow refuses to change one."""
        from mlflow.entities import Param

        known = self.client.get_run(run_id).data.params
        fresh = [Param(key, value) for key, value in params.items() if key not in known]
        for start in range(0, len(fresh), _MAX_PARAMS):
            self.client.log_batch(run_id, params=fresh[start : start + _MAX_PARAMS])


class RunMetrics:
    """Sends metrics to one MLflow run, each (metric, step) once, because MLflow appends: what the run has is read first.

    After an error, make another object, which reads again what arrived.
    """

    def __init__(self, client: Client, run_id: str) -> None:
        self._client, self._run_id = client, run_id
        self._steps: dict[str, set[int]] = {}

    def send(self, records: Iterable[Record]) -> None:
        """Sends the numbers that the run lacks; of two for one step the first counts. Texts and NaN are left out."""
        from mlflow.entities import Metric

        now_ms, fresh = int(time.time() * 1000), []
        for record in records:
            step = int(record["step"])
            for name, value in record.items():
                if name == "step" or not isinstance(value, int | float) or not math.isfinite(value):
                    continue
                if name not in self._steps:
                    self._steps[name] = {point.step for point in self._client.get_metric_history(self._run_id, name)}
                if step not in self._steps[name]:
                    self._steps[name].add(step)
                    fresh.append(Metric(name, float(value), now_ms, step))
        for start in range(0, len(fresh), _MAX_METRICS):
            self._client.log_batch(self._run_id, metrics=fresh[start : start + _MAX_METRICS])


def delete_pictures(client: Client, folders: Sequence[str]) -> int:
    """Deletes contact sheets, videos and reports that runs of these step folders hold; returns how many runs had some."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    pictures = {"shards": ("contact_sheets",), "evaluate": ("videos",)}
    touched = 0
    for folder in folders:
        for run in client.search_runs(client.list_experiments(), f"tags.`{Tag.FOLDER}` = '{folder}'"):
            parent = client.get_run(run.data.tags[Tag.PARENT])
            for holder, names in ((run, pictures.get(folder.partition("-")[0], ())), (parent, REPORTS)):
                there = {file.path for file in client.list_artifacts(holder.info.run_id)}.intersection(names)
                with one_line_errors(client.uri):
                    for name in there:
                        get_artifact_repository(holder.info.artifact_uri).delete_artifacts(name)
                touched += bool(there)
    return touched


def flatten(section: Section | Mapping[str, object] | Sequence[object], prefix: str = "") -> dict[str, str]:
    """Settings by dotted name, as ``--set`` spells it, as text of at most 500 characters without credentials."""
    if isinstance(section, Section):
        section = section.model_dump(mode="json")
    flat: dict[str, str] = {}
    for name, value in section.items() if isinstance(section, Mapping) else enumerate(section):
        if isinstance(value, Section | Mapping | list | tuple):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            text = hide_secrets(str(value))
            flat[f"{prefix}{name}"] = text if len(text) <= _MAX_TEXT else text[: _MAX_TEXT - 3] + "..."
    return flat


def code_revision() -> str:
    """Git revision of this source tree, marked when files differ from it; "unknown" outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        described = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return described.stdout.strip() or "unknown"


def _find_experiment(client: Client, name: str, output: Path | None) -> str:
    """Id of the experiment, which is created where it is new; with ``output``, its files lie there."""
    if client.get_experiment_by_name(name) is None:
        with ignored("RESOURCE_ALREADY_EXISTS"):  # another process was faster
            client.create_experiment(name, artifact_location=(output / "artifacts").as_uri() if output else None)
    found = client.get_experiment_by_name(name)
    if found.lifecycle_stage == "deleted":
        raise BackendUnavailable(
            f"MLflow at {hide_secrets(client.uri)}: experiment {name!r} was deleted; restore it with "
            "`mlflow experiments restore`, or set tracking.experiment."
        )
    return found.experiment_id


def _iter_totals(manifest: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Numbers of a manifest, nested ones as ``group.name``; lists, and groups whose keys are free text, are left out."""
    for name, entry in manifest.items():
        if name in _KEYED_BY_TEXT:
            continue
        if isinstance(entry, Mapping):
            yield from _iter_totals(entry, f"{prefix}{name}.")
        elif isinstance(entry, int | float) and not isinstance(entry, bool):
            yield prefix + name, float(entry)
