"""Everything that a report shows, read and put together once."""

from collections.abc import Sequence
from dataclasses import dataclass

from metrics.published import Published, PublishedRow, load_published
from reporting.correlation import View, views
from reporting.differences import difference_tables
from reporting.epochs import epochs_table
from reporting.results import Row, notes, published_rows, result_rows, with_means
from reporting.runs import Run, find_runs
from reporting.tables import Table, result_tables


@dataclass(frozen=True)
class Report:
    """What was found."""

    runs: list[Run]  # the subjects
    rows: list[Row]  # their measurements, with means over seeds
    tables: list[Table]  # the same, ready to print
    differences: list[Table]  # of presets to a baseline, if one is given
    views: list[View]  # probes against images, see :mod:`reporting.correlation`
    notes: list[str]  # what a reader must know
    reproduced: dict[str, PublishedRow]  # the published row of each run that has one, by the run's name
    published: Published  # all published numbers


def gather(
    paths: Sequence[str], given: Sequence[str] = (), baseline: str | None = None, thresholds: Sequence[float] = ()
) -> Report:
    """Read runs and their measurements.

    Args:
        paths: of the runs, see ``find_runs``.
        given: published rows to compare with, ``RUN=ROW`` each.
        baseline: a preset that others are compared with.
        thresholds: distances, for a table of the epochs after which images came as close; none: no such table.
    """
    published, runs = load_published(), find_runs(paths)
    reproduced = published_rows(runs, given, published)
    rows = result_rows(runs, reproduced, published)
    found = views(rows)
    differences = [] if baseline is None else difference_tables(rows, baseline)
    epochs = epochs_table(rows, thresholds) if thresholds else None
    rows = with_means(rows)
    tables = [*result_tables(rows), *([] if epochs is None else [epochs])]
    return Report(runs, rows, tables, differences, found, notes(rows), reproduced, published)
