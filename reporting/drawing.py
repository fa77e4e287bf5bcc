"""Curves and the scatter, drawn by matplotlib, for the page and for ``--figure1``."""

import base64
import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from files import as_os_error, remove_leftovers, whole_file
from metrics.published import Published
from reporting.correlation import MAIN_METRIC, View, labelled_points, published_points
from reporting.curves import Chart, Series
from reporting.ema_lengths import LengthChart
from reporting.tables import printable

MOST_POINTS = 240  # of a drawn line
MOST_DOTS = 12  # of a line whose points are marked
MOST_LABELS, LONGEST_LABEL = 16, 32
ROUND = (1, 2, 2.5, 5, 10)  # steps of the numbers at an axis
LARGEST = 1e100  # values beyond count as not finite
# .c0 … of page.css
COLOURS = ("#2b83da", "#e0752d", "#2f9e63", "#bb5fb1", "#8570d8", "#1f9aa7", "#bb9414", "#7f8b9b")
GREY = "#8390a1"  # readable on white and on black
STYLE = {  # on top of matplotlib's defaults, whatever the user's matplotlibrc says
    "text.parse_math": False,  # names with dollar signs are names
    "svg.fonttype": "none",  # text stays text, in the browser's fonts
    "svg.hashsalt": "report",  # the same ids for the same figure
    "font.size": 8,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.xmargin": 0.02,
    "grid.alpha": 0.3,
    "ytick.major.size": 0,
    **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
    **dict.fromkeys(("axes.facecolor", "figure.facecolor"), "none"),
}
INK = ("axes.edgecolor", "axes.labelcolor", "grid.color", "text.color", "xtick.color", "ytick.color")
NO_DATES = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}, ".png": {}}


@dataclass(frozen=True)
class Drawing:
    """A figure for the page.

    Attributes:
        uri: ``data:…``, an SVG.
        marks: where the pointer shows a value: percent from the left, percent from the top, words.
    """

    uri: str
    marks: list[tuple[float, float, str]]


def chart_figure(chart: Chart, log: bool) -> tuple[Figure, list[tuple[float, float, str]]] | None:
    """The curves of a chart, long ones averaged with a band from minimum to maximum; None without a finite value.

    Returns:
        The figure, and ``(step, value, words)`` of each point.
    """
    lines = [(number, series.name, *downsample(series)) for number, series in enumerate(chart.series)]
    lines = [line for line in lines if len(line[2])]
    if not lines:
        return None
    points = []
    with style():
        figure = Figure(figsize=(3.6, 2.1))
        axes = figure.add_axes((0.145, 0.12, 0.835, 0.84))
        for number, name, steps, means, minima, maxima in lines:
            colour = COLOURS[number % len(COLOURS)]
            marker = "o" if len(steps) <= MOST_DOTS else None
            axes.plot(steps, means, color=colour, linewidth=1.3, marker=marker, markersize=4)
            if (minima != maxima).any():
                axes.fill_between(steps, minima, maxima, color=colour, alpha=0.16, linewidth=0)
            points += [
                (step, mean, f"{name}: {mean:.6g} at step {step:,.0f}") for step, mean in zip(steps, means, strict=True)
            ]
        if log:
            low, high = min(line[4].min() for line in lines), max(line[5].max() for line in lines)
            axes.set_yscale("log")
            _log_ticks(axes.yaxis, low, high)
        else:
            axes.yaxis.set_major_locator(MaxNLocator(5, steps=ROUND))
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=ROUND, integer=True))
        _settle_ticks(axes)
    return figure, points


def length_figure(chart: LengthChart) -> tuple[Figure, list[tuple[float, float, str]]]:
    """A distance against the half-life of averages, in steps on a log scale; returns what ``chart_figure`` does."""
    points = []
    with style():
        figure = Figure(figsize=(3.6, 2.1))
        axes = figure.add_axes((0.145, 0.2, 0.835, 0.76))
        for number, line in enumerate(chart.series):
            colour = COLOURS[number % len(COLOURS)]
            axes.plot(line.half_lives, line.values, color=colour, linewidth=1.3, marker="o", markersize=4)
            points += [
                (length, value, f"{weights}: {value:.6g} (half-life {length:,.0f} steps)")
                for weights, length, value in zip(line.weights, line.half_lives, line.values, strict=True)
            ]
        axes.set_xscale("log")
        lengths = [length for line in chart.series for length in line.half_lives]
        _log_ticks(axes.xaxis, min(lengths), max(lengths))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=ROUND))
        axes.set_xlabel("half-life of the average, steps", labelpad=1)
        _settle_ticks(axes, bottom=0.2)
    return figure, points


def _log_ticks(axis: Axis, low: float, high: float) -> None:
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axis.set_minor_locator(LogLocator(subs=()))


def _settle_ticks(axes: Axes, bottom: float = 0.12) -> None:
    """Short numbers, and as much room as they take."""
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    longest = max(len(short(value)) for value in axes.get_yticks())
    left = max(0.145, 0.04 + 0.0175 * longest)  # 0.001025 takes more room than 0.5; all others stay aligned
    axes.set_position((left, bottom, 0.98 - left, 0.96 - bottom))


