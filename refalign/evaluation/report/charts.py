"""Charts as SVG, without scripts and external files. Equal numbers give equal bytes."""

from __future__ import annotations

import colorsys
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import nonsingular
from scipy.ndimage import uniform_filter1d

ACCENT, SECOND, SOFT = "#2457a6", "#b4551e", "#646b78"  # as in style.css
Points = Iterable[Sequence[float]]
_MAX_POINTS = 300
_SIZE_IN = (4.4, 2.5)
_LOOK: Any = {  # its keys are a type of matplotlib's own
    # Text stays text, which is smaller than outlines; ids do not change from run to run.
    "svg.fonttype": "none", "svg.hashsalt": "refalign", "font.sans-serif": ["DejaVu Sans"], "font.size": 10, "text.color": SOFT,
    "axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True, "axes.xmargin": 0.02, "grid.color": "#e3e6ea",
    "xtick.bottom": False, "ytick.left": False, "xtick.labelcolor": SOFT, "ytick.labelcolor": SOFT, "lines.linewidth": 1.8,
    **{f"axes.spines.{side}": False for side in ("left", "right", "top", "bottom")},
}  # fmt: skip
_CURVES: dict[str, dict[str, Any]] = {
    "line": {"color": ACCENT},
    "raw": {"color": ACCENT, "linewidth": 1, "alpha": 0.3},
    "held-out": {"color": SECOND, "marker": "o", "markersize": 4},
    **{f"q{quarter}": {"color": colour} for quarter, colour in enumerate(("#a9c4ea", "#6f9bd8", "#2457a6", "#0f2a55"), 1)},
}


@dataclass(frozen=True)
class Chart:
    """A drawing, and what it shows in a line of text."""

    label: str
    svg: Markup


@rc_context(_LOOK)
def draw_lines(label: str, curves: Mapping[str, Points], marks: Sequence[tuple[float, str]] = ()) -> Chart | None:
    """Curves over common axes; None where no point is finite.

    Args:
        curves: points (x, y) by kind, a key of `_CURVES`; x is a whole number.
        marks: (x, text) of vertical lines.
    """
    figure, axes = _open()
    for kind, points in curves.items():
        if len(places := _thin(_find_finite(points))):
            axes.plot(*places.T, **_CURVES[kind])
    if not axes.lines:
        return None
    for x, text in marks:
        axes.axvline(x, color=SOFT, linestyle="--", linewidth=1)
        above = axes.get_xaxis_transform()
        axes.annotate(text, (x, 1), (4, 0), above, "offset points", verticalalignment="top", parse_math=False, in_layout=False)
    axes.locator_params("x", integer=True, nbins=5)
    axes.set_yticks(axes.yaxis.get_major_locator().tick_values(*_widen(axes.dataLim.intervaly)))  # they cover all that is drawn
    return _close(figure, label)


@rc_context(_LOOK)
def draw_histogram(label: str, values: Iterable[float], bins: int = 24) -> Chart | None:
    """How often values occur; None where none is finite. The outermost 1% at either end counts in the last bar."""
    numbers = np.array(list(values), float)
    numbers = numbers[np.isfinite(numbers)]
    if not len(numbers):
        return None
    figure, axes = _open()
    ends = _widen(np.percentile(numbers, (1, 99)))
    axes.hist(np.clip(numbers, *ends), bins=bins, range=ends, color=ACCENT, rwidth=0.9)
    axes.locator_params("y", integer=True)
    return _close(figure, label)


@rc_context(_LOOK)
def draw_groups(label: str, points: Sequence[Sequence[float]], groups: Sequence[int]) -> Chart | None:
    """Places in the plane, each shown as the number of its group. A group has one colour and its places are joined."""
    if not points:
        return None
    figure, axes = _open()
    axes.axis("off")
    axes.margins(0.06)
    for number, group in enumerate(dict.fromkeys(groups)):
        colour = colorsys.hls_to_rgb(number * 137 % 360 / 360, 0.42, 0.65)  # neighbours in number are far apart in hue
        mine = np.array([point for point, other in zip(points, groups, strict=True) if other == group])
        axes.plot(*mine.T, color=colour, linewidth=0.6, alpha=0.5)
        for x, y in mine:
            axes.text(x, y, str(group), color=colour, fontweight="bold", ha="center", va="center", clip_on=True)
    return _close(figure, label)


def smooth(points: Points) -> np.ndarray:
    """Centred running mean [N, 2] over a twentieth of the finite points."""
    finite = _find_finite(points)
    size = 2 * max(1, len(finite) // 40) + 1
    return np.column_stack([finite[:, 0], uniform_filter1d(finite[:, 1], size, mode="nearest")])


def _open() -> tuple[Figure, Axes]:
    figure = Figure(_SIZE_IN, layout="constrained")
    axes = figure.subplots()
    axes.locator_params(nbins=4, min_n_ticks=3)
    axes.xaxis.set_major_formatter("{x:,.6g}")
    axes.yaxis.set_major_formatter("{x:,.6g}")
    return figure, axes


def _close(figure: Figure, label: str) -> Chart:
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    drawing = file.getvalue()
    # Nothing lies outside of the axes, and several drawings in one page would repeat the ids.
    drawing = re.sub(r'(?<=<g) id="[^"]*"| clip-path="[^"]*"| transform="rotate\(-0 [^"]*"', "", drawing)
    opening = Markup('<svg role="img" aria-label="{}" ').format(label)
    return Chart(label, opening + Markup(drawing.partition("<svg ")[2]))


def _widen(ends: Iterable[float]) -> tuple[float, float]:
    """Lowest and highest value; equal ones are moved apart."""
    low, high = ends
    return nonsingular(low, high, expander=0.1, tiny=1e-9)


def _find_finite(points: Points) -> np.ndarray:
    places = np.array([*points], float).reshape(-1, 2)
    return places[np.isfinite(places).all(axis=1)]


def _thin(places: np.ndarray) -> np.ndarray:
    """At most `_MAX_POINTS` points, each the mean of its neighbours, so that a peak is flattened but not dropped."""
    parts = np.array_split(places, min(len(places), _MAX_POINTS) or 1)
    return np.array([part.mean(axis=0) for part in parts if len(part)])
