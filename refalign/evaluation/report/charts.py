"""Line charts as inline SVG: no script, no font, no file to load."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 320, 184
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 12, 26
_MAX_POINTS = 300
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """One curve: points are (x, y); ``kind`` is a CSS class of the report's style sheet."""

    points: Points
    kind: str = "line"
    dots: bool = False


def make_chart(lines: Sequence[Line], *, marks: Sequence[tuple[float, str]] = (), label: str) -> str:
    """An SVG of ``lines`` over common axes.

    Args:
        marks: (x, text) of vertical rules, for example where a stage begins.
        label: what a screen reader says.
    """
    lines = [Line(_thin([point for point in line.points if _is_finite(point)]), line.kind, line.dots) for line in lines]
    everything = [point for line in lines for point in line.points]
    if not everything:
        return ""
    x_low, x_high = _span([x for x, _ in everything])
    y_low, y_high = _span([y for _, y in everything])
    ticks = nice_ticks(y_low, y_high)
    y_low, y_high = min(y_low, ticks[0]), max(y_high, ticks[-1])

    def place(x: float, y: float) -> tuple[float, float]:
        across = _LEFT + (x - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT)
        return round(across, 1), round(_HEIGHT - _BOTTOM - (y - y_low) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM), 1)

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">']
    for tick in ticks:
        _, y = place(x_low, tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick" text-anchor="end" x="{_LEFT - 6}" y="{y + 3.5}">{format_number(tick)}</text>')
    for tick in nice_ticks(x_low, x_high, whole=True):
        if x_low <= tick <= x_high:
            x = place(tick, y_low)[0]
            parts.append(f'<text class="tick" text-anchor="middle" x="{x}" y="{_HEIGHT - 10}">{format_number(tick)}</text>')
    for x, text in marks:
        across = place(x, y_low)[0]
        parts.append(f'<line class="mark" x1="{across}" x2="{across}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>')
        parts.append(f'<text class="tick" x="{across + 4}" y="{_TOP + 8}">{escape(text)}</text>')
    parts += [_draw(line, place) for line in lines]
    return "".join([*parts, "</svg>"])


def make_histogram(values: Sequence[float], *, bins: int = 24, label: str) -> str:
    """An SVG of how often values occur; the outermost hundredth at either end counts in the last bar."""
    finite = sorted(value for value in values if math.isfinite(value))
    if not finite:
        return ""
    low, high = _span([finite[len(finite) // 100], finite[-1 - len(finite) // 100]])
    counts = [0] * bins
    for value in finite:
        counts[min(bins - 1, max(0, int((value - low) / (high - low) * bins)))] += 1
    bar = (_WIDTH - _LEFT - _RIGHT) / bins
    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">']
    for number, count in enumerate(counts):
        height = round(count / max(counts) * (_HEIGHT - _TOP - _BOTTOM), 1)
        x, y = round(_LEFT + number * bar, 1), round(_HEIGHT - _BOTTOM - height, 1)
        parts.append(f'<rect class="bar" x="{x}" y="{y}" width="{round(bar - 1, 1)}" height="{height}"/>')
    parts.append(f'<text class="tick" text-anchor="end" x="{_LEFT - 6}" y="{_TOP + 8}">{max(counts):,}</text>')
    for tick in nice_ticks(low, high):
        if low <= tick <= high:
            x = round(_LEFT + (tick - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT), 1)
            parts.append(f'<text class="tick" text-anchor="middle" x="{x}" y="{_HEIGHT - 10}">{format_number(tick)}</text>')
    return "".join([*parts, "</svg>"])


def make_scatter(points: Sequence[Sequence[float]], groups: Sequence[int], *, label: str) -> str:
    """An SVG of places in the plane, those of one group joined and in one colour; a group is also a number to read."""
    if not points:
        return ""
    (x_low, x_high), (y_low, y_high) = (_span([point[axis] for point in points]) for axis in (0, 1))
    places = [
        (
            round(_RIGHT + (x - x_low) / (x_high - x_low) * (_WIDTH - 2 * _RIGHT), 1),
            round(_TOP + (y_high - y) / (y_high - y_low) * (_HEIGHT - 2 * _TOP), 1),
        )
        for x, y in points
    ]
    members: dict[int, list[tuple[float, float]]] = {}
    for place, group in zip(places, groups, strict=True):
        members.setdefault(group, []).append(place)
    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">']
    for number, (group, mine) in enumerate(members.items()):
        colour = f"hsl({number * 137 % 360} 65% 42%)"  # the golden angle: neighbours in number are far apart in hue
        path = " ".join(f"{x},{y}" for x, y in mine)
        parts.append(f'<polyline points="{path}" style="stroke:{colour};stroke-width:.6;opacity:.5"/>')
        dots = "".join(f'<circle cx="{x}" cy="{y}" r="3"/>' for x, y in mine)
        parts.append(f'<g style="fill:{colour}"><title>subject {group}</title>{dots}</g>')
    return "".join([*parts, "</svg>"])


def smooth(points: Points) -> list[tuple[float, float]]:
    """Centred running mean over a twentieth of the points; what it hides stays visible as the raw line behind it."""
    half = max(1, len(points) // 40)
    values = [y for _, y in points]
    means = []
    for position, (x, _) in enumerate(points):
        window = values[max(0, position - half) : position + half + 1]
        means.append((x, sum(window) / len(window)))
    return means


def nice_ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Three to six round numbers over [low, high]."""
    step = 10 ** math.floor(math.log10((high - low) / 3))
    step = next(step * factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 4)
    if whole:
        step = max(1.0, step)
    first = math.floor(low / step) * step
    count = math.ceil((high - first) / step - 1e-9) + 1
    return [round(first + number * step, 10) for number in range(count)]


def format_number(value: float) -> str:
    """Short text of a number: whole where it is whole, else two or three digits."""
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value):,}"
    return f"{value:.3g}" if abs(value) >= 1e-3 else f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-")


def _draw(line: Line, place) -> str:
    if not line.points:
        return ""
    places = [place(x, y) for x, y in line.points]
    path = " ".join(f"{x},{y}" for x, y in places)
    dots = "".join(f'<circle class="dot" cx="{x}" cy="{y}" r="3"/>' for x, y in places) if line.dots else ""
    return f'<polyline class="{line.kind}" points="{path}"/>{dots}'


def _thin(points: Points) -> Points:
    """At most `_MAX_POINTS` points, each the mean of those it stands for: a peak is flattened, never dropped."""
    size = math.ceil(len(points) / _MAX_POINTS)
    if size <= 1:
        return points
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def _span(values: Sequence[float]) -> tuple[float, float]:
    """Lowest and highest value, apart even where all are equal."""
    low, high = min(values), max(values)
    if high - low > 1e-12 * max(abs(low), abs(high), 1e-12):
        return low, high
    margin = abs(low) * 0.1 or 1.0
    return low - margin, high + margin


def _is_finite(point: tuple[float, float]) -> bool:
    return math.isfinite(point[0]) and math.isfinite(point[1])
