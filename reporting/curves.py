"""``metrics.jsonl`` as charts: inline SVG, coloured by the page's style sheet."""

import html
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from errors import UserError

WIDTH, HEIGHT = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 26  # margins, for the axes' numbers
MOST_POINTS = 240  # of a drawn line: more than pixels help
LOG_HELPS = 8  # where the largest value is so many times the smallest, a chart may be switched to a log scale
LOG_IS_DEFAULT = 40
LEARNING_RATE = "learning rate"
HIDDEN = ("epoch", "step")
COLOURS = 8


@dataclass(frozen=True)
class Series:
    """One line: values at steps, ascending."""

    name: str
    steps: list[int]
    values: list[float]


@dataclass(frozen=True)
class Chart:
    """Lines that share an axis."""

    title: str
    series: list[Series]


def read_series(path: Path) -> dict[str, Series]:
    """All metrics of a file, by name; empty where there is no file.

    A last line that is not complete (the run goes on, or was killed) is passed over.

    Raises:
        UserError: another line is not one of a run's.
    """
    found: dict[str, Series] = {}
    lines = path.read_text(errors="replace").split("\n") if path.is_file() else []
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            step = int(record.pop("step"))
            items = list(record.items())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if number == len(lines) - 1:
                break
            raise UserError(
                f"{path}: line {number + 1} is damaged ({error}); delete that line, or leave {path.parent} out"
            ) from error
        for name, value in items:
            if isinstance(value, int | float) and not isinstance(value, bool):
                series = found.setdefault(name, Series(name, [], []))
                series.steps.append(step)
                series.values.append(float(value))
    return found


def charts_of(series: dict[str, Series]) -> list[Chart]:
    """A chart for each quantity: training and validation in one, the cosines in one, the learning rates in one."""
    groups: dict[str, list[Series]] = {}
    for name, line in series.items():
        if name in HIDDEN or (name == "skipped" and not any(line.values)):
            continue
        groups.setdefault(group_of(name), []).append(line)
    order = sorted(groups, key=lambda group: (group != "loss", group == LEARNING_RATE, group.startswith("grad")))
    return [Chart(group, groups[group]) for group in order]


def group_of(name: str) -> str:
    """Which chart a metric belongs to."""
    base = name.rpartition("/")[2]
    if name == "lr" or name.endswith("_lr"):
        return LEARNING_RATE
    if "cosine" in base:
        return "alignment cosine, held out"
    return base


def compared(runs: Sequence[tuple[str, dict[str, Series]]]) -> list[Chart]:
    """One chart for each metric that several runs have: a line a run."""
    names = dict.fromkeys(name for _, series in runs for name in series)
    charts = []
    for name in names:
        if name in HIDDEN or name == "skipped" or group_of(name) == LEARNING_RATE:
            continue
        lines = [Series(run, series[name].steps, series[name].values) for run, series in runs if name in series]
        if len(lines) > 1:
            charts.append(Chart(name, lines[:COLOURS]))
    return sorted(charts, key=lambda chart: (not chart.title.startswith("val"), chart.title != "loss"))


