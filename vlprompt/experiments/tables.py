"""Result tables for people: Markdown, CSV and LaTeX. Fractions come in, percent goes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from vlprompt.core.csv_text import csv_text
from vlprompt.core.files import write_text
from vlprompt.experiments.statistics import Summary
from vlprompt.metrics.classification import METRICS

__all__ = [
    "Row",
    "Table",
    "is_fraction",
    "percent",
    "to_csv",
    "to_latex",
    "to_markdown",
    "write_tables",
    "written",
]

_MASK_METRICS = ("dice", "iou", "miou")
_LOWEST_IS_BEST = ("forgetting",)  # last words of columns
_LATEX = {c: f"\\{c}" for c in "&%$#_{}"} | {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        method: Name in the first column.
        values: Column name to a fraction, or to a :class:`Summary` of fractions over seeds.
        source: ``"measured"`` here, or ``"published"`` by somebody.
        citation: Where a published number comes from.
    """

    method: str
    values: dict[str, float | Summary] = field(default_factory=dict)
    source: Literal["measured", "published"] = "measured"
    citation: str = ""


@dataclass(frozen=True)
class Table:
    """A table of results.

    Attributes:
        rows: In order.
        columns: In order; empty for all that occur.
        title: What stands above it.
        note: What stands below it: what was measured and how.
        best: Whether the best measured value of a column is bold: the highest, of forgetting the lowest.
        formats: Columns that hold no fractions (pixels, losses, counts), and how their numbers are written (``".1f"``).
    """

    rows: list[Row]
    columns: list[str] = field(default_factory=list)
    title: str = ""
    note: str = ""
    best: bool = True
    formats: Mapping[str, str] = field(default_factory=dict)

    def markdown(self) -> str:
        """Return the table as Markdown, the title above and the note below."""
        title = f"{self.title}:\n\n" if self.title else ""
        note = f"\n{self.note}\n" if self.note else ""
        return f"{title}{to_markdown(self.rows, self.columns or None, self.best, self.formats)}{note}"

    def csv(self) -> str:
        """Return the table as CSV with full precision, without title and note."""
        return to_csv(self.rows, self.columns or None, self.formats)

    def latex(self) -> str:
        """Return the table as LaTeX, title and note as comments."""
        comments = "".join(f"% {text}\n" for text in (self.title, self.note) if text)
        return f"{comments}{to_latex(self.rows, self.columns or None, self.best, self.formats)}"


def write_tables(folder: Path, tables: Sequence[Table]) -> list[Path]:
    """Write ``table.md`` with all tables, and ``table.csv`` and ``table.tex`` of each; return the paths.

    Of several tables the second and later ones have a number in their names: ``table-2.csv``.
    """
    write_text(folder / "table.md", "\n".join(table.markdown() for table in tables))
    paths = [folder / "table.md"]

    for number, table in enumerate(tables, 1):
        suffix = "" if number == 1 else f"-{number}"
        for text, ending in ((table.csv(), "csv"), (table.latex(), "tex")):
            paths.append(folder / f"table{suffix}.{ending}")
            write_text(paths[-1], text)

    return paths


def percent(value: float | Summary | None, plus_minus: str = "±") -> str:
    """Write a fraction as percent with one decimal, its 95 % interval behind it if there is one."""
    if value is None:
        return ""
    if isinstance(value, Summary):
        half = "" if value.ci95 is None else f" {plus_minus} {100 * value.ci95:.1f}"
        return f"{percent(value.mean)}{half}"
    return f"{round(100 * value, 1) + 0.0:.1f}"  # nobody reads -0.0


def written(value: float | Summary | None, number_format: str | None = None, plus_minus: str = "±") -> str:
    """Write a value of a table.

    Args:
        value: A number, or one with an interval; None for an empty text.
        number_format: How a number that is no fraction is written; None for a fraction, in percent.
        plus_minus: What stands before the interval.
    """
    if value is None or number_format is None:
        return percent(value, plus_minus)
    if isinstance(value, Summary) and value.ci95 is not None:
        return f"{value.mean:{number_format}} {plus_minus} {value.ci95:{number_format}}"
    return f"{_mean(value):{number_format}}"


