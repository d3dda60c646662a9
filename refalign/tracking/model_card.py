"""Where a model comes from and what may be done with it: tags of its version, and a card for people."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refalign.config import RunConfig
from refalign.io.untrusted import hide_secrets
from refalign.tracking.run import flatten

_MAX_TAG_CHARACTERS = 5000
_EMBEDDED = "tiny weights of this repository, trained on drawn creatures (same licence as the repository)"
_LICENSES = {
    "base": (("wan2", "Apache-2.0 (Wan2.1)"),),
    "vision_encoder": (("dinov3", "DINOv3 License: gated on the hub, accept Meta's terms before use"),),
    "detector": (
        ("yolo", "AGPL-3.0 (Ultralytics YOLO): a service built on it must publish its source, or hold an enterprise licence"),
    ),
}


@dataclass(frozen=True)
class Provenance:
    """What a model version was made from.

    Attributes:
        licenses: licences found in the rows it was trained on, with their number of clips.
        consents: consent notes found there, with their number of clips.
        shard_digest: of the training shards.
        fingerprint: of the story's config.
        code: git revision.
        folders: step name to folder name, below the run's output.
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
        """For the registered version; `refalign.tracking.registry.register_model` sets them."""
        tags = {
            "refalign.licenses": ", ".join(sorted(self.licenses)) or "unknown",
            "refalign.consents": ", ".join(sorted(self.consents)) or "unknown",
            "refalign.shard_digest": self.shard_digest,
            "refalign.fingerprint": self.fingerprint,
            "refalign.code": self.code,
            **{f"refalign.folder.{step}": folder for step, folder in self.folders.items()},
        }
        return {name: text[:_MAX_TAG_CHARACTERS] for name, text in tags.items()}


def make_model_card(config: RunConfig, provenance: Provenance, scores: Mapping[str, Any], *, note: str | None) -> str:
    """The card in Markdown.

    Args:
        scores: what the evaluation measured, by name; nested groups are shown as dotted names.
        note: what must be known of the base weights first, see `load_note`.
    """
    parts = [
        f"# {_plain(config.tracking.model_name)}: reference-to-video model",
        "A text-to-video diffusion Transformer (Wan2.1 layout) fine-tuned with RefAlign (arXiv 2603.25743) to show the subjects "
        "of reference pictures. Projectors and the vision encoder are not part of it.",
    ]
    if note:
        parts.append(f"**{_plain(note)}**")
    parts += [
        "## Intended use",
        "Research on subject-consistent video generation. Show people only with their consent, and mark videos as generated. "
        "Not for impersonation, and not for decisions about people.",
        "## Data",
        _table(("licence of the clips", "clips"), provenance.licenses),
        _table(("consent", "clips"), provenance.consents),
        _data_warning(provenance.licenses),
        "## Models used",
        _table(("model", "licence"), {f"{role}: `{source}`": text for role, source, text in _models(config)}),
        "## Scores",
        _table(("score", "value"), flatten(scores)) if scores else "Not evaluated.",
        "## How to generate",
        f"    python pipelines/generate.py --model models:/{_plain(config.tracking.model_name)}@challenger \\\n"
        '        --reference a.png --prompt "..." --output out.mp4',
        "## How to reproduce",
        "\n".join(f"    {line}" for line in hide_secrets(provenance.command).splitlines()),  # of a code block, whatever it holds
        f"Code {_plain(provenance.code)}, config {provenance.fingerprint}, shards {provenance.shard_digest}. "
        f"Step folders: {', '.join(provenance.folders.values())}.",
        "<details><summary>Settings</summary>",
        _table(("setting", "value"), flatten(config)),
        "</details>",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def load_note(base: str) -> str | None:
    """The line that a local base folder says about its own weights in ``NOTE.txt``, for example that they are untrained."""
    file = Path(base).expanduser() / "NOTE.txt"
    return " ".join(file.read_text().split()) if file.is_file() else None


def _models(config: RunConfig) -> list[tuple[str, str, str]]:
    """(role, name without the folders of this machine, licence) of each model that took part."""
    rows = []
    for role, known in _LICENSES.items():
        source = str(getattr(config.models, role))
        local = source.startswith((".", "/", "~"))
        name = source.rstrip("/").rpartition("/")[2] if local else source
        embedded = "/toy/weights/" in source
        text = _EMBEDDED if embedded else next((text for word, text in known if word in source.lower()), "see its own model card")
        if embedded and role == "detector":
            text += "; code: AGPL-3.0 (Ultralytics YOLO)"
        rows.append((role, name, text))
    return rows


def _data_warning(licenses: Mapping[str, int]) -> str:
    named = [name for name in licenses if "non-commercial" in name.lower() or "-nc" in name.lower()]
    if named:
        return f"**Part of the data is for non-commercial use only ({_plain(', '.join(sorted(named)))}); so is this model.**"
    if not licenses or "unknown" in licenses:
        return "**The licence of some clips is unknown; clear it before the model leaves your hands.**"
    return ""


def _table(head: tuple[str, str], rows: Mapping[str, Any]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|"]
    lines += [f"| {_cell(name)} | {_cell(value)} |" for name, value in rows.items()] or ["| unknown | |"]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    """Text from data sources must not end the cell, the line, or become markup."""
    return _plain(value).replace("|", "\\|")


def _plain(value: Any) -> str:
    """One line that can become neither HTML nor a link."""
    return " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;").replace("](", "]&#40;")
