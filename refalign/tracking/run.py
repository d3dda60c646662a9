"""One MLflow run for the whole story, with a child run per step.

A story is a config on an output folder. Running it again, after an end of any kind, finds its run and its children by their
tags, so that nothing is opened, logged or set a second time. The tags are the only pointer: a file could be stale.
"""

from __future__ import annotations

import subprocess
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from refalign.config import RunConfig, Section
from refalign.io.untrusted import hide_secrets
from refalign.pipeline.steps import Step
from refalign.tracking.client import make_tracking_uri, one_line_errors, open_client
from refalign.tracking.metrics import RunMetrics

Status = Literal["FINISHED", "FAILED", "KILLED"]
_MAX_PARAM_CHARACTERS = 500
_MAX_PARAMS = 100  # MLflow's limits
_STORY_TAG, _OUTPUT_TAG, _STEP_TAG = "refalign.story", "refalign.output", "refalign.step"
_PARENT_TAG = "mlflow.parentRunId"
_KEYED_BY_TEXT = frozenset({"licenses", "consents", "splits", "models", "video"})


class StoryRun:
    """The tracked run of one story; used by the driver alone.

    Attributes:
        uri: MLflow's address.
        run_id: the story's run.
    """

    def __init__(
        self,
        client: Any,
        uri: str,
        experiment_id: str,
        run_id: str,
        params: Mapping[str, Mapping[str, str]],
        children: dict[str, str],
    ) -> None:
        self.uri, self.run_id, self.experiment_id, self.client = uri, run_id, experiment_id, client
        self._params, self._children = params, children
        self._opened: set[str] = set()

    @classmethod
    def open(
        cls, config: RunConfig, *, output: Path, fingerprint: str, sections: Mapping[str, Sequence[str]] | None = None
    ) -> StoryRun:
        """Starts the story's run, or continues the one it had.

        Args:
            output: the run's folder; stories of other folders are other runs even when all settings agree.
            fingerprint: of everything that makes the story what it is.
            sections: by step, the settings that are params of its run.

        Raises:
            BackendUnavailable: MLflow does not answer, or refuses.
        """
        output = Path(output).resolve()
        uri = make_tracking_uri(config.tracking.uri, output)
        output.mkdir(parents=True, exist_ok=True)
        client = open_client(uri)
        with one_line_errors(uri):
            experiment_id = _find_experiment(client, config.tracking.experiment, None if config.tracking.uri else output)
            identity = {_STORY_TAG: fingerprint, _OUTPUT_TAG: output.as_uri()}  # a URI: no quotes in the query
            run_id = _find_run(client, experiment_id, identity)
            if run_id is None:
                tags = {**identity, "refalign.code": code_revision()}
                run_id = client.create_run(experiment_id, tags=tags, run_name=f"story-{fingerprint}").info.run_id
            client.update_run(run_id, status="RUNNING")
            children = {
                run.data.tags[_STEP_TAG]: run.info.run_id
                for run in client.search_runs([experiment_id], f"tags.`{_PARENT_TAG}` = '{run_id}'")
                if _STEP_TAG in run.data.tags
            }
            params = {step: flatten({name: getattr(config, name) for name in names}) for step, names in (sections or {}).items()}
            story = cls(client, uri, experiment_id, run_id, params, children)
            story._log_params(run_id, flatten(config))
        return story

    def child(self, step: str) -> str:
        """Run id of a step's own run, opened (or continued) at the first call."""
        if step in self._opened:
            return self._children[step]
        with one_line_errors(self.uri):
            if step not in self._children:
                tags = {_PARENT_TAG: self.run_id, _STEP_TAG: step}
                self._children[step] = self.client.create_run(self.experiment_id, tags=tags, run_name=step).info.run_id
            run_id = self._children[step]
            self.client.update_run(run_id, status="RUNNING")
            self._log_params(run_id, self._params.get(step, {}))
        self._opened.add(step)
        return run_id

    def finish_child(self, step: str, status: Status = "FINISHED") -> None:
        """Ends a step's run."""
        run_id = self.child(step)
        with one_line_errors(self.uri):
            self.client.set_terminated(run_id, status)
        self._opened.discard(step)

    def finish(self, status: Status = "FINISHED") -> None:
        """Ends the story's run, and the children that are still open with it."""
        with one_line_errors(self.uri):
            for step in sorted(self._opened):
                self.client.set_terminated(self._children[step], status)
            self.client.set_terminated(self.run_id, status)
        self._opened.clear()

    def log_totals(self, step: Step, manifest: Mapping[str, Any], seconds: float | None) -> None:
        """Logs what a finished step recorded: its numbers as metrics, its folder as tags, its manifest as a file."""
        self.set_tags(step.name, {"refalign.folder": step.folder.name, "refalign.fingerprint": step.fingerprint})
        took = {} if seconds is None else {"seconds": seconds}
        self.log_records(step.name, [{"step": 0, **dict(_iter_totals(manifest)), **took}])
        self.log_file(step.name, step.folder / "manifest.json")

    def log_records(self, step: str, records: Sequence[Mapping[str, Any]]) -> None:
        """Logs what a step's run lacks of these metrics by "step": the lines of a ``metrics.jsonl``, or totals at step 0."""
        RunMetrics(self.client, self.uri, self.child(step)).send(records)

    def set_tags(self, step: str, tags: Mapping[str, Any]) -> None:
        """Sets tags on a step's run; unlike params they may change."""
        run_id = self.child(step)
        with one_line_errors(self.uri):
            for key, value in tags.items():
                self.client.set_tag(run_id, key, str(value)[:_MAX_PARAM_CHARACTERS])

    def log_file(self, step: str | None, path: Path, folder: str | None = None) -> None:
        """Copies a file (video, picture, report) to a step's run, or the story's own; the same name is overwritten."""
        run_id = self.run_id if step is None else self.child(step)
        with one_line_errors(self.uri):
            self.client.log_artifact(run_id, str(path), folder)

    def log_image(self, step: str, image: Any, name: str) -> None:
        """Logs ``uint8 [H, W, 3]`` as a picture called ``name``, for example ``contact_sheets/train-000000.png``."""
        run_id = self.child(step)
        with one_line_errors(self.uri):
            self.client.log_image(run_id, image, artifact_file=name)

    def log_dataset(self, step: str, *, name: str, folder: Path, digest: str, context: str = "training") -> None:
        """Logs a step folder as the data that a step's run used.

        Args:
            digest: of the content; MLflow keeps its first 36 characters.
        """
        from mlflow.data.dataset_source_registry import resolve_dataset_source
        from mlflow.data.meta_dataset import MetaDataset
        from mlflow.entities import Dataset, DatasetInput, InputTag

        run_id = self.child(step)
        with one_line_errors(self.uri), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*interpreted in multiple ways.*")  # MLflow offers one source twice
            dataset = MetaDataset(resolve_dataset_source(str(folder)), name=name, digest=digest[:36])  # ty: ignore[abstract-class-instantiation]
            inputs = [DatasetInput(Dataset(**dataset.to_dict()), [InputTag("mlflow.data.context", context)])]
            self.client.log_inputs(run_id, datasets=inputs)

    def _log_params(self, run_id: str, params: Mapping[str, str]) -> None:
        """Logs the params the run does not have: MLflow refuses to change one."""
        from mlflow.entities import Param

        known = self.client.get_run(run_id).data.params
        fresh = [Param(key, value) for key, value in params.items() if key not in known]
        for start in range(0, len(fresh), _MAX_PARAMS):
            self.client.log_batch(run_id, params=fresh[start : start + _MAX_PARAMS])


