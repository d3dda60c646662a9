"""Where a model comes from and what may be done with it: tags of its version, and its card."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from refalign.config import RunConfig
from refalign.io.untrusted import hide_secrets
from refalign.tracking.client import Tag
from refalign.tracking.run import flatten

_MAX_TAG_CHARACTERS = 5000
_EMBEDDED = "tiny weights of this repository, trained on drawn creatures (same licence as the repository)"
_LICENSES = {
    "base": {"wan2": "Apache-2.0 (Wan2.1)"},
    "vision_encoder": {"dinov3": "DINOv3 License: gated on the hub, accept Meta's terms before use"},
    "detector": {
        "yolo": "AGPL-3.0 (Ultralytics YOLO): a service built on it must publish its source, or hold an enterprise licence"
    },
}
"""By role and a part of the model's name."""


def _escape(value: object) -> Markup:
    """One line that can become neither HTML nor a link, and does not end its cell of a table."""
    if isinstance(value, Markup):
        return value
    text = " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;")
    return Markup(text.replace("](", "]&#40;").replace("|", "\\|"))


# Every value in the template is escaped by `_escape`.
_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    finalize=_escape,
    trim_blocks=True,
    keep_trailing_newline=True,
)


class Provenance(NamedTuple):
    """What a model version was made from.

    Attributes:
        licenses, consents: clips that it was trained on, by licence and consent.
        code: git revision.
        folders: of the stages, below the run's output.
        command: what a person types to make it again.
    """

    licenses: Mapping[str, int]
    consents: Mapping[str, int]
    shard_digest: str
    fingerprint: str
    code: str
    folders: Mapping[str, str]
    command: str

    def tags(self) -> dict[str, str]:
        """Tags of the registered version."""
        tags = {
            "refalign.licenses": ", ".join(sorted(self.licenses)) or "unknown",
            "refalign.consents": ", ".join(sorted(self.consents)) or "unknown",
            Tag.SHARDS: self.shard_digest,
            "refalign.fingerprint": self.fingerprint,
            "refalign.code": self.code,
            **{f"refalign.folder.{stage}": folder for stage, folder in self.folders.items()},
        }
        return {name: text[:_MAX_TAG_CHARACTERS] for name, text in tags.items()}


def make_model_card(config: RunConfig, provenance: Provenance, scores: Mapping[str, object], *, note: str | None) -> str:
    """The card in Markdown.

    Args:
        scores: of the evaluation, by name; nested groups are shown as dotted names.
        note: what a reader must know of the base weights first, see `load_note`.
    """
    restricted = [name for name in provenance.licenses if "non-commercial" in name.lower() or "-nc" in name.lower()]
    return _TEMPLATES.get_template("model_card.md").render(
        name=config.tracking.model_name,
        note=note,
        provenance=provenance,
        restricted=", ".join(sorted(restricted)),
        models=_list_models(config),
        scores=flatten(scores),
        command=Markup(textwrap.indent(hide_secrets(provenance.command), "    ")),  # a code block, whatever it holds
        folders=", ".join(provenance.folders.values()),
        settings=flatten(config),
    )


def load_note(base: str) -> str | None:
    """The line that a local base folder says about its own weights in ``NOTE.txt``, for example that they are untrained."""
    file = Path(base).expanduser() / "NOTE.txt"
    return " ".join(file.read_text().split()) if file.is_file() else None


def _list_models(config: RunConfig) -> dict[str, str]:
    """Role and name of each model that took part -> licence; names are without the folders of this machine."""
    rows = {}
    for role, known in _LICENSES.items():
        source = str(getattr(config.models, role))
        name = source.rstrip("/").rpartition("/")[2] if source.startswith((".", "/", "~")) else source
        if "/toy/weights/" in source:
            text = _EMBEDDED + ("; code: AGPL-3.0 (Ultralytics YOLO)" if role == "detector" else "")
        else:
            text = next((text for word, text in known.items() if word in source.lower()), "see its own model card")
        rows[f"{role}: `{name}`"] = text
    return rows
