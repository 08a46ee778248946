"""Plots as inline SVG that follow the page's colours, in light and dark.

Call `line_plot([Series("loss", steps, losses)], x="step", y="loss")`, `interval_plot(...)` or
`histogram(...)` and put the result into `figure(svg, "caption")`. Writes nothing.
"""

import hashlib
import io
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from phiforge.core.page.markup import Html, element, escape, join

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_POINTS = 400
# Colours stand for roles: the SVG gets the page's variables in their place.
_INK, _QUIET, _RULE = "#010101", "#020202", "#030303"
_SERIES = tuple(f"#0a0b{i:02x}" for i in range(6))
_ROLES = {_INK: "var(--ink)", _QUIET: "var(--quiet)", _RULE: "var(--rule)"} | {
    colour: f"var(--series-{i})" for i, colour in enumerate(_SERIES)
}
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
_MARKERS = "osD^vP"
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "phiforge",
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "text.color": _INK,
    "axes.edgecolor": _QUIET,
    "axes.labelcolor": _QUIET,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _RULE,
    "grid.linewidth": 0.7,
    "xtick.color": _QUIET,
    "ytick.color": _QUIET,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "lines.linewidth": 1.6,
}


@dataclass(frozen=True)
class Series:
    """One line: a name, x and y, and optional low and high limits of y. None in y is a gap."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None


def line_plot(
    series: Sequence[Series],
    *,
    x: str,
    y: str,
    title: str = "",
    log_y: bool = False,
    size: tuple[float, float] = (4.6, 2.9),
) -> Html:
    """Lines over a numeric axis; long series are thinned to MAX_POINTS bins (means)."""

    def draw(axes: "Axes") -> None:
        for index, one in enumerate(series):
            xs, ys = _thin(one.x, one.y)
            marker = _MARKERS[index % 6] if len(xs) <= 12 else None
            axes.plot(
                xs, ys, color=_SERIES[index % 6], linestyle=_DASHES[index // 6 % 4],
                marker=marker, markersize=4, label=_literal(one.name),
            )  # fmt: skip
        if log_y:
            axes.set_yscale("log")

    return _svg(draw, x, y, title, size, legend=len(series) > 1)


def interval_plot(
    series: Sequence[Series],
    *,
    x: str,
    y: str,
    ticks: Sequence[str],
    title: str = "",
    y_range: tuple[float, float] | None = None,
    percent: bool = False,
    size: tuple[float, float] = (4.6, 2.9),
) -> Html:
    """Points with error bars over named positions 0, 1, ...; `percent` shows shares as 0–100."""
    scale = 100.0 if percent else 1.0

    def draw(axes: "Axes") -> None:
        for index, one in enumerate(series):
            _draw_points(axes, one, index, len(series), scale)
        axes.set_xticks(range(len(ticks)), ticks)
        axes.set_xlim(-0.4, len(ticks) - 0.6)
        axes.grid(axis="x", visible=False)
        if y_range:
            axes.set_ylim(y_range[0] * scale, y_range[1] * scale)

    return _svg(draw, x, y, title, size, legend=len(series) > 1)


def histogram(
    groups: Mapping[str, Sequence[float]],
    edges: Sequence[float],
    *,
    x: str,
    y: str,
    title: str = "",
    size: tuple[float, float] = (4.6, 2.6),
) -> Html:
    """How many values lie between neighbouring `edges`, the groups on top of each other.

    Bins hold their lower edge; the last one holds both. Values beyond the edges are not drawn.
    """

    def draw(axes: "Axes") -> None:
        below = np.zeros(len(edges) - 1)
        for index, (name, values) in enumerate(groups.items()):
            counts, _ = np.histogram(list(values), bins=list(edges))
            axes.bar(
                edges[:-1], counts, np.diff(edges) * 0.92, below, align="edge",
                color=_SERIES[index % 6],
                edgecolor=_INK, linewidth=0, label=_literal(name),
            )  # fmt: skip
            below += counts
        axes.set_xlim(edges[0], edges[-1])
        axes.set_xticks(edges[:: max(1, (len(edges) - 1) // 4)])
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}".replace("-", "−"))
        axes.set_ylim(0, max(1.0, float(below.max()) * 1.05))
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.grid(axis="x", visible=False)

    return _svg(draw, x, y, title, size, legend=len(groups) > 1)


def figure(svg: Html, caption: str | Html = "") -> Html:
    """A plot with its caption."""
    return element("figure", svg, element("figcaption", caption) if caption else None)


def figures(items: Sequence[Html]) -> Html:
    """Figures side by side where the screen is wide enough."""
    return element("div", join(items), class_="figures")


def _draw_points(axes: "Axes", one: Series, index: int, count: int, scale: float) -> None:
    kept = [i for i, value in enumerate(one.y) if value is not None]
    shift = (index - (count - 1) / 2) * 0.06  # so that error bars do not hide each other
    xs = [one.x[i] + shift for i in kept]
    ys = np.array([one.y[i] for i in kept], dtype=float) * scale
    error = None
    if one.low is not None and one.high is not None and kept:
        low = np.array([one.low[i] for i in kept], dtype=float) * scale
        high = np.array([one.high[i] for i in kept], dtype=float) * scale
        error = np.maximum([ys - low, high - ys], 0)
    axes.errorbar(
        xs, ys, yerr=error, color=_SERIES[index % 6], marker=_MARKERS[index % 6], markersize=5,
        linewidth=1.3, elinewidth=1.3, capsize=0, label=_literal(one.name), clip_on=False,
    )  # fmt: skip


def _svg(draw: Any, x: str, y: str, title: str, size: tuple[float, float], *, legend: bool) -> Html:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        drawing = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(drawing)
        axes = drawing.add_subplot()
        draw(axes)
        axes.set_xlabel(_literal(x))
        axes.set_ylabel(_literal(y))
        if title:
            axes.set_title(_literal(title), loc="left", fontsize=10.5)
        if legend:
            # Below the axes, where it hides no point.
            drawing.legend(loc="outside lower left", ncols=3, labelcolor=_INK)
        return _inline(drawing, title or f"{y} over {x}")


def _inline(drawing: "Figure", label: str) -> Html:
    """The SVG element alone: page colours, own ids, nothing that names another address."""
    buffer = io.StringIO()
    drawing.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r" font-family: [^;\"]*;?", "", text)
    text = re.sub(r"\s*\n\s*", "\n", text)
    for colour, role in _ROLES.items():
        text = text.replace(colour, role)
    prefix = "g" + hashlib.sha256(text.encode()).hexdigest()[:8]
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'href="#', f'href="#{prefix}-', text)
    text = text.replace("url(#", f"url(#{prefix}-")
    text = re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", text, count=1)
    text = re.sub(r'<svg ([^>]*?)height="[^"]*"', r"<svg \1", text, count=1)
    return Html(text.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1))


def _literal(text: str) -> str:
    """Keep matplotlib from reading dollars as formulas."""
    return text.replace("$", r"\$")


def _thin(x: Sequence[float], y: Sequence[float | None]) -> tuple[np.ndarray, np.ndarray]:
    xs = np.asarray(x, dtype=float)
    ys = np.array([np.nan if value is None else value for value in y], dtype=float)
    if len(xs) <= MAX_POINTS:
        return xs, ys
    edges = np.linspace(0, len(xs), MAX_POINTS + 1).astype(int)
    spans = list(itertools.pairwise(edges))
    return (
        np.array([xs[a:b].mean() for a, b in spans]),
        np.array([ys[a:b].mean() for a, b in spans]),
    )