def to_markdown(
    rows: Sequence[Row],
    columns: Sequence[str] | None = None,
    best: bool = True,
    formats: Mapping[str, str] | None = None,
) -> str:
    """Return a Markdown table in percent; a column's best measured value is bold, published rows carry †.

    Args:
        rows: Lines in the order given.
        columns: Columns in order; all that occur by default.
        best: Whether to set the best measured value in bold; see :class:`Table`.
        formats: See :class:`Table`.
    """
    columns = columns or _columns(rows)
    formats = formats or {}
    lines = ["| " + " | ".join(["method (%)", *map(_markdown, columns)]) + " |"]
    lines.append("|---|" + "---:|" * len(columns))

    for row in rows:
        cells = [written(row.values.get(c), formats.get(c)) for c in columns]
        if best:
            cells = [
                f"**{t}**" if t and c not in formats and _is_best(row, c, rows) else t
                for c, t in zip(columns, cells, strict=True)
            ]

        mark = " †" if row.source == "published" else ""
        lines.append("| " + " | ".join([_markdown(row.method) + mark, *cells]) + " |")

    note = _note(rows)
    return "\n".join([*lines, *(["", f"† {note}"] if note else [])]) + "\n"


def to_csv(
    rows: Sequence[Row], columns: Sequence[str] | None = None, formats: Mapping[str, str] | None = None
) -> str:
    """Return CSV in percent, at full precision: mean and ``_ci95`` of every column, source of every row.

    Columns of ``formats`` hold no fractions, and stay as they are.
    """
    columns = columns or _columns(rows)
    formats = formats or {}
    header = ["method", "source", "citation", *(f"{c}{s}" for c in columns for s in ("", "_ci95"))]
    lines = []

    for row in rows:
        numbers: list[object] = []
        for column in columns:
            value = row.values.get(column)
            factor = 1 if column in formats else 100
            mean, half = (value.mean, value.ci95) if isinstance(value, Summary) else (value, None)
            numbers += ["" if x is None else round(factor * x, 6) for x in (mean, half)]
        lines.append([row.method, row.source, row.citation, *numbers])

    return csv_text(header, lines)


def to_latex(
    rows: Sequence[Row],
    columns: Sequence[str] | None = None,
    best: bool = True,
    formats: Mapping[str, str] | None = None,
) -> str:
    """Return a LaTeX tabular (package booktabs) in percent, marked like the Markdown table."""
    columns = columns or _columns(rows)
    formats = formats or {}
    lines = [rf"\begin{{tabular}}{{l{'r' * len(columns)}}}", r"\toprule"]
    lines += [" & ".join([r"method (\%)", *map(_latex, columns)]) + r" \\", r"\midrule"]

    for row in rows:
        cells = [written(row.values.get(c), formats.get(c), r"$\pm$") for c in columns]
        if best:
            cells = [
                rf"\textbf{{{t}}}" if t and c not in formats and _is_best(row, c, rows) else t
                for c, t in zip(columns, cells, strict=True)
            ]

        mark = r"$^\dagger$" if row.source == "published" else ""
        lines.append(" & ".join([_latex(row.method) + mark, *cells]) + r" \\")

    note = _note(rows)
    end = [r"\bottomrule", r"\end{tabular}", *([rf"\\ $^\dagger$ {_latex(note)}"] if note else [])]
    return "\n".join([*lines, *end]) + "\n"


def is_fraction(key: str) -> bool:
    """Tell whether a flat metrics key, for example ``"shots4/accuracy_std"``, holds a fraction in [0, 1]."""
    stem = key.rsplit("/", 1)[-1].removesuffix("_std").removesuffix("_ci95").removesuffix("_gain")
    fractions = {*METRICS, *_MASK_METRICS, "score", "harmonic_mean"} - {"nll", "brier"}
    return any(stem == name or stem.endswith(f"_{name}") for name in fractions)


def _columns(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(column for row in rows for column in row.values))


def _mean(value: float | Summary) -> float:
    return value.mean if isinstance(value, Summary) else value


def _is_best(row: Row, column: str, rows: Sequence[Row]) -> bool:
    measured = [_mean(r.values[column]) for r in rows if r.source == "measured" and column in r.values]
    best = min if column.rpartition(" ")[2] in _LOWEST_IS_BEST else max
    return row.source == "measured" and len(measured) > 1 and _mean(row.values[column]) == best(measured)


def _note(rows: Sequence[Row]) -> str:
    published = [r for r in rows if r.source == "published"]
    cited = "; ".join(dict.fromkeys(r.citation for r in published if r.citation))
    return (
        f"published{f' ({cited})' if cited else ''}; all other rows are measured with this code."
        if published
        else ""
    )


def _markdown(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")


def _latex(text: str) -> str:
    return "".join(_LATEX.get(c, r"\textbackslash{}" if c == "\\" else c) for c in text)
