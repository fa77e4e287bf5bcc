"""``report.html``: one file with everything in it, no script, nothing that is loaded from elsewhere."""

import json
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path

from metrics.record import metrics_folder
from reporting import curves
from reporting.correlation import ENOUGH, correlation_lines, points_table, published_points
from reporting.curves import Chart, Series, charts_of, compared, final_values, read_series
from reporting.gather import Report
from reporting.markup import Html, element, joined
from reporting.pictures import grids, inline
from reporting.results import Row
from reporting.runs import MEASURED, SAMPLES, VAE_FOLDER, Run
from reporting.scatter import scatter
from reporting.tables import NOTHING, Table, arrow
from runtime.files import write_atomically

STYLE = Path(__file__).with_name("page.css")
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # no script runs, nothing is loaded
MOST_GRIDS = 6  # of a run's samples/, spread over the training
MOST_VIEWS = 3
RECONSTRUCTIONS = "-reconstructions"  # train_repae.py's second grid
CAPTIONS = {
    "VAE": "originals above, reconstructions below",
    "SiT": "made from noise",
    "VAE and SiT": "made from noise",
}
DRAWN = {  # what measurements draw, by the end of the file's name
    "worst": "worst first: originals above, reconstructions below",
    "colours": "images and their latents as colours (three principal components)",
    "map": "latents by class (two principal components)",
    "ways": "from one image to another through the latents",
}


def write_page(report: Report, path: Path, title: str) -> int:
    """Write the page, complete or not at all; returns its bytes."""
    content = page(report, title).encode()
    write_atomically(path, content)
    return len(content)


def page(report: Report, title: str) -> str:
    """The whole page."""
    series = {run.name: read_series(run.folder / "metrics.jsonl") for run in report.runs if run.folder.is_dir()}
    timing = {run.name: read_series(run.folder / "timing.jsonl") for run in report.runs if run.folder.is_dir()}
    sections = [
        ("results", "Results", results(report)),
        ("figure1", "Probes beside images", figure1(report)),
        ("runs", "Runs", overview(report.runs, timing)),
        ("compared", "Compared", comparison(report.runs, series)),
    ]
    for number, run in enumerate(report.runs):
        sections.append((f"run-{number}", run.name, one_run(report, run, series.get(run.name, {}), f"c{number}")))
    sections = [(anchor, name, body) for anchor, name, body in sections if body]
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("link", rel="icon", href="data:,"),
        element("title", title),
        element("style", Html(STYLE.read_text())),
    )
    body = element(
        "body",
        element(
            "header",
            element("h1", title),
            element("p", f"{_count(len(report.runs), 'run')}, {_count(len(report.rows), 'measurement')} · {now}"),
            element("nav", [element("a", name, href=f"#{anchor}") for anchor, name, _ in sections]),
        ),
        element(
            "main",
            [
                element("section", element("h2", name), part, id=anchor, class_="run" if anchor[:4] == "run-" else None)
                for anchor, name, part in sections
            ],
        ),
        element("footer", "Written by report.py of Send-VAE. Published numbers: configs/published.yaml."),
    )
    return "<!DOCTYPE html>\n" + element("html", head, body, lang="en") + "\n"


def results(report: Report) -> Html:
    """All measurements, measured and published apart, and the notes to them."""
    if not report.tables:
        return element(
            "p",
            "Nothing was measured yet: evaluate.py and probe.py leave their figures beside the runs.",
            class_="none",
        )
    has_published = any(column.is_published for table in report.tables for column in table.columns)
    legend = element(
        "p", element("span", "measured", class_="key measured"), " by this code  ",
        element("span", "published", class_="key published"), " in a paper, not by this code", class_="legend",
    )  # fmt: skip
    notes = element("ul", [element("li", note) for note in report.notes], class_="notes") if report.notes else None
    tables = [element("div", element("h3", table.title), result_table(table)) for table in report.tables]
    return joined([legend if has_published else None, tables, notes])


