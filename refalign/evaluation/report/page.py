"""The templates beside this file and their filters. Values are escaped, and a page contains all that it shows."""

from __future__ import annotations

import base64
import hashlib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import ChainableUndefined, Environment, FileSystemLoader
from markupsafe import Markup
from scipy import stats

from refalign.errors import DataError
from refalign.io.images import decode_image, encode_png, make_contact_sheet
from refalign.pipeline.steps import Step
from refalign.shards.writer import iter_contact_sheets
from refalign.tracking.run import flatten

_MAX_SHARDS, _MAX_SHEETS = 4, 3


@dataclass(frozen=True)
class Sheets:
    """Contact sheets of a finished shards step.

    Attributes:
        shown: (shard, (sample's key, JPEG) of its first samples), held-out shards first.
        total: how many shards there are.
    """

    shown: Sequence[tuple[str, Sequence[tuple[str, bytes]]]]
    total: int

    @classmethod
    def load(cls, step: Step | None) -> Sheets:
        """Of the first shards; none without a step."""
        parts = ((step.load_manifest() or {}) if step else {}).get("parts", [])
        first = sorted(parts, key=lambda part: not part.startswith("validation"))[:_MAX_SHARDS]
        return cls([(part, [*iter_contact_sheets(step, [part], _MAX_SHEETS)]) for part in first if step], len(parts))


def gain(samples: Sequence[Mapping[str, Any]], name: str) -> str:
    """Mean gain of the trained model over the base, with the 95% interval of a paired t test; a dash below two prompts."""
    pairs = [[(sample.get("scores", {}).get(side) or {}).get(name) for side in ("before", "after")] for sample in samples or ()]
    gains = [after - before for before, after in pairs if before is not None and after is not None]
    if len(gains) < 2:
        return "–"
    mean, reach = sum(gains) / len(gains), stats.t.ppf(0.975, len(gains) - 1) * stats.sem(gains)
    return f"{mean:+.3f} [{mean - reach:+.3f}, {mean + reach:+.3f}]"


def count(value: object) -> str:
    """A whole number with separated thousands; anything else as it is."""
    return f"{value:,}" if isinstance(value, int) else str(value)


def number(value: object) -> str:
    """A measured number with three digits after the point; a dash where nothing was measured."""
    return f"{value:.3f}" if isinstance(value, int | float) else "–"


def read(path: Path) -> bytes:
    """The bytes of a file; empty if it is missing."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def data_uri(data: bytes, kind: str) -> str:
    """An address that holds the bytes."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def thumbnail(data: bytes, height_px: int) -> str:
    """Address of a picture on white, scaled down to a height; empty if the picture is damaged."""
    try:
        picture = decode_image(data)
    except DataError:
        return ""
    small = make_contact_sheet([[picture]], min(height_px, picture.shape[0]), gap_px=0)
    return data_uri(encode_png(small), "image/png")


def allow(script: str) -> Markup:
    """The source of scripts in the page's policy: this script, or none."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return Markup(f"'sha256-{digest}'" if script else "'none'")


# Sections that a run has not reached are undefined, and so are their fields.
TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).with_name("templates")),
    autoescape=True,
    undefined=ChainableUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.filters |= {filter.__name__: filter for filter in (count, number, gain, read, data_uri, thumbnail, allow, flatten)}
TEMPLATES.filters["quote"] = lambda value: shlex.quote(str(value))
