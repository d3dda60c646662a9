"""The errors a caller can meet. Each message says what is wrong, what was expected and what to do next.

RefAlignError              anything this package refuses to do (exit code 1)
├── ConfigError            a setting, a flag or a combination of settings (exit code 2)
├── GeometryError          sizes that cannot be put on the latent or token grid
├── SchemaError            a table or a shard sample that breaks its declared schema
├── DataError              one input that cannot be used; carries a machine-readable reason
│   └── TooManyQuarantined too large a share of the inputs was faulty
├── ArtifactError          weights, checkpoints or step folders that are missing, gated or damaged
├── NotPromoted            the gate kept the champion (exit code 3)
├── NonFiniteLoss          a loss or a gradient that is not a number, before the optimizer step
└── BackendUnavailable     a service (Ray, MLflow, an object store) that does not answer
    └── RayNotStarted      Ray did not start on this machine; a command tries once more
"""

from __future__ import annotations


class RefAlignError(Exception):
    """Base of all errors of this package; the command line prints its message as one line."""

    exit_code = 1

    def to_record(self) -> dict[str, str]:
        """Plain values from which `from_record` makes the error again, in another process."""
        return {"type": type(self).__name__, "message": str(self), "reason": getattr(self, "reason", "")}

    @staticmethod
    def from_record(record: dict[str, str]) -> RefAlignError:
        """The error that `to_record` described."""
        kind = globals()[record["type"]]
        return kind(record["reason"], record["message"]) if issubclass(kind, DataError) else kind(record["message"])


class ConfigError(RefAlignError):
    """A setting is unknown, out of range, or contradicts another one."""

    exit_code = 2


class GeometryError(RefAlignError):
    """A size does not fit the latent grid, the token grid or the image it came from."""


class SchemaError(RefAlignError):
    """A table or a sample does not have the columns, types or shapes that were declared for it."""


class DataError(RefAlignError):
    """One input cannot be used.

    Attributes:
        reason: upper-case word for counting, for example ``UNREADABLE`` or ``TRUNCATED``.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self):  # two arguments: the default pickling of exceptions would lose one across processes
        return type(self), (self.reason, str(self))


class TooManyQuarantined(DataError):
    """The share of faulty inputs is above ``curation.max_quarantine_fraction``."""


class ArtifactError(RefAlignError):
    """A model, checkpoint or step folder is missing, gated, incomplete or of another kind."""


class NotPromoted(RefAlignError):
    """The gate compared a challenger with the champion, and the champion stays."""

    exit_code = 3


class NonFiniteLoss(RefAlignError):
    """A loss term or the gradient norm is NaN or infinite; no rank has taken the optimizer step."""


class BackendUnavailable(RefAlignError):
    """Ray, MLflow or a storage service cannot be reached."""


class RayNotStarted(BackendUnavailable):
    """A process of Ray ended while it started on this machine, or did not answer in time."""
