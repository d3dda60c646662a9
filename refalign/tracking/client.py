"""The connection to MLflow: a late import, a short first contact, errors of one line.

``import mlflow`` takes 5 to 40 s of CPU. `warm_mlflow` starts it in a thread while the run waits for something else.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from refalign.errors import BackendUnavailable
from refalign.io.untrusted import hide_secrets

NOT_FOUND = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
_FIRST_CONTACT_S = 10.0


class Tag:
    """Tags of runs and versions, by which they are found."""

    PARENT, STAGE, FOLDER = "mlflow.parentRunId", "refalign.step", "refalign.folder"
    SHARDS, WEIGHTS, KEY = "refalign.shard_digest", "refalign.weights", "refalign.key"
    DECISION, REASON = "refalign.gate", "refalign.gate_reason"


class Client:
    """An ``MlflowClient`` whose every method has `one_line_errors`."""

    def __init__(self, uri: str, client: Any) -> None:
        self.uri, self._client = uri, client

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return one_line_errors(self.uri)(getattr(self._client, name))

    def list_experiments(self) -> list[str]:
        """Ids of all experiments."""
        return [each.experiment_id for each in self.search_experiments()]


def warm_mlflow() -> None:
    """Starts to import MLflow in the background; a later import waits for it."""
    threading.Thread(target=_import_mlflow, name="import-mlflow", daemon=True).start()


def make_tracking_uri(uri: str | None, output: Path) -> str:
    """The configured URI, or a database in the output folder. Its path is absolute: workers run in other folders."""
    return uri or f"sqlite:///{Path(output).resolve() / 'mlflow.db'}"


def open_client(uri: str) -> Client:
    """A client of MLflow at ``uri``, which also becomes the process's default. Raises `BackendUnavailable`."""
    check_server(uri)
    mlflow = _import_mlflow()
    with one_line_errors(uri):
        _create_database(uri, mlflow)
        mlflow.set_tracking_uri(uri)
        mlflow.set_registry_uri(uri)  # else MLFLOW_REGISTRY_URI could send the model elsewhere than its run
        return Client(uri, mlflow.MlflowClient(uri, uri))


def _create_database(uri: str, mlflow: Any) -> None:
    """Makes a new local database aside and moves it: MLflow refuses one that a kill left without some of its tables."""
    path = Path(uri.removeprefix("sqlite:///"))
    if not uri.startswith("sqlite:///") or path.exists() or not path.parent.is_dir():
        return
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    address = f"sqlite:///{aside}"
    mlflow.MlflowClient(address, address).search_experiments(max_results=1)
    try:
        os.link(aside, path)  # not a rename: another process may have made one meanwhile, and use it
    except FileExistsError:
        pass
    except OSError:  # no links on this file system
        aside.replace(path)
    aside.unlink(missing_ok=True)


@contextmanager
def one_line_errors(uri: str) -> Iterator[None]:
    """Turns MLflow's exceptions into one line that names the server, without its credentials."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        text = hide_secrets(" ".join(str(error).split()))
        advice = "check the server, then run the same command again"
        if "401" in text or "403" in text:
            advice = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        raise BackendUnavailable(f"MLflow at {hide_secrets(uri)}: {text[:300]}; {advice}.") from error


@contextmanager
def ignored(*codes: str) -> Iterator[None]:
    """Ignores errors of a `Client` with these codes of MLflow."""
    try:
        yield
    except BackendUnavailable as error:
        if getattr(error.__cause__, "error_code", None) not in codes:
            raise


def check_server(uri: str | None) -> str:
    """Asks an HTTP server whether it lives, within seconds: MLflow's own client tries for half a minute.

    Returns one line about what answers; a database is not asked. Raises `BackendUnavailable`.
    """
    if uri is None or not uri.startswith(("http://", "https://")):
        return "a database in the output folder, written by the driver alone"
    shown, address = hide_secrets(uri), urlsplit(uri)
    address = address._replace(netloc=address.netloc.rpartition("@")[2], path=f"{address.path.rstrip('/')}/health")
    try:
        urllib.request.urlopen(address.geturl(), timeout=_FIRST_CONTACT_S).close()
    except urllib.error.HTTPError as error:
        if error.code >= 500:  # below, a proxy may refuse /health, or want credentials, and still serve the API
            raise BackendUnavailable(f"MLflow at {shown}: HTTP {error.code}; is it MLflow? See tracking.uri.") from error
    except (OSError, ValueError, HTTPException) as error:
        raise BackendUnavailable(
            f"MLflow at {shown} does not answer {socket.gethostname()} ({getattr(error, 'reason', error)}); start it, give "
            "tracking.uri as this machine sees it, or leave tracking.uri unset to keep a database in the output folder."
        ) from error
    return f"{shown} answers"


def _import_mlflow() -> Any:
    settings = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        # Together about 30 s for a server that is gone; MLflow's own seven retries take four minutes.
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "4",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_UV_AUTO_DETECT": "false",  # else the caller's lock file, with its addresses, enters the model
    }
    os.environ.update({name: value for name, value in settings.items() if name not in os.environ})
    import mlflow

    # They report every new table, a missing pip, and waiting for what is there already.
    for noisy in ("mlflow.store.db.utils", "alembic", "mlflow.utils.environment", "mlflow.store.model_registry.abstract_store"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    return mlflow
