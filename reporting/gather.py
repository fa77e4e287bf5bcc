"""Everything that a report shows, read and put together once."""

from collections.abc import Sequence
from dataclasses import dataclass

from metrics.published import Published, PublishedRow, load_published
from reporting.correlation import View, views
from reporting.results import Row, notes, published_rows, result_rows, with_means
from reporting.runs import Run, find_runs
from reporting.tables import Table, result_tables


@dataclass(frozen=True)
class Report:
    """What was found.

    Attributes:
        runs: the subjects.
        rows: their measurements, with means over seeds.
        tables: the same, ready to print.
        views: probes beside images, see :mod:`reporting.correlation`.
        notes: what a reader must know.
        reproduced: the published row of each run that has one, by the run's name.
        published: all published numbers.
    """

    runs: list[Run]
    rows: list[Row]
    tables: list[Table]
    views: list[View]
    notes: list[str]
    reproduced: dict[str, PublishedRow]
    published: Published


def gather(paths: Sequence[str], given: Sequence[str] = ()) -> Report:
    """Read runs and their measurements.

    Args:
        paths: see :func:`reporting.runs.find_runs`.
        given: ``RUN=ROW`` each, see :func:`reporting.results.published_rows`.
    """
    published, runs = load_published(), find_runs(paths)
    reproduced = published_rows(runs, given, published)
    rows = result_rows(runs, reproduced, published)
    found = views(rows)
    rows = with_means(rows)
    return Report(runs, rows, result_tables(rows), found, notes(rows), reproduced, published)
