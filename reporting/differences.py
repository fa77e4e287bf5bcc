"""How presets that were run with the same seeds differ from one of them: paired differences with their intervals."""

import math
import statistics
from collections.abc import Sequence

from scipy.stats import t as students_t

from errors import UserError
from reporting.results import Row, metric_order
from reporting.tables import Column, Table, column_title, number_word

CONFIDENCE = 0.95


def difference_tables(rows: Sequence[Row], baseline: str) -> list[Table]:
    """One table a section: each preset's figures less the baseline's of the same seed.

    Args:
        rows: measurements, without means.
        baseline: name of a preset that made some of them.

    Raises:
        UserError: no measurement is of that preset.
    """
    presets = list(dict.fromkeys(row.preset for row in rows if row.preset))
    if baseline not in presets:
        known = ", ".join(presets) or "none: these runs were made by no preset"
        raise UserError(f"--baseline {baseline}: nothing was measured of this preset; there are {known}")
    tables = []
    for section in dict.fromkeys(row.section for row in rows):
        groups: dict[tuple, dict[str, dict[int, Row]]] = {}
        for row in rows:
            if row.section == section and row.preset and row.owner is not None:
                key = (row.detail, row.weights, row.labels, row.sampler, row.guidance, row.reference, row.images)
                by_seed = groups.setdefault(key, {}).setdefault(row.preset, {})
                seed = row.owner.arguments.get("seed", 0)
                if seed not in by_seed or row.measurement.created > by_seed[seed].measurement.created:
                    by_seed[seed] = row
        found = [_table(section, by_preset, baseline) for by_preset in groups.values() if len(by_preset) > 1]
        tables += [table for table in found if table is not None]
    return tables


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """Mean of the differences of pairs, and half the width of its 95 % interval by Student's t; NaN for one pair."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    if not all(map(math.isfinite, differences)):
        return math.nan, math.nan
    if len(differences) < 2:
        return differences[0], math.nan
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return statistics.fmean(differences), error * float(students_t.ppf((1 + CONFIDENCE) / 2, len(differences) - 1))


def _table(section: str, by_preset: dict[str, dict[int, Row]], baseline: str) -> Table | None:
    base = by_preset.get(baseline)
    if base is None:
        return None
    lines = []
    for preset, by_seed in by_preset.items():
        seeds = sorted(set(by_seed) & set(base))
        if preset != baseline and seeds:
            lines.append((preset, seeds, by_seed))
    if not lines:
        return None
    every = [row for by_seed in by_preset.values() for row in by_seed.values()]
    metrics = sorted(set.intersection(*(set(row.cells) for row in every)), key=metric_order)
    columns = [Column("preset", is_number=False), Column("seeds")]
    columns += [Column(column_title(metric, section), metric) for metric in metrics]
    words = [
        [preset, str(len(seeds)), *(_word(metric, [by_seed[s] for s in seeds], [base[s] for s in seeds])
                                    for metric in metrics)]
        for preset, seeds, by_seed in lines
    ]  # fmt: skip
    title = f"{section}: differences to {baseline} of the same seeds; ± 95 % interval, * where it excludes 0"
    return Table(title, columns, words, [])


def _word(metric: str, ours: Sequence[Row], theirs: Sequence[Row]) -> str:
    pairs = [[row.cells[metric].value for row in rows] for rows in (ours, theirs)]
    mean, half = paired_difference(*pairs)
    if not math.isfinite(mean):
        return number_word(metric, mean)
    word = ("+" if mean >= 0 else "") + number_word(metric, mean)
    if math.isnan(half):
        return word
    return f"{word} ± {number_word(metric, half)}{' *' if abs(mean) > half else ''}"