def scatter_figure(view: View, published: Published, ink: str = GREY) -> tuple[Figure, list[tuple[float, float, str]]]:
    """Probe against distance: measured points filled, published ones hollow; returns what ``chart_figure`` does."""
    measured = [point for point in labelled_points(view) if abs(point[2]) < LARGEST]
    groups = [("measured", COLOURS[0], measured), ("published", ink, published_points(view, published))]
    points = [(*point, colour) for _, colour, these in groups for point in these]
    with style(ink):
        figure = Figure(figsize=(5.6, 3.6), layout="constrained")
        axes = figure.add_subplot()
        for name, colour, these in groups:
            places = np.array([point[1:] for point in these]).reshape(-1, 2).T
            fill = colour if name == "measured" else "none"
            axes.scatter(*places, s=36, facecolors=fill, edgecolors=colour, label=name)
        axes.margins(x=0.1, y=0.12)
        axes.set(xlabel="attribute probe, F1", ylabel=label_of(view.metric))
        figure.draw_without_rendering()  # fixes where the axes lie, which the labels are placed by
        if sum(bool(label) for label, *_ in points) <= MOST_LABELS:
            _write_labels(axes, [point for point in points if point[0]])
    words = [(x, y, f"{label}: F1 {x:.4f}, {view.metric} {y:.4g}".removeprefix(": ")) for label, x, y, _ in points]
    return figure, words


def _write_labels(axes: Axes, points: Sequence[tuple[str, float, float, str]]) -> None:
    """Names next to their points, on the side with room, moved down where they would overlap."""
    right = axes.bbox.x0 + 0.6 * axes.bbox.width
    scale = 72 / axes.figure.dpi
    placed: list[tuple[float, float, float]] = []
    for label, x, y, colour in sorted(points, key=lambda point: -point[2]):
        label = label_of(label)
        across, up = axes.transData.transform((x, y))
        side = -1 if across > right else 1
        start, end = sorted((across * scale, across * scale + side * 5.0 * len(label)))
        height = up * scale
        while any(abs(height - other) < 9 and start < b and a < end for a, b, other in placed):
            height -= 9
        placed.append((start, end, height))
        axes.annotate(label, (x, y), (6 * side, height - up * scale), textcoords="offset points", va="center",
                      ha="right" if side < 0 else "left", color=colour, in_layout=False)  # fmt: skip


def drawing(figure: Figure, points: Sequence[tuple[float, float, str]]) -> Drawing:
    """A figure as it is put into the page."""
    buffer = io.BytesIO()
    with style():
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    places = figure.transFigure.inverted().transform(
        figure.axes[0].transData.transform([point[:2] for point in points] or np.empty((0, 2)))
    )
    marks = [(100 * x, 100 - 100 * y, words) for (x, y), (*_, words) in zip(places, points, strict=True)]
    return Drawing(f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}", marks)


def write_scatter(view: View, published: Published, path: Path) -> None:
    """The scatter as PNG, SVG or PDF, by the file's suffix, with its title and legend."""
    figure, _ = scatter_figure(view, published, ink="0.25")
    with style(ink="0.25"):
        r = view.correlations()[MAIN_METRIC]
        figure.suptitle(f"{label_of(view.sit)}: Pearson's r = {r:.4f} over {view.vaes} VAEs", fontsize=10)
        if published_points(view, published):
            figure.axes[0].legend()
        remove_leftovers(path.parent, path.name)
        with whole_file(path) as temporary, as_os_error(temporary):
            figure.savefig(
                temporary, format=path.suffix[1:], dpi=200, facecolor="white", metadata=NO_DATES[path.suffix]
            )


def downsample(series: Series, most: int = MOST_POINTS) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Means over equal stretches of a line, and the range that they hide.

    Returns:
        steps, means, minima and maxima, at most ``most`` each; the last point is the line's last value itself.
    """
    steps, values = np.array(series.steps, np.float64), np.array(series.values, np.float64)
    finite = np.abs(values) < LARGEST
    steps, values = steps[finite], values[finite]
    count = len(values)
    starts = np.arange(count)
    if count > most:
        size = -(-(count - 1) // (most - 1))
        starts = np.append(np.arange(0, count - 1, size), count - 1)
    sizes = np.diff(np.append(starts, count))
    means = [np.add.reduceat(each, starts) / sizes for each in (steps, values)] if count else [steps, values]
    if not count:
        return steps, values, values, values
    return *means, np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts)


def short(value: float) -> str:
    """``12000 → 12k``, ``1e-05 → 1e-5``; at most four digits."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.4g}M"
    if size >= 1e4:
        return f"{value / 1e3:.4g}k"
    mantissa, e, exponent = f"{value:.4g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if e else mantissa


def label_of(text: str) -> str:
    """One line of printable characters, not too long."""
    words = " ".join(printable(text).split())
    return words if len(words) <= LONGEST_LABEL else f"{words[: LONGEST_LABEL - 1]}…"


@contextmanager
def style(ink: str = GREY) -> Iterator[None]:
    """In it, figures look the same for every user; axes and words have the colour ``ink``."""
    with warnings.catch_warnings(), matplotlib.style.context(["default", STYLE | dict.fromkeys(INK, ink)]):
        warnings.filterwarnings("ignore", "Glyph")  # that matplotlib's font lacks; a browser has others
        yield