def result_table(table: Table) -> Html:
    """A table in which the best measured figure of a column is set bold."""
    best = _best(table)
    heads = [
        element(
            "th",
            column.title,
            element("span", f" {arrow(column.metric)}", class_="arrow")
            if arrow(column.metric) and not column.is_published
            else None,
            class_=_classes(column.is_number, column.is_published),
            scope="col",
        )
        for column in table.columns
    ]
    rows = []
    for row, words in zip(table.sources, table.rows, strict=True):
        cells = []
        for place, (column, word) in enumerate(zip(table.columns, words, strict=True)):
            cells.append(
                element(
                    "td",
                    element("b", word) if row is best.get(place) else word,
                    class_=_classes(column.is_number, column.is_published),
                )
            )
        rows.append(element("tr", cells, class_="mean" if row.seeds > 1 else None))
    table = element("table", element("thead", element("tr", heads)), element("tbody", rows), class_="results")
    return _scrolling(table)


def figure1(report: Report) -> Html | None:
    """Scatters of probe against distance, with correlations; the table alone where there are too few VAEs for one."""
    parts = []
    for view in report.views[:MOST_VIEWS]:
        columns, rows = points_table(view)
        lines, drawing = correlation_lines(view, report.published), None
        if view.vaes >= ENOUGH:
            drawing = element("figure", Html(scatter(view, report.published)), class_="chart wide")
            if published_points(view, report.published):
                lines = ["Filled: measured by this code. Hollow: published (Table 8).", *lines]
        reading = element("div", [element("p", line) for line in lines], class_="reading")
        reading = element("div", drawing, reading, class_="beside")
        table = plain_table([column.title for column in columns], rows, words=2)
        parts += [element("h3", view.title), reading, table]
    return joined(parts) if parts else None


def overview(runs: Sequence[Run], timing: Mapping[str, Mapping[str, Series]]) -> Html:
    """One line for each run: what it is and how it went."""
    rows = []
    for number, run in enumerate(runs):
        clock = timing.get(run.name, {})
        rows.append(
            [
                element("a", run.name, href=f"#run-{number}"),
                run.sort,
                badge(run),
                _steps(run),
                _duration(clock),
                _median(clock.get("images_per_second"), "{:.4g}"),
                _median(clock.get("peak_memory_gib"), "{:.1f}"),
                (run.commit or NOTHING)[:10],
            ]
        )
    heads = ["run", "what", "state", "step", "trained for", "images/s", "GiB", "commit"]
    used = [i for i in range(len(heads)) if i < 3 or any(row[i] != NOTHING for row in rows)]
    return plain_table([heads[i] for i in used], [[row[i] for i in used] for row in rows], words=3)


def comparison(runs: Sequence[Run], series: Mapping[str, Mapping[str, Series]]) -> Html | None:
    """Trainings of one sort: their curves in common charts, and the flags in which they differ."""
    parts = []
    for sort in dict.fromkeys(run.sort for run in runs):
        same = [run for run in runs if run.sort == sort and run.arguments]
        if len(same) < 2:
            continue
        names = [(run.name, series[run.name]) for run in same]
        shown = compared(names)
        parts.append(element("h3", f"{sort}: {_count(len(same), 'training')}"))
        if len(same) > curves.COLOURS:
            parts.append(element("p", f"Curves of the first {curves.COLOURS} of {len(same)}.", class_="none"))
        parts.append(charts(shown, f"{sort.split()[0].lower()}-{len(parts)}"))
        parts.append(differing_flags(same))
    return joined(parts) if parts else None


def differing_flags(runs: Sequence[Run]) -> Html | None:
    """A table of the flags that are not the same in all runs."""
    names = sorted({name for run in runs for name in run.arguments})
    apart = [name for name in names if len({_value(run.arguments.get(name)) for run in runs}) > 1]
    hidden = {"exp_name", "output_dir"}
    rows = [[_flag(name), *(_value(run.arguments.get(name)) for run in runs)] for name in apart if name not in hidden]
    if not rows:
        return None
    table = plain_table(["flag", *(run.name for run in runs)], rows, words=len(runs) + 1)
    return element("details", element("summary", f"Flags that differ ({len(rows)})"), table, open=len(rows) <= 12)


def one_run(report: Report, run: Run, series: Mapping[str, Series], prefix: str) -> Html:
    """Everything of one subject."""
    facts = [run.sort]
    if run.preset:
        facts.append(f"preset {run.preset.name}")
    if row := report.reproduced.get(run.name):
        facts.append(f"published: {row.id}, {row.label}")
    return joined(
        [
            element("p", badge(run), " ", " · ".join(facts), class_="facts"),
            element("p", run.status["reason"], class_="fault") if run.status.get("reason") else None,
            final_table(series),
            pictures(run),
            charts(charts_of(dict(series)), prefix),
            settings(run),
        ]
    )