def flatten(section: Section | Mapping[str, Any] | list[Any] | tuple[Any, ...], prefix: str = "") -> dict[str, str]:
    """Settings as dotted names, the way ``--set`` spells them, and text of at most 500 characters without credentials."""
    if isinstance(section, Section):
        section = section.model_dump(mode="json")
    pairs = section.items() if isinstance(section, Mapping) else enumerate(section)
    flat: dict[str, str] = {}
    for name, value in pairs:
        if isinstance(value, Section | Mapping | list | tuple):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            text = hide_secrets(str(value))
            flat[f"{prefix}{name}"] = text if len(text) <= _MAX_PARAM_CHARACTERS else text[: _MAX_PARAM_CHARACTERS - 3] + "..."
    return flat


def code_revision() -> str:
    """Git revision of this source tree, marked when files differ from it; "unknown" outside a checkout."""
    here = Path(__file__).parent
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return described.stdout.strip() or "unknown"


def _find_experiment(client: Any, name: str, output: Path | None) -> str:
    """Id of the experiment, created if it is new; with ``output``, its artifacts live there."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name, artifact_location=(output / "artifacts").as_uri() if output else None)
        except MlflowException:  # another process was faster
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        raise MlflowException(
            f"experiment {name!r} was deleted; restore it with `mlflow experiments restore` or set tracking.experiment"
        )
    return found.experiment_id


def _find_run(client: Any, experiment_id: str, tags: Mapping[str, str]) -> str | None:
    """The oldest run with these tags."""
    query = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
    runs = client.search_runs([experiment_id], query)
    return min(runs, key=lambda run: run.info.start_time).info.run_id if runs else None


def _iter_totals(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Numbers of a manifest, nested groups as ``group.name``; lists of examples and groups keyed by free text are left out."""
    for name, entry in value.items():
        if name in _KEYED_BY_TEXT:
            continue
        if isinstance(entry, Mapping):
            yield from _iter_totals(entry, f"{prefix}{name}.")
        elif isinstance(entry, int | float) and not isinstance(entry, bool):
            yield prefix + name, float(entry)
