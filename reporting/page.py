"""``report.html``: one file with everything in it, which runs no script and loads nothing."""

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from files import remove_leftovers, write_atomically
from reporting.correlation import View, correlation_lines, points_table, published_points
from reporting.curves import HIDDEN, MOST_LINES, Chart, Series, charts_of, compared, final_values, read_series
from reporting.drawing import Drawing, chart_figure, drawing, length_figure, scatter_figure
from reporting.ema_lengths import length_charts
from reporting.gather import Report
from reporting.pictures import inline, pictures_of, spread, step_of
from reporting.results import Row
from reporting.runs import MEASURED, SAMPLES, VAE_FOLDER, Run
from reporting.tables import NOTHING, Column, Table
from runtime.cli import flag_of

MOST_VIEWS = 3
STATES = ("finished", "running", "stopped", "failed")
NO_FLAGS = ("exp_name", "output_dir")  # differ in any two runs


def write_page(report: Report, path: Path, title: str) -> int:
    """Write the page, complete or not at all; returns its bytes."""
    content = page(report, title).encode(errors="replace")  # a folder's name may be no Unicode
    remove_leftovers(path.parent, path.name)
    write_atomically(path, content)
    return len(content)


def page(report: Report, title: str) -> str:
    """The whole page; the same for the same report."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"count": _count, "word_columns": _word_columns}
    series = {run.name: read_series(run.folder / "metrics.jsonl") for run in report.runs}
    runs = [_one_run(report, run, series[run.name]) for run in report.runs]
    progress = [name for name in runs[0]["progress"] if any(run["progress"][name] != NOTHING for run in runs)]
    return environment.get_template("page.html").render(
        title=title,
        report=report,
        measured_at=max((str(row.measurement.created)[:10] for row in report.rows if row.measurement), default=""),
        has_published=any(column.is_published for table in report.tables for column in table.columns),
        tables=[(table, *_marked(table)) for table in report.tables + report.differences],
        views=[_scatter(view, report) for view in report.views[:MOST_VIEWS]],
        runs=runs,
        overview=progress,
        compared=_comparison(report.runs, series),
        most_lines=MOST_LINES,
    )


def _marked(table: Table) -> tuple[set[tuple[int, int]], set[int]]:
    """The best measured figure of each column as (row, column), and the rows that are means over seeds.

    Means are compared with means only; rows of images made or compared otherwise with none.
    """
    means = {number for number, row in enumerate(table.sources) if row.seeds > 1}
    rows: dict[int, Row] = {n: row for n, row in enumerate(table.sources) if n in means or not means}
    ways = {(row.labels, row.sampler, row.guidance, row.reference, row.images, row.detail) for row in rows.values()}
    if len(ways) > 1:
        return set(), means
    best = set()
    for place, column in enumerate(table.columns):
        values = {n: row.cells[column.metric].value for n, row in rows.items() if column.metric in row.cells}
        if column.arrow and len(set(values.values())) > 1:
            best.add(((max if column.arrow == "↑" else min)(values, key=values.get), place))
    return best, means


def _scatter(view: View, report: Report) -> dict[str, Any]:
    """Probe against distance: a drawing with its correlations, the table alone if there are too few VAEs."""
    lines, drawn = correlation_lines(view, report.published), None
    if view.is_drawn:
        drawn = drawing(*scatter_figure(view, report.published))
        if published_points(view, report.published):
            lines = ["Filled: measured by this code. Hollow: published (Table 8).", *lines]
    return {"title": view.title, "drawing": drawn, "lines": lines, "table": points_table(view)}


def _comparison(runs: Sequence[Run], series: Mapping[str, dict[str, Series]]) -> list[dict[str, Any]]:
    """Trainings of one sort: their curves in common charts, and the flags in which they differ."""
    groups = []
    for sort in dict.fromkeys(run.sort for run in runs):
        same = [run for run in runs if run.sort == sort and run.arguments]
        if len(same) < 2:
            continue
        names = sorted({name for run in same for name in run.arguments if name not in NO_FLAGS})
        values = {name: [_value(run.arguments.get(name)) for run in same] for name in names}
        groups.append(
            {
                "sort": sort,
                "runs": [run.name for run in same],
                "charts": _drawn(compared([(run.name, series[run.name]) for run in same])),
                "flags": [[flag_of(name), *each] for name, each in values.items() if len(set(each)) > 1],
            }
        )
    return groups


def _one_run(report: Report, run: Run, series: dict[str, Series]) -> dict[str, Any]:
    """Everything that the page shows of one subject."""
    facts = [run.sort, f"preset {run.preset.name}" if run.preset else None]
    if row := report.reproduced.get(run.name):
        facts.append(f"published: {row.id}, {row.label}")
    final = final_values(
        line for name, line in series.items() if name not in (*HIDDEN, "skipped", "grad_norm") and "lr" not in name
    )
    pictures, earlier = pictures_of(run)
    lengths = [(chart, drawing(*length_figure(chart)), None) for chart in length_charts(run, report.rows)]
    return {
        "name": run.name,
        "sort": run.sort,
        "badge": _badge(run),
        "progress": _progress(run),
        "facts": [fact for fact in facts if fact],
        "reason": run.status.get("reason"),
        "final": sorted(final.items(), key=lambda item: not item[0].startswith("val")),  # held-out ones first
        "pictures": [(inline(path), caption) for path, caption in pictures],
        "earlier": [(inline(path), step_of(path)) for path in spread(earlier)],
        "earlier_count": len(earlier),
        "charts": _drawn(charts_of(series)) + lengths,
        "flags": [[flag_of(name), _value(value)] for name, value in sorted(run.arguments.items())],
        "command": re.sub(r" (?=--)", " \\\n  ", " ".join(map(str, run.command))),
        "versions": ", ".join(f"{name} {version}" for name, version in run.versions.items() if version) or NOTHING,
        "commit": run.commit or "unknown",
        "folder": run.folder,
    }


def _drawn(charts: Sequence[Chart]) -> list[tuple[Chart, Drawing | None, Drawing | None]]:
    """Each chart with its linear drawing, and a logarithmic one if that shows more."""
    figures = [(chart, chart_figure(chart, log=False), chart.has_log and chart_figure(chart, log=True))
               for chart in charts]  # fmt: skip
    return [(chart, *(drawing(*figure) if figure else None for figure in both)) for chart, *both in figures]


def _progress(run: Run) -> dict[str, str]:
    """How far a training came, and how fast."""
    clock = read_series(run.folder / "timing.jsonl")
    step, steps = run.status.get("step"), run.status.get("max_train_steps")
    reached = NOTHING if step is None else f"{step:,}" if steps in (step, None) else f"{step:,} of {steps:,}"
    return {
        "step": reached,
        "trained for": _duration(clock.get("seconds_per_step")),
        "images/s": _median(clock.get("images_per_second"), "{:.4g}"),
        "GiB": _median(clock.get("peak_memory_gib"), "{:.1f}"),
        "commit": (run.commit or NOTHING)[:10],
    }


def _badge(run: Run) -> tuple[str, str]:
    """The state of a run, and the class of its colour."""
    if run.sort in (VAE_FOLDER, SAMPLES, MEASURED):
        return run.sort, ""
    state = str(run.status.get("state", "not started"))
    return state, state if state in STATES else "unknown"


def _duration(pace: Series | None) -> str:
    """Time in training steps, without validation and checkpoints."""
    if pace is None:
        return NOTHING
    steps = zip(pace.steps, [0, *pace.steps[:-1]], pace.values, strict=True)
    seconds = sum(max(0, step - previous) * each for step, previous, each in steps)
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _median(series: Series | None, form: str) -> str:
    return form.format(statistics.median(series.values)) if series else NOTHING


def _value(value: object) -> str:
    if isinstance(value, str):
        return re.sub(r"\b([0-9a-f]{10})[0-9a-f]{30,}\b", r"\1…", value)  # checksums
    return NOTHING if value is None else json.dumps(value, ensure_ascii=False)


def _word_columns(names: Sequence[str]) -> list[Column]:
    return [Column(name, is_number=False) for name in names]


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"
