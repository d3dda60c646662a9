"""Where a model comes from and what may be done with it: tags of its version, and its card."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

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
    parts = [
        f"# {_plain(config.tracking.model_name)}: reference-to-video model",
        "A text-to-video diffusion Transformer (Wan2.1 layout) fine-tuned with RefAlign (arXiv 2603.25743) to show the subjects "
        "of reference pictures. Projectors and the vision encoder are not part of it.",
        f"**{_plain(note)}**" if note else "",
        "## Intended use",
        "Research on subject-consistent video generation. Show people only with their consent, and mark videos as generated. "
        "Not for impersonation, and not for decisions about people.",
        "## Data",
        _table("licence of the clips", "clips", provenance.licenses),
        _table("consent", "clips", provenance.consents),
        _warn_of_data(provenance.licenses),
        "## Models used",
        _table("model", "licence", _list_models(config)),
        "## Scores",
        _table("score", "value", flatten(scores)) if scores else "Not evaluated.",
        "## How to generate",
        f"    python pipelines/generate.py --model models:/{_plain(config.tracking.model_name)}@challenger \\\n"
        '        --reference a.png --prompt "..." --output out.mp4',
        "## How to reproduce",
        textwrap.indent(hide_secrets(provenance.command), "    "),  # a code block, whatever it holds
        f"Code {_plain(provenance.code)}, config {provenance.fingerprint}, shards {provenance.shard_digest}. "
        f"Step folders: {', '.join(provenance.folders.values())}.",
        "<details><summary>Settings</summary>",
        _table("setting", "value", flatten(config)),
        "</details>",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


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


def _warn_of_data(licenses: Mapping[str, int]) -> str:
    named = [name for name in licenses if "non-commercial" in name.lower() or "-nc" in name.lower()]
    if named:
        return f"**Part of the data is for non-commercial use only ({_plain(', '.join(sorted(named)))}); so is this model.**"
    if not licenses or "unknown" in licenses:
        return "**The licence of some clips is unknown; clear it before the model leaves your hands.**"
    return ""


def _table(name: str, value: str, rows: Mapping[str, object]) -> str:
    """Text from data sources must not end its cell or become markup."""
    cells = [[_plain(cell).replace("|", "\\|") for cell in row] for row in rows.items()] or [["unknown", ""]]
    return "\n".join(f"| {first} | {second} |" for first, second in ((name, value), ("---", "---"), *cells))


def _plain(value: object) -> str:
    """One line that can become neither HTML nor a link."""
    return " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;").replace("](", "]&#40;")
