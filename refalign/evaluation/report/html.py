"""Small pieces of HTML. Everything that comes from data passes through `text`; nothing else may reach the page unescaped."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
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
    return f'<video src="{data_uri(data, "video/mp4")}" aria-label="{text(description)}" autoplay loop muted playsinline controls></video>'


def figure(content: str, caption: str) -> str:
    """Content with a line of plain text below it."""
    return f"<figure>{content}<figcaption>{text(caption)}</figcaption></figure>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers_from: int = 1) -> str:
    """A table of cells that are HTML already; columns from ``numbers_from`` on are set right."""
    header = "".join(f"<th>{text(cell)}</th>" for cell in head)
    body = ""
    for row in rows:
        cells = (f'<td class="number">{cell}</td>' if n >= numbers_from else f"<td>{cell}</td>" for n, cell in enumerate(row))
        body += f"<tr>{''.join(cells)}</tr>"
    return f'<div class="scroll"><table><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table></div>'


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
