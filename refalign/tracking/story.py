"""What each finished step leaves in its MLflow run: counts as metrics, its folder, and pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from refalign.io.images import decode_image
from refalign.io.storage import open_file
from refalign.pipeline.steps import Step
from refalign.tracking.run import StoryRun

_MAX_SHEETS = 3
_KEYED_BY_TEXT = frozenset({"licenses", "consents", "splits", "models", "video"})


def log_step(tracker: StoryRun, step: Step, manifest: Mapping[str, Any], seconds: float | None) -> None:
    """Logs a finished step and ends its run; a second call adds nothing."""
    tracker.set_tags(step.name, {"refalign.folder": step.folder.name, "refalign.fingerprint": step.fingerprint})
    took = {} if seconds is None else {"seconds": seconds}
    tracker.log_metrics(step.name, {**dict(_iter_totals(manifest)), **took})
    tracker.log_file(step.name, step.folder / "manifest.json")
    if step.name == "shards":
        tracker.log_dataset(step.name, name="shards", folder=step.folder, digest=manifest["digest"])
        for name, picture in iter_contact_sheets(step, manifest, _MAX_SHEETS):
            tracker.log_image(step.name, decode_image(picture), f"contact_sheets/{name}.png")
    if step.name == "evaluate":
        for path in sorted(step.parts_folder.glob("*.mp4")):
            tracker.log_file(step.name, path, "videos")
    tracker.finish_child(step.name)


def iter_contact_sheets(step: Step, manifest: Mapping[str, Any], limit: int) -> Iterator[tuple[str, bytes]]:
    """Up to ``limit`` sample pictures (key, JPEG bytes) of a shards step, read by byte offset."""
    for part in manifest["parts"]:
        record = step.load_part(part)
        if limit == 0 or record is None:
            return
        with open_file(step.locate(part, record)) as tar:
            for sample in record["samples"][:limit]:
                offset, size, *_ = sample["members"]["jpg"]
                tar.seek(offset)
                limit -= 1
                yield sample["key"], tar.read(size)


def _iter_totals(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Numbers of a manifest, nested groups as ``group.name``; lists of examples and groups keyed by free text are left out."""
    for name, entry in value.items():
        if name in _KEYED_BY_TEXT:
            continue
        if isinstance(entry, Mapping):
            yield from _iter_totals(entry, f"{prefix}{name}.")
        elif isinstance(entry, int | float) and not isinstance(entry, bool):
            yield prefix + name, float(entry)
