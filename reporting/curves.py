"""``metrics.jsonl`` as the charts that a page draws."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from errors import UserError
from formats.run_folders import Line
from schema import MalformedError, parse_json

LOG_HELPS = 8  # ratio of the largest to the smallest value from which a chart can be switched to a log scale
LOG_IS_DEFAULT = 40
LEARNING_RATE = "learning rate"
HIDDEN = ("epoch", "step")
MOST_LINES = 8  # of a chart: one for each colour


@dataclass(frozen=True)
class Series:
    """One line: values at ascending steps."""

    name: str
    steps: list[int]
    values: list[float]


@dataclass(frozen=True)
class Chart:
    """Lines that share an axis."""

    title: str
    series: list[Series]

    @property
    def has_log(self) -> bool:
        """Whether a log scale would show more."""
        return self._ratio() >= LOG_HELPS

    @property
    def log_is_default(self) -> bool:
        return self.title != LEARNING_RATE and self._ratio() >= LOG_IS_DEFAULT

    def _ratio(self) -> float:
        values = [value for series in self.series for value in series.values if math.isfinite(value)]
        return max(values) / min(values) if values and min(values) > 0 else 0.0


def read_series(path: Path) -> dict[str, Series]:
    """All metrics of a file, by name; empty if there is no file.

    An incomplete last line (the run is still writing, or was killed) is skipped.

    Raises:
        UserError: another line is damaged.
    """
    found: dict[str, Series] = {}
    lines = path.read_text(errors="replace").split("\n") if path.is_file() else []
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            record = parse_json(line, Line)
            step = record.pop("step")
            values = {name: float(value) for name, value in record.items() if type(value) in (int, float)}
        except (MalformedError, OverflowError) as error:
            if number == len(lines) - 1:
                break
            raise UserError(
                f"{path}: line {number + 1} is damaged ({error}); delete that line, or leave {path.parent} out"
            ) from error
        for name, value in values.items():
            series = found.setdefault(name, Series(name, [], []))
            series.steps.append(step)
            series.values.append(value)
    return found


def charts_of(series: dict[str, Series]) -> list[Chart]:
    """One chart per quantity: training with validation, all cosines together, all learning rates together."""
    groups: dict[str, list[Series]] = {}
    for name, line in series.items():
        if name not in HIDDEN and (name != "skipped" or any(line.values)):
            groups.setdefault(_group_of(name), []).append(line)
    order = sorted(groups, key=lambda group: (group != "loss", group == LEARNING_RATE, group.startswith("grad")))
    return [Chart(group, groups[group]) for group in order]


def _group_of(name: str) -> str:
    base = name.rpartition("/")[2]
    if name == "lr" or name.endswith("_lr"):
        return LEARNING_RATE
    return "alignment cosine, held out" if "cosine" in base else base


def compared(runs: Sequence[tuple[str, dict[str, Series]]]) -> list[Chart]:
    """One chart for each metric that several runs share, with a line for each run."""
    charts = []
    for name in dict.fromkeys(name for _, series in runs for name in series):
        if name in (*HIDDEN, "skipped") or _group_of(name) == LEARNING_RATE:
            continue
        lines = [Series(run, series[name].steps, series[name].values) for run, series in runs if name in series]
        if len(lines) > 1:
            charts.append(Chart(name, lines[:MOST_LINES]))
    return sorted(charts, key=lambda chart: (not chart.title.startswith("val"), chart.title != "loss"))


def final_values(series: Iterable[Series]) -> dict[str, tuple[int, float]]:
    """``{name: (step, value)}``: the last finite value of each."""
    found = {}
    for line in series:
        pairs = zip(reversed(line.steps), reversed(line.values), strict=True)
        last = next(((step, value) for step, value in pairs if math.isfinite(value)), None)
        if last:
            found[line.name] = last
    return found
