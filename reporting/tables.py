"""Tables of results as aligned text, Markdown, CSV and JSON."""

import csv
import io
import json
import math
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from formats.averages import MAIN
from reporting.results import GENERATION, OTHER_FEATURES, Cell, Row, metric_order, records, short_name

NOTHING = "–"
PUBLISHED = "published"
DIGITS = {"IS": 1, "PSNR": 2, "Precision": 3, "Recall": 3, "SSIM": 3}
DIGITS |= dict.fromkeys(("FID", "sFID", "rFID", "FDr6", "FDr"), 2)
PUBLISHED_DIGITS = {"IS": 1, "LPIPS": 3, "F1": 4}  # 2 for all others
HIGHER_IS_BETTER = ("IS", "Precision", "Recall", "PSNR", "SSIM", "F1", "mAP", "top", "asked", "clear", "held")
LOWER_IS_BETTER = ("FID", "sFID", "rFID", "FD", "FDr6", "FDr", "rFD", "KID", "MIND", "LPIPS", "gini")


@dataclass(frozen=True)
class Column:
    """One column of a table; ``metric`` is empty for words, ``is_published`` marks what was not measured here."""

    title: str
    metric: str = ""
    is_published: bool = False
    is_number: bool = True

    @property
    def arrow(self) -> str:
        """Which way is better; empty where that is unknown, and for published figures."""
        return "" if self.is_published else arrow(self.metric)


@dataclass(frozen=True)
class Table:
    """Columns and rows of ready words."""

    title: str
    columns: list[Column]
    rows: list[list[str]]
    sources: list[Row]


def result_tables(rows: Sequence[Row]) -> list[Table]:
    """One table a section; the published number in the column after the measured one."""
    sections = list(dict.fromkeys(row.section for row in rows))
    return [_table(section, [row for row in rows if row.section == section]) for section in sections]


def _table(title: str, rows: list[Row]) -> Table:
    columns = [Column("run", is_number=False)]
    details = {row.detail for row in rows}
    if details != {""} and not (title.startswith(GENERATION) and len(details) == 1):
        columns.append(Column("of", is_number=False))
    if any(row.weights not in ("", MAIN) for row in rows):
        columns.append(Column("weights", is_number=False))
    columns += [Column("labels", is_number=False)] if any(row.labels for row in rows) else []
    columns += [Column("guidance", is_number=False)] if any(row.guidance for row in rows) else []
    columns += [Column("reference", is_number=False)] if any(row.reference for row in rows) else []
    columns += [Column("images")]
    for metric in sorted({metric for row in rows for metric in row.cells}, key=metric_order):
        columns.append(Column(column_title(metric, title), metric))
        if any(metric in row.cells and row.cells[metric].published is not None for row in rows):
            columns.append(Column(PUBLISHED, metric, is_published=True))
    has_published = any(column.is_published for column in columns)
    columns += [Column("published row", is_number=False)] if has_published else []
    return Table(title, columns, [[_word(row, column) for column in columns] for row in rows], rows)


def column_title(metric: str, table: str) -> str:
    """Without what the table's title says already."""
    extractor = table.partition(OTHER_FEATURES)[2]
    return short_name(metric).removesuffix(f"-{extractor}" if extractor else "")


def _word(row: Row, column: Column) -> str:
    if column.metric:
        return cell_word(column.metric, row.cells.get(column.metric), column.is_published)
    if column.title == "published row":
        compared = any(cell.published is not None for cell in row.cells.values())
        return row.published.id if compared else NOTHING
    words = {"run": row.run, "of": row.detail, "weights": row.weights, "labels": row.labels}
    words |= {"guidance": row.guidance}
    return (words | {"reference": row.reference, "images": f"{row.images:,}"})[column.title] or NOTHING


def cell_word(metric: str, cell: Cell | None, is_published: bool) -> str:
    """A figure with the usual digits of its metric; the published one as it was published."""
    if cell is None or (is_published and cell.published is None):
        return NOTHING
    if is_published:
        return published_word(metric, cell.published)
    word = number_word(metric, cell.value)
    return word if cell.std is None else f"{word} ± {number_word(metric, cell.std)}"


def published_word(metric: str, value: float) -> str:
    """As it was published: ``0.6 → 0.60`` for a precision, ``120.41`` as it stands."""
    digits = PUBLISHED_DIGITS.get(short_name(metric).partition("-")[0], 2)
    return max(f"{value:.{digits}f}", f"{value:g}", key=len)


def number_word(metric: str, value: float) -> str:
    """``2.876 → 2.88`` for an FID; 4 significant digits by default."""
    if not math.isfinite(value):
        return "not finite"
    family = short_name(metric)
    digits = DIGITS.get(family, DIGITS.get(family.partition("-")[0]))
    if family.startswith(("F1", "mAP", "top", "LPIPS")):
        digits = 4
    return f"{value:.4g}" if digits is None else f"{value:.{digits}f}"


def arrow(metric: str) -> str:
    """Which way is better, if known."""
    family = short_name(metric).partition("-")[0]
    if family.startswith(HIGHER_IS_BETTER):
        return "↑"
    return "↓" if family in LOWER_IS_BETTER else ""


def as_text(tables: Iterable[Table]) -> str:
    """Aligned columns for a terminal, numbers to the right."""
    return "\n\n".join(f"{table.title}\n{aligned(table.columns, table.rows)}" for table in tables)


def aligned(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> str:
    """Words in columns, a rule below the titles."""
    titles, rows = _titles(columns), [[printable(word) for word in words] for words in rows]
    widths = [max(_width(words[i]) for words in [titles, *rows]) for i in range(len(columns))]
    lines = []
    for words in [titles, ["─" * width for width in widths], *rows]:
        padded = [
            _pad(word, width, column.is_number) for word, width, column in zip(words, widths, columns, strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def as_markdown(tables: Iterable[Table]) -> str:
    """GitHub's tables."""
    return "\n\n".join(f"### {table.title}\n\n{markdown_table(table.columns, table.rows)}" for table in tables)


def markdown_table(columns: Sequence[Column], rows: Iterable[Sequence[str]]) -> str:
    """One table."""
    lines = [_markdown_line(_titles(columns)), _markdown_line(["---:" if c.is_number else "---" for c in columns])]
    return "\n".join(lines + [_markdown_line(words) for words in rows])


def as_csv(rows: Iterable[Row]) -> str:
    """One line for each figure."""
    found = records(rows)
    if not found:
        return ""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(found[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return buffer.getvalue().rstrip("\n")


def as_json(rows: Iterable[Row], correlations: Sequence[dict], remarks: Sequence[str]) -> str:
    """Everything, one record for each figure; what is not finite becomes null."""
    results = [
        {key: value if not isinstance(value, float) or math.isfinite(value) else None for key, value in record.items()}
        for record in records(rows)
    ]
    content = {"results": results, "correlations": list(correlations), "notes": list(remarks)}
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)


def _titles(columns: Iterable[Column]) -> list[str]:
    return [f"{column.title} {column.arrow}".strip() for column in columns]


def _markdown_line(words: Iterable[str]) -> str:
    return "| " + " | ".join(printable(word).replace("|", "\\|") for word in words) + " |"


def printable(word: str) -> str:
    """Without characters that control a terminal or break an XML file."""
    return "".join(c if c.isprintable() else " " for c in word)


def _width(word: str) -> int:
    """Columns of a terminal that a word takes."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 0 if unicodedata.combining(c) else 1 for c in word)


def _pad(word: str, width: int, is_number: bool) -> str:
    space = " " * (width - _width(word))
    return space + word if is_number else word + space
