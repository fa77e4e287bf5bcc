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
    """What was found."""

    runs: list[Run]  # the subjects
    rows: list[Row]  # their measurements, with means over seeds
    tables: list[Table]  # the same, ready to print
    views: list[View]  # probes against images, see :mod:`reporting.correlation`
    notes: list[str]  # what a reader must know
    reproduced: dict[str, PublishedRow]  # the published row of each run that has one, by the run's name
    published: Published  # all published numbers


def gather(paths: Sequence[str], given: Sequence[str] = ()) -> Report:
    """Read the runs at these paths (see ``find_runs``) and their measurements; ``given``: ``RUN=ROW`` each."""
    published, runs = load_published(), find_runs(paths)
    reproduced = published_rows(runs, given, published)
    rows = result_rows(runs, reproduced, published)
    found = views(rows)
    rows = with_means(rows)
    return Report(runs, rows, result_tables(rows), found, notes(rows), reproduced, published)
