"""Small pieces of HTML. Everything that comes from data passes through `text`; nothing else may reach the page unescaped."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any


def text(value: Any) -> str:
    """Any value as text that cannot become markup."""
    return escape(str(value), quote=True)


def count(value: Any) -> str:
    """A whole number with thousands separated."""
    return f"{value:,}" if isinstance(value, int) else text(value)


def number(value: Any) -> str:
    """A measured number with three digits after the point; a dash where nothing was measured."""
    return f"{value:.3f}" if isinstance(value, int | float) else "–"


def data_uri(data: bytes, kind: str) -> str:
    """The bytes themselves in place of an address."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def image(data: bytes, kind: str, description: str) -> str:
    """A picture that is part of the page."""
    return f'<img src="{data_uri(data, kind)}" alt="{text(description)}">'


def video(data: bytes, description: str) -> str:
    """A silent loop that is part of the page."""
    source = f'src="{data_uri(data, "video/mp4")}" aria-label="{text(description)}"'
    return f"<video {source} autoplay loop muted playsinline controls></video>"


def figure(content: str, caption: str) -> str:
    """Content with a line of plain text below it."""
    return f"<figure>{content}<figcaption>{text(caption)}</figcaption></figure>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers_from: int = 1) -> str:
    """A table of cells that are HTML already; columns from ``numbers_from`` on are set right."""

    def make_row(tag: str, cells: Iterable[str]) -> str:
        kinds = (' class="number"' if column >= numbers_from else "" for column in range(len(head)))
        return f"<tr>{''.join(f'<{tag}{kind}>{cell}</{tag}>' for kind, cell in zip(kinds, cells, strict=True))}</tr>"

    header = make_row("th", map(text, head))
    body = "".join(make_row("td", row) for row in rows)
    return f'<div class="scroll"><table><thead>{header}</thead><tbody>{body}</tbody></table></div>'


def settings_table(settings: Mapping[str, Any]) -> str:
    """Names and values as they are typed."""
    rows = [(f"<code>{text(name)}</code>", f"<code>{text(value)}</code>") for name, value in settings.items()]
    return table(("setting", "value"), rows, numbers_from=2)


def folded(title: str, content: str) -> str:
    """Content that is shown on a click."""
    return f"<details><summary>{text(title)}</summary>{content}</details>"


def section(title: str, *content: str) -> str:
    """A titled section, or nothing where there is no content."""
    return f"<section><h2>{text(title)}</h2>{''.join(content)}</section>" if any(content) else ""


def page(title: str, body: Iterable[str], script: str = "") -> str:
    """A whole document. Its policy lets nothing load and nothing run but what is written here."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    runs = f"'sha256-{digest}'" if script else "'none'"
    policy = f"default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; script-src {runs}"
    style = Path(__file__).with_name("style.css").read_text()
    tail = f"<script>{script}</script>" if script else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{text(title)}</title><style>{style}</style></head>"
        f"<body><main>{''.join(body)}</main>{tail}</body></html>\n"
    )
