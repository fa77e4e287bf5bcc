"""EP_FID@k: after how many epochs images made without guidance are so close to real ones (SR-DiT, arXiv 2512.12386).

Only what was measured is said: the last evaluated epoch at which the distance was still larger, and the first at which
it was not. Nothing is interpolated between them.
"""

import math
from collections.abc import Sequence

from reporting.curves import read_series
from reporting.results import Row
from reporting.runs import VAE_AND_SIT, Run
from reporting.tables import Column, Table

OF_THE_STEP = ("train_steps", "weights_sha256", "latent_statistics")  # of the settings of samples
OF_THE_STEP_WITH_ITS_VAE = (*OF_THE_STEP, "vae")  # of a run that trains its VAE as well


def epochs_table(rows: Sequence[Row], thresholds: Sequence[float]) -> Table | None:
    """A row for each kind of unguided sample that a run was evaluated with at any steps; None where there is none.

    Args:
        rows: measurements; of several of one step the newest counts.
        thresholds: distances, FID or whatever FD was measured.
    """
    groups: dict[tuple, dict[int, Row]] = {}
    newest = sorted((row for row in rows if row.owner and row.samples), key=lambda row: row.measurement.created)
    for row in newest:
        step = row.samples.settings.get("train_steps")
        if row.guidance != "none" or row.metric_of_images is None or type(step) is not int:
            continue
        of_the_step = OF_THE_STEP_WITH_ITS_VAE if row.owner.sort == VAE_AND_SIT else OF_THE_STEP
        alike = tuple(sorted(row.samples.said(but=of_the_step).items()))
        key = (row.owner.folder, row.metric_of_images, row.reference, row.images, alike)
        groups.setdefault(key, {})[step] = row
    found = [(group, _epochs_a_step(next(iter(group.values())).owner)) for group in groups.values()]
    found = [(group, epochs) for group, epochs in found if epochs is not None]
    if not found:
        return None
    titles = [f"≤ {threshold:g}" for threshold in thresholds]
    words = ("run", "distance", "labels", "reference", "images")
    columns = [*(Column(word, is_number=False) for word in words), *map(Column, ("evaluated at", *titles))]
    lines, sources = [], []
    for group, epochs in found:
        last = group[max(group)]
        values = {step * epochs: row.cells[row.metric_of_images].value for step, row in sorted(group.items())}
        facts = [last.run, last.metric_of_images, last.labels or "unknown", last.reference, f"{last.images:,}"]
        evaluated = ", ".join(f"{epoch:.3g}" for epoch in values)
        lines.append([*facts, evaluated, *(reached(values, threshold) for threshold in thresholds)])
        sources.append(last)
    return Table("Epochs of training until images made without guidance are so close", columns, lines, sources)


def reached(values: dict[float, float], threshold: float) -> str:
    """``24 to 32``, ``up to 8`` or ``over 80``, of distances by ascending epoch."""
    before = None
    for epoch, value in values.items():
        if math.isfinite(value) and value <= threshold:
            return f"up to {epoch:.3g}" if before is None else f"{before:.3g} to {epoch:.3g}"
        before = epoch
    return f"over {before:.3g}"


def _epochs_a_step(run: Run) -> float | None:
    """By what the run has logged; None if it logged nothing."""
    line = read_series(run.folder / "metrics.jsonl").get("epoch")
    return line.values[-1] / line.steps[-1] if line and line.steps[-1] else None