def final_table(series: Mapping[str, Series]) -> Html | None:
    """The last values of the curves, held-out ones first."""
    values = final_values(line for name, line in series.items() if name not in (*curves.HIDDEN, "skipped"))
    if not values:
        return None
    names = sorted(values, key=lambda name: not name.startswith("val"))
    tiles = [
        element("div", element("b", f"{values[name][1]:.4g}"), element("span", name), title=f"step {values[name][0]:,}")
        for name in names
        if "lr" not in name and name != "grad_norm"
    ]
    return element("div", tiles, class_="tiles")


def pictures(run: Run) -> Html | None:
    """Grids of the training, generated images, and what the measurements drew."""
    found = []
    for samples in run.samples:
        if samples.preview:
            found.append((samples.preview, f"{samples.path.name}: {_how(samples.settings, samples.count)}"))
        found += _drawn(samples.path)
    training = [path for path in grids(run.folder / "samples") if not path.stem.endswith(RECONSTRUCTIONS)]
    if training:
        last = training[0]
        found.append((last, f"{_step_of(last)}: {CAPTIONS.get(run.sort, '')}"))
        beside = last.with_name(f"{last.stem}{RECONSTRUCTIONS}.png")
        if beside.is_file():
            found.append((beside, f"{_step_of(last)}: {CAPTIONS['VAE']}"))
    if run.sort != SAMPLES:
        found += _drawn(run.folder)
    earlier = _spread(training[1:], MOST_GRIDS)
    more = None
    if earlier:
        figures = [picture(path, _step_of(path)) for path in earlier]
        more = element(
            "details",
            element("summary", f"Earlier ({len(earlier)} of {len(training) - 1})"),
            element("div", figures, class_="pictures"),
        )
    if not found:
        return None
    return joined([element("div", [picture(path, caption) for path, caption in found], class_="pictures"), more])


def picture(path: Path, caption: str) -> Html:
    """A figure with an inlined picture."""
    found = inline(path)
    if found.fault:
        return element("figure", element("p", found.fault, class_="fault"), element("figcaption", caption))
    kind = "pixels" if found.is_enlarged else "plot" if path.stem.endswith("-map") else None
    image = element("img", src=found.uri, alt=caption, width=found.width, class_=kind)
    return element("figure", image, element("figcaption", caption))


def charts(found: Iterable[Chart], prefix: str) -> Html | None:
    """Small multiples; where a log scale shows more, a switch between both."""
    figures = []
    for number, chart in enumerate(found):
        parts: list[Html | None] = []
        switch, caption = None, [chart.title]
        if curves.has_log(chart):
            anchor = f"{prefix}-{number}"
            switch = element("input", type="checkbox", class_="switch", id=anchor, checked=curves.log_is_default(chart))
            caption.append(element("label", "log", for_=anchor))
            parts.append(element("div", Html(curves.draw(chart, log=True)), class_="logarithmic"))
        parts.append(element("div", Html(curves.draw(chart, log=False)), class_="linear"))
        names = [element("span", element("i", class_=f"c{i}"), series.name) for i, series in enumerate(chart.series)]
        legend = (
            element("div", names, class_="names") if [series.name for series in chart.series] != [chart.title] else None
        )
        figures.append(element("figure", switch, element("figcaption", caption), parts, legend, class_="chart"))
    return element("div", figures, class_="charts") if figures else None


def settings(run: Run) -> Html | None:
    """Flags, command, versions."""
    if not run.arguments and not run.command:
        return None
    rows = [[_flag(name), _value(value)] for name, value in sorted(run.arguments.items())]
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items() if version)
    return joined(
        [
            element(
                "details",
                element("summary", f"Settings ({len(rows)} flags)"),
                plain_table(["flag", "value"], rows, words=2),
            ),
            element(
                "details",
                element("summary", "Command, versions, commit"),
                element("pre", _command_line(run.command)) if run.command else None,
                element("p", versions or NOTHING),
                element("p", f"commit {run.commit or 'unknown'}"),
                element("p", f"folder {run.folder}"),
            ),
        ]
    )


