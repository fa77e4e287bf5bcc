"""The picture of a sweep: the measure over the scale, a line for each interval."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from files import as_os_error, whole_file
from metrics.sweep import Row

AXES = {
    **{"scale": "guidance scale", "guide": "scale of the guide"},
    **{"high": "guided up to time (noise: 1)", "low": "guided from time (data: 0)"},
}


def save_sweep(path: Path, rows: Sequence[Row], best: Row, title: str, count: int) -> None:
    """Draw the rows of ``metrics.sweep.rank``, the best one ringed; bars are the standard error of what is behind it.

    Args:
        path: the PNG.
        rows: a point each; one without guidance becomes a horizontal line.
        best: one of them.
        title: of the measure.
        count: images at each point.
    """
    guided = [row for row in rows if row.point.is_guided]
    # the first that varies; the others tell the lines apart
    along = next((name for name in AXES if len({getattr(row.point, name) for row in guided}) > 1), "scale")
    others = [name for name in AXES if name != along]
    lines: dict[tuple[float | None, ...], list[Row]] = {}
    alone = [row for row in guided if row.point.scale == 1]  # by a guide without the null class: on no interval
    for row in guided:
        if along != "scale" or row not in alone:
            lines.setdefault(tuple(getattr(row.point, name) for name in others), []).append(row)
    if along == "scale":  # each line of a guide begins with it
        for row in alone:
            its = [line for line in lines.values() if line[0].point.guide == row.point.guide]
            for line in its or [lines.setdefault((row.point.guide,), [])]:
                line.append(row)
                line.sort(key=lambda each: each.point.scale)
    figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")  # without pyplot: no display, no global state
    axes = figure.add_subplot()
    palette = matplotlib.colormaps["tab10" if len(lines) <= 10 else "tab20"]
    for number, line in enumerate(lines.values()):
        x, y = [getattr(row.point, along) for row in line], [row.value for row in line]
        bars = None if best.error is None else [row.behind_error for row in line]
        label = _label(next((row for row in line if row not in alone), line[0]), along)
        axes.errorbar(x, y, bars, marker="o", markersize=4, capsize=3, color=palette(number % 20), label=label)
    for row in rows:
        if not row.point.is_guided:
            axes.axhline(row.value, color="grey", linestyle="--", linewidth=1, label="without guidance")
    if best.point.is_guided:
        place = getattr(best.point, along), best.value
        axes.plot(*place, "o", markersize=13, fillstyle="none", color="black", label="best")
    axes.set_xticks(sorted({getattr(row.point, along) for row in guided}))
    axes.set_xlabel(AXES[along])
    if best.error is not None:
        axes.set_title("bars: standard error of the difference from the best", fontsize=8)
    axes.set_ylabel(f"{title} of {count:,} images")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)
    with whole_file(path) as temporary, as_os_error(temporary):
        figure.savefig(temporary, format="png", metadata={"Software": None})


def _label(row: Row, along: str) -> str:
    """What the points of a line share."""
    point = row.point
    if point.scale == 1:
        return "without the null class" if along == "guide" else f"guide {point.guide:g}, without the null class"
    ends = {"low": f"up to {point.high:g}", "high": f"from {point.low:g}"}
    interval = ends.get(along, f"on [{point.low:g}, {point.high:g}]")
    words = [] if along == "guide" or point.guide is None else [f"guide {point.guide:g}"]
    words += [] if along == "scale" else [f"scale {point.scale:g}"]
    return ", ".join([*words, interval])
