"""Where a run works and what it reports to."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator

from refalign.config.section import Amount, Count, Positive, Section
from refalign.io.untrusted import holds_password


class ProcessConfig(Section):
    """What Ray reserves for one process: an actor or a training rank."""

    cpus: Positive = 1.0
    """CPUs of one process."""
    gpus: Amount = 0.0
    """GPUs of one process; fractions share a device."""
    resources: dict[str, Positive] = {}
    """Custom Ray resources of one process; it runs only on nodes that offer them."""


class PoolConfig(ProcessConfig):
    max_actors: Count = 1
    """Actors at the most. Ray starts with one and adds more while parts wait and the cluster has room."""


class ClusterConfig(Section):
    subjects: PoolConfig = PoolConfig()
    """Actors that decode, detect and embed."""
    pairs: PoolConfig = PoolConfig()
    """Actors that match subjects; they need no GPU."""
    shards: PoolConfig = PoolConfig()
    """Actors that encode."""
    evaluate: PoolConfig = PoolConfig()
    """Actors that make and score videos."""
    train: ProcessConfig = ProcessConfig()
    """Training ranks."""
    threads: Count = 2
    """Compute threads of each actor and rank."""


def _without_password(uri: str) -> str:
    if holds_password(uri):
        raise ValueError(
            "give credentials in the environment (MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or PGPASSWORD for a "
            "database), not in the URI, which is written into manifests"
        )
    return uri


class TrackingConfig(Section):
    uri: Annotated[str, AfterValidator(_without_password)] | None = None
    """MLflow server; None keeps a database in the output folder. Credentials come from MLflow's environment variables."""
    experiment: str = "refalign"
    """MLflow experiment."""
    model_name: str = "refalign"
    """Registered model that new versions are added to."""
