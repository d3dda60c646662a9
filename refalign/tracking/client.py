"""The one door to MLflow: a late import, a short first contact, and errors of one line.

``import mlflow`` costs 5 to 40 s of CPU. `warm_mlflow` pays it in a thread while something else is waited for.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from refalign.errors import BackendUnavailable
from refalign.io.untrusted import hide_secrets

_FIRST_CONTACT_S = 10.0


def warm_mlflow() -> threading.Thread:
    """Starts importing MLflow in the background; later calls of this package wait for it by themselves."""
    thread = threading.Thread(target=_import_mlflow, name="import-mlflow", daemon=True)
    thread.start()
    return thread


def make_tracking_uri(uri: str | None, output: Path) -> str:
    """The URI that was configured, or a database in the output folder. Absolute: workers run in other folders."""
    return uri or f"sqlite:///{Path(output).resolve() / 'mlflow.db'}"


def open_client(uri: str) -> Any:
    """An ``MlflowClient`` for ``uri``, which also becomes the process's default.

    Raises:
        BackendUnavailable: no server answers there, or it refuses.
    """
    check_server(uri)
    mlflow = _import_mlflow()
    with one_line_errors(uri):
        _create_database(uri, mlflow)
        mlflow.set_tracking_uri(uri)
        mlflow.set_registry_uri(uri)  # else MLFLOW_REGISTRY_URI could send the model elsewhere than its run
        return mlflow.MlflowClient(uri, uri)


def _create_database(uri: str, mlflow: Any) -> None:
    """Makes a new local database aside and renames it: MLflow refuses one that a kill left without some of its tables."""
    path = Path(uri.removeprefix("sqlite:///"))
    if not uri.startswith("sqlite:///") or path.exists() or not path.parent.is_dir():
        return
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    address = f"sqlite:///{aside}"
    mlflow.MlflowClient(address, address).search_experiments(max_results=1)
    try:
        os.link(aside, path)  # not a rename: another process may have made one meanwhile, and works with it
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
        advice = (
            "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
            if "401" in text or "403" in text
            else "check the server, then run the same command again"
        )
        raise BackendUnavailable(f"MLflow at {hide_secrets(uri)}: {text[:300]}; {advice}.") from error


def check_server(uri: str | None) -> str:
    """Asks an HTTP server for a sign of life, within seconds: MLflow's own client would try for half a minute.

    Returns:
        a line about what answers from this machine; a database is not asked.

    Raises:
        BackendUnavailable: nothing answers, or what does is broken.
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
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # Together about 30 s for a server that is gone; MLflow's own seven retries take four minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "4")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_UV_AUTO_DETECT", "false")  # else the caller's lock file, with its addresses, enters the model
    import mlflow

    # They tell of every new table, of a missing pip, and of waiting for what is there already.
    for noisy in ("mlflow.store.db.utils", "alembic", "mlflow.utils.environment", "mlflow.store.model_registry.abstract_store"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    return mlflow