def plain_table(heads: Sequence[str], rows: Sequence[Sequence[object]], words: int) -> Html:
    """A table; the first ``words`` columns are words, the rest numbers."""
    head = [element("th", name, class_=_classes(i >= words, False), scope="col") for i, name in enumerate(heads)]
    body = [
        element("tr", [element("td", cell, class_=_classes(i >= words, False)) for i, cell in enumerate(row)])
        for row in rows
    ]
    return _scrolling(element("table", element("thead", element("tr", head)), element("tbody", body)))


def badge(run: Run) -> Html:
    """The state of a run as a coloured word."""
    if run.sort in (VAE_FOLDER, SAMPLES, MEASURED):
        return element("span", run.sort, class_="badge")
    state = str(run.status.get("state", "not started"))
    kind = state if state in ("finished", "running", "stopped", "failed") else "unknown"
    return element("span", state, class_=f"badge {kind}")


def _best(table: Table) -> dict[int, Row]:
    """The row with the best figure of each measured column, by the column's place.

    Means over seeds are compared with means. None where rows are not alike: other guidance, other data, other counts.
    """
    rows = [row for row in table.sources if row.seeds > 1] or table.sources
    if len({(row.guidance, row.reference, row.images, row.detail) for row in rows}) > 1:
        return {}
    best = {}
    for place, column in enumerate(table.columns):
        there = [row for row in rows if column.metric in row.cells]
        values = [row.cells[column.metric].value for row in there]
        if column.metric and not column.is_published and arrow(column.metric) and len(set(values)) > 1:
            choose = max if arrow(column.metric) == "↑" else min
            best[place] = there[values.index(choose(values))]
    return best


def _classes(is_number: bool, is_published: bool) -> str | None:
    return " ".join(word for word, holds in (("number", is_number), ("published", is_published)) if holds) or None


def _scrolling(table: Html) -> Html:
    return element("div", table, class_="table")


def _drawn(folder: Path) -> list[tuple[Path, str]]:
    """Pictures that evaluate.py and probe.py left beside their figures."""
    found = []
    for path in sorted(metrics_folder(folder).glob("*.png")):
        name, _, kind = path.stem.rpartition("-")
        found.append((path, f"{name}: {DRAWN[kind]}" if kind in DRAWN else path.stem))
    return found


def _how(made: Mapping[str, object], count: int | None) -> str:
    """How images were made, in words."""
    words = [f"{count:,} images"] if count else []
    if "train_steps" in made:
        words.append(f"{made.get('weights', '')} of step {made['train_steps']:,}".strip())
    if "mode" in made:
        words.append(f"{made['mode'].upper()}{' Heun' if made.get('heun') else ''}, {made.get('num_steps')} steps")
    scale = made.get("cfg_scale")
    if scale is not None:
        words.append("no guidance" if scale == 1 else f"guidance {scale:g}")
    return ", ".join(words) or "generated images"


def _spread(paths: Sequence[Path], most: int) -> list[Path]:
    """At most so many, evenly spread, the first and the last among them."""
    if len(paths) <= most:
        return list(paths)
    return [paths[round(i * (len(paths) - 1) / (most - 1))] for i in range(most)]


def _step_of(path: Path) -> str:
    digits = path.stem.rpartition("-")[2]
    return f"step {int(digits):,}" if digits.isdecimal() else path.stem


def _steps(run: Run) -> str:
    step, steps = run.status.get("step"), run.status.get("max_train_steps")
    if step is None:
        return NOTHING
    return f"{step:,}" if step == steps or steps is None else f"{step:,} of {steps:,}"


def _duration(clock: Mapping[str, Series]) -> str:
    """Seconds in steps, without validation and checkpoints."""
    series = clock.get("seconds_per_step")
    if series is None:
        return NOTHING
    before = [0, *series.steps[:-1]]
    pairs = zip(series.steps, before, series.values, strict=True)
    seconds = sum(max(0, step - previous) * each for step, previous, each in pairs)
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _median(series: Series | None, form: str) -> str:
    return form.format(statistics.median(series.values)) if series and series.values else NOTHING


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _value(value: object) -> str:
    if isinstance(value, str):
        return re.sub(r"\b([0-9a-f]{10})[0-9a-f]{30,}\b", r"\1…", value)  # checksums
    return NOTHING if value is None else json.dumps(value, ensure_ascii=False)


def _command_line(words: Sequence[str]) -> str:
    """One flag a line."""
    text = ""
    for word in words:
        text += f" \\\n  {word}" if str(word).startswith("--") else f" {word}"
    return text.strip()


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"