def downsample(series: Series, most: int = MOST_POINTS) -> tuple[list[float], list[float], list[float], list[float]]:
    """Means over equal stretches of a line, and what they hide.

    Returns:
        steps, means, minima and maxima, at most ``most`` each; the last is the line's last value itself.
    """
    pairs = [(step, value) for step, value in zip(series.steps, series.values, strict=True) if math.isfinite(value)]
    if not pairs:
        return [], [], [], []
    size = -(-len(pairs) // most)
    if size > 1:
        size = -(-(len(pairs) - 1) // (most - 1))
    parts = [pairs[i : i + size] for i in range(0, len(pairs) - (size > 1), size)]
    if size > 1:
        parts.append(pairs[-1:])
    steps = [sum(step for step, _ in part) / len(part) for part in parts]
    values = [[value for _, value in part] for part in parts]
    means = [sum(part) / len(part) for part in values]
    return steps, means, [min(part) for part in values], [max(part) for part in values]


def has_log(chart: Chart) -> bool:
    """Whether a log scale would show more."""
    values = _finite(chart)
    return bool(values) and min(values) > 0 and max(values) / min(values) >= LOG_HELPS


def log_is_default(chart: Chart) -> bool:
    """Whether the chart begins with it."""
    values = _finite(chart)
    return chart.title != LEARNING_RATE and has_log(chart) and max(values) / min(values) >= LOG_IS_DEFAULT


def draw(chart: Chart, log: bool) -> str:
    """The chart as SVG. Every point tells its value when the pointer rests on it."""
    lines = [(series, downsample(series)) for series in chart.series]
    lines = [(series, points) for series, points in lines if points[0]]
    if not lines:
        return '<p class="none">no finite value</p>'
    last = max(max(points[0]) for _, points in lines)
    first = min(min(points[0]) for _, points in lines)
    low, high = min(min(points[2]) for _, points in lines), max(max(points[3]) for _, points in lines)
    x, y = Axis(first, last, LEFT, WIDTH - RIGHT), Axis(low, high, HEIGHT - BOTTOM, TOP, log, room=0.04)
    label = html.escape(f"{chart.title}{', logarithmic' if log else ''}")
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">']
    parts += axes(x, y)
    for number, (series, points) in enumerate(lines):
        parts.append(_line(series, points, x, y, number % COLOURS))
    return "".join([*parts, "</svg>"])


class Axis:
    """Values to places on paper.

    Args:
        low, high: the values.
        start, end: where they lie.
        log: whether places go with the logarithm.
        room: to leave beyond both, as a share of what lies between.
    """

    def __init__(self, low: float, high: float, start: float, end: float, log: bool = False, room: float = 0.0):
        self.log = log
        a, b = self._scaled(low), self._scaled(high)
        if a == b:
            a, b = a - (abs(a) * 0.1 or 1.0), b + (abs(b) * 0.1 or 1.0)
        a, b = a - (b - a) * room, b + (b - a) * room
        self.a, self.b, self.start, self.end = a, b, start, end

    def place(self, value: float) -> float:
        return self.start + (self._scaled(value) - self.a) / (self.b - self.a) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values, about five of them."""
        if self.log:
            found = _log_ticks(self.a, self.b)
            if len(found) >= 2:
                return found
            return _linear_ticks(10**self.a, 10**self.b)
        return _linear_ticks(self.a, self.b)

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.log else value


def axes(x: Axis, y: Axis, words: tuple[str, str] | None = None) -> list[str]:
    """Grid and numbers, as SVG."""
    left, right = sorted((x.start, x.end))
    bottom, top = max(y.start, y.end), min(y.start, y.end)
    parts = []
    for value in y.ticks():
        at = y.place(value)
        parts.append(f'<path class="grid" d="M{left:.1f} {at:.1f}H{right:.1f}"/>')
        parts.append(f'<text x="{left - 6:.1f}" y="{at + 3.5:.1f}" text-anchor="end">{short(value)}</text>')
    for value in x.ticks():
        at = x.place(value)
        anchor = "end" if at > right - 14 else "middle"
        parts.append(f'<path class="grid" d="M{at:.1f} {bottom:.1f}v4"/>')
        parts.append(f'<text x="{at:.1f}" y="{bottom + 16:.1f}" text-anchor="{anchor}">{short(value)}</text>')
    parts.append(f'<path class="axis" d="M{left:.1f} {top:.1f}V{bottom:.1f}H{right:.1f}"/>')
    if words:
        middle = (bottom + top) / 2
        parts.append(f'<text x="{(left + right) / 2:.1f}" y="{bottom + 32:.1f}" text-anchor="middle">{words[0]}</text>')
        turned = f'transform="rotate(-90 12 {middle:.1f})"'
        parts.append(f'<text x="12" y="{middle:.1f}" text-anchor="middle" {turned}>{words[1]}</text>')
    return parts


def short(value: float) -> str:
    """``12000 → 12k``, ``1e-05 → 1e-5``; at most four digits."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.4g}M"
    if size >= 1e4:
        return f"{value / 1e3:.4g}k"
    text = f"{value:.4g}"
    if "e" in text:
        mantissa, _, exponent = text.partition("e")
        return f"{mantissa}e{int(exponent)}"
    return text


def _line(series: Series, points: tuple, x: Axis, y: Axis, colour: int) -> str:
    steps, means, minima, maxima = points
    places = [(x.place(step), y.place(mean)) for step, mean in zip(steps, means, strict=True)]
    parts = []
    if minima != maxima:
        upper = [f"{x.place(step):.1f} {y.place(v):.1f}" for step, v in zip(steps, maxima, strict=True)]
        lower = [f"{x.place(step):.1f} {y.place(v):.1f}" for step, v in zip(steps, minima, strict=True)]
        parts.append(f'<path class="band c{colour}" d="M{"L".join(upper + lower[::-1])}Z"/>')
    if len(places) > 1:
        parts.append(f'<path class="line c{colour}" d="M{"L".join(f"{a:.1f} {b:.1f}" for a, b in places)}"/>')
    radius = 3 if len(places) <= 12 else 0
    name = html.escape(series.name)
    for (a, b), step, mean in zip(places, steps, means, strict=True):
        title = f"<title>{name}: {mean:.6g} at step {step:,.0f}</title>"
        if radius:
            parts.append(f'<circle class="dot c{colour}" cx="{a:.1f}" cy="{b:.1f}" r="{radius}">{title}</circle>')
        else:
            parts.append(f'<circle class="hit" cx="{a:.1f}" cy="{b:.1f}" r="5">{title}</circle>')
    return "".join(parts)


def _finite(chart: Chart) -> list[float]:
    return [value for series in chart.series for value in series.values if math.isfinite(value)]


def _linear_ticks(a: float, b: float, wanted: int = 5) -> list[float]:
    raw = (b - a) / wanted
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    count = range(math.ceil(a / step - 1e-9), math.floor(b / step + 1e-9) + 1)
    return [round(i * step, 12 - math.floor(math.log10(step))) for i in count]


def _log_ticks(a: float, b: float) -> list[float]:
    decades = range(math.floor(a), math.ceil(b) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        found = [f * 10.0**d for d in decades for f in factors if a <= math.log10(f * 10.0**d) <= b]
        if len(found) <= 7:
            return found
    step = -(-len(found) // 6)
    return found[::step]


def final_values(series: Iterable[Series]) -> dict[str, tuple[int, float]]:
    """``{name: (step, value)}``, the last finite value of each."""
    found = {}
    for line in series:
        for step, value in zip(reversed(line.steps), reversed(line.values), strict=True):
            if math.isfinite(value):
                found[line.name] = (step, value)
                break
    return found
