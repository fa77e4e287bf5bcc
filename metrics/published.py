"""Published numbers as data: ``configs/published.yaml``, checked as it is read."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypedDict

from errors import UserError
from schema import MalformedError, check, parse_yaml

PUBLISHED = Path(__file__).resolve().parents[1] / "configs" / "published.yaml"
GROUPS = ("reconstruction", "generation", "guided", "probe")
OF_THE_VAE = ("reconstruction", "probe")  # what rows on the same VAE have in common
USUAL_IMAGES = 50_000


class _Row(TypedDict):
    label: str
    values: list[float | None]
    see: list[str] | None
    note: str | None


class _Table(TypedDict):
    source: str
    setting: str
    columns: list[str]
    images: int | None  # how many were measured: null where that is not published, usually USUAL_IMAGES
    rows: dict[str, _Row]


class _Correlation(TypedDict):
    source: str
    label: str
    value: float
    vaes: int


class _File(TypedDict):
    tables: dict[str, _Table]
    correlations: dict[str, _Correlation]


@dataclass(frozen=True)
class PublishedRow:
    """One row of a published table.

    Attributes:
        id: ``TABLE/ROW``, e.g. ``table2/depth1``.
        label: what the row is, in words.
        source: paper and table.
        setting: what all rows of the table have in common.
        images: how many were measured; None where that is not published.
        values: by ``GROUP/METRIC``, see ``GROUPS``; only what is published.
        epochs: of the diffusion model, where the table tells.
        see: ids of rows on the same VAE.
        note: what a reader should know of this row.
    """

    id: str
    label: str
    source: str
    setting: str
    images: int | None
    values: Mapping[str, float]
    epochs: int | None = None
    see: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class PublishedCorrelation:
    """A correlation over several VAEs."""

    label: str
    source: str
    value: float
    vaes: int


@dataclass(frozen=True)
class Published:
    """All rows by id, all correlations by name."""

    rows: Mapping[str, PublishedRow]
    correlations: Mapping[str, PublishedCorrelation]

    def row(self, row_id: str) -> PublishedRow:
        """The row of an id.

        Raises:
            UserError: there is none; the line names those that look alike.
        """
        if row_id in self.rows:
            return self.rows[row_id]
        near = difflib.get_close_matches(row_id, self.rows, n=4, cutoff=0.5)
        near = near or sorted({name.partition("/")[0] + "/…" for name in self.rows})
        raise UserError(f"there is no published row {row_id}; there are {', '.join(near)} (configs/published.yaml)")

    def value(self, row: PublishedRow, group: str, metric: str) -> float | None:
        """What was published for a row, or for its VAE; None where nothing was."""
        key = f"{group}/{metric}"
        if key in row.values or group not in OF_THE_VAE:
            return row.values.get(key)
        found = (self.rows[other].values.get(key) for other in row.see)
        return next((value for value in found if value is not None), None)


@cache
def load_published(path: Path = PUBLISHED) -> Published:
    """Read and check the file.

    Raises:
        UserError: unknown keys, a row with too many or too few values, a value that is not a number, an id that is not
            there.
    """
    try:
        content = parse_yaml(path.read_bytes())
        check(content, _File, exact=True)
    except (OSError, MalformedError) as error:
        raise UserError(f"{path}: {error}") from error
    rows = {}
    for name, table in content["tables"].items():
        for row_name, row in table["rows"].items():
            rows[f"{name}/{row_name}"] = _row(f"{name}/{row_name}", row, table, path)
    for row in rows.values():
        for other in row.see:
            if other not in rows:
                raise UserError(f"{path}: {row.id}: see names {other}, which is not a row")
    correlations = {name: PublishedCorrelation(**entry) for name, entry in content["correlations"].items()}
    return Published(rows, correlations)


def _row(row_id: str, row: Any, table: Mapping[str, Any], path: Path) -> PublishedRow:
    where = f"{path}: {row_id}"
    columns, values = table["columns"], row["values"]
    if len(values) != len(columns):
        raise UserError(f"{where}: {len(values)} values for {len(columns)} columns")
    found: dict[str, float] = {}
    epochs = None
    for column, value in zip(columns, values, strict=True):
        if value is None:
            continue
        if column == "epochs":
            epochs = int(value)
        elif column.partition("/")[0] in GROUPS:
            found[column] = float(value)
        else:
            raise UserError(f"{where}: column {column} is of none of the groups {', '.join(GROUPS)}")
    see, note = tuple(row.get("see") or ()), row.get("note") or ""
    images = table.get("images", USUAL_IMAGES)
    return PublishedRow(row_id, row["label"], table["source"], table["setting"], images, found, epochs, see, note)
