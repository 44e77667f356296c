"""Write the tables of a Markdown file from the CSV files behind them, or check that they agree.

    python -m workbench.tables README.md
    python -m workbench.tables README.md --check

A table stands between two markers, with a path relative to the Markdown file:

    <!-- table: docs/results/tour.csv columns=method,perplexity digits=3 -->
    <!-- end table -->

As a library: rows (a list of dicts) to CSV and back, to Markdown, and beside published figures.
A CSV written here is inert: text that a spreadsheet would run as a formula is quoted.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from workbench import storage
from workbench.errors import ConfigError, DataError, GateFailed

Row = Mapping[str, Any]

FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")
"""Text that begins so is taken for a formula by spreadsheets."""
PUBLISHED_COLUMNS = ("table", "row", "column", "value", "unit", "source")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*([eE][+-]?\d+)?|\.\d+([eE][+-]?\d+)?|inf|nan)")
_INTEGER = re.compile(r"0|-?[1-9]\d*")
_MARKER = re.compile(
    r"(?P<open><!-- table: (?P<spec>[^>]*?) -->\n)(?P<body>.*?)(?P<close><!-- end table -->)",
    re.DOTALL,
)


def columns_of(rows: Sequence[Row]) -> list[str]:
    """All keys of all rows in the order of first appearance."""
    return list(dict.fromkeys(key for row in rows for key in row))


# ---------------------------------------------------------------- CSV


def _cell(value: Any) -> str:
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()  # a number of numpy or torch
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    text = value if isinstance(value, str) else _plain(value)
    text = text.replace("\0", "")
    return "'" + text if text.startswith((*FORMULA_STARTS, "'")) else text


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple, dict)):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)


def csv_text(rows: Sequence[Row], columns: Sequence[str] | None = None) -> str:
    """The rows as CSV text with a header line; a missing or None value is an empty cell."""
    names = list(columns or columns_of(rows))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([_cell(name) for name in names])
    writer.writerows([_cell(row.get(name)) for name in names] for row in rows)
    return out.getvalue()


def write_csv(path: Path | str, rows: Sequence[Row], columns: Sequence[str] | None = None) -> Path:
    """Writes rows as CSV, atomically; `read_csv` gives them back."""
    return storage.write_text(path, csv_text(rows, columns))


def _parse(text: str) -> Any:
    if text == "":
        return None
    if text in ("true", "false"):
        return text == "true"
    if _INTEGER.fullmatch(text) and len(text) < 300:
        return int(text)
    if _NUMBER.fullmatch(text) and not re.fullmatch(r"[+-]?0\d+", text):
        return float(text)
    return text[1:] if text[0] == "'" and text[1:2] in (*FORMULA_STARTS, "'") else text


def read_csv(path: Path | str) -> list[dict[str, Any]]:
    """The rows of a CSV file written by `write_csv`: numbers as numbers, empty cells as None.

    Raises:
        DataError: missing, not UTF-8, no header, or a row of another length (file:line).
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[dict[str, Any]] = []
    try:
        names = next(reader, [])
        names = [str(_parse(name) if name else "") for name in names]
        for cells in reader:
            if not cells and len(names) != 1:
                continue
            if len(cells) != len(names):
                if not cells:
                    cells = [""]
                else:
                    raise DataError(
                        f"{path}:{reader.line_num}: {len(cells)} cells, expected {len(names)}"
                    )
            rows.append({n: _parse(c) for n, c in zip(names, cells, strict=True)})
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: not CSV ({error})") from None
    return rows


# ---------------------------------------------------------------- Markdown


def format_value(value: Any, digits: int = 4) -> str:
    """A value for a reader: `digits` significant digits, thousands kept whole, None as a dash."""
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if not math.isfinite(value):
            return {math.inf: "∞", -math.inf: "-∞"}.get(value, "–")
        if value == 0:
            return "0"
        if abs(value) >= 10**digits:
            return f"{value:.0f}" if abs(value) < 1e7 else f"{value:.{digits - 1}e}"
        if abs(value) < 1e-3:
            return f"{value:.{min(digits, 3) - 1}e}"
        shown = f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"
        return shown.rstrip("0").rstrip(".") if "." in shown else shown
    return str(value)


def is_numeric_column(rows: Sequence[Row], name: str) -> bool:
    """Whether every value that is there is a number."""
    values = [row.get(name) for row in rows if row.get(name) is not None]
    return bool(values) and all(
        isinstance(v, (int, float)) and not isinstance(v, bool) for v in values
    )


def to_markdown(
    rows: Sequence[Row], columns: Sequence[str] | None = None, *, digits: int = 4
) -> str:
    """The rows as a Markdown table; numbers to the right, `|` and line ends escaped."""
    names = list(columns or columns_of(rows))
    if not names:
        return "(no rows)"

    def line(cells: Sequence[str]) -> str:
        safe = (c.replace("\\", "\\\\").replace("|", "\\|") for c in cells)
        return "| " + " | ".join(" ".join(c.split()) for c in safe) + " |"

    rule = ["---:" if is_numeric_column(rows, name) else "---" for name in names]
    body = [line([format_value(row.get(name), digits) for name in names]) for row in rows]
    return "\n".join([line(names), "| " + " | ".join(rule) + " |", *body])


# ---------------------------------------------------------------- published | ours | ratio


def read_published(path: Path | str) -> list[dict[str, Any]]:
    """The rows of a package's published.csv, checked for its six columns and finite values."""
    rows = read_csv(path)
    for number, row in enumerate(rows, 2):
        missing = [name for name in PUBLISHED_COLUMNS if name not in row]
        if missing:
            raise DataError(
                f"{path}:1:{missing[0]}: missing column; expected {','.join(PUBLISHED_COLUMNS)}"
            )
        if not isinstance(row["value"], (int, float)) or isinstance(row["value"], bool):
            raise DataError(f"{path}:{number}:value: found {row['value']!r}, expected a number")
    if not rows:
        raise DataError(f"{path}: empty; expected at least one published figure")
    return rows


def beside_published(
    published: Sequence[Row], table: str, ours: Mapping[tuple[str, str], float]
) -> list[dict[str, Any]]:
    """Rows `row, column, unit, published, ours, ratio, source` of one published table.

    `ours` maps (row, column) to our figure; what we did not measure stays empty.
    """
    chosen = [row for row in published if str(row["table"]) == table]
    if not chosen:
        known = sorted({str(row["table"]) for row in published})
        raise ConfigError(f"no published table {table!r}; known: {', '.join(known)}")
    result = []
    for row in chosen:
        own = ours.get((str(row["row"]), str(row["column"])))
        value = float(row["value"])
        ratio = own / value if own is not None and value != 0 else None
        result.append(
            {
                "row": row["row"],
                "column": row["column"],
                "unit": row["unit"],
                "published": value,
                "ours": own,
                "ratio": ratio,
                "source": row["source"],
            }
        )
    return result


# ---------------------------------------------------------------- tables inside a Markdown file


def _rendered(match: re.Match[str], file: Path) -> str:
    words = match["spec"].split()
    if not words:
        raise DataError(f"{file}: a table marker without a path")
    options = dict(word.partition("=")[::2] for word in words[1:])
    unknown = sorted(set(options) - {"columns", "digits"})
    if unknown or not options.get("digits", "4").isdigit():
        raise DataError(
            f"{file}: table marker {match['spec']!r}: expected PATH [columns=a,b] [digits=4]"
        )
    rows = read_csv(file.parent / words[0])
    columns = options["columns"].split(",") if "columns" in options else None
    missing = [c for c in columns or [] if c not in columns_of(rows)]
    if missing:
        raise DataError(
            f"{file}: {words[0]} has no column {missing[0]!r}; found {', '.join(columns_of(rows))}"
        )
    body = to_markdown(rows, columns, digits=int(options.get("digits", "4")))
    return f"{match['open']}{body}\n{match['close']}"


def update_markdown(text: str, file: Path) -> tuple[str, int]:
    """`text` with every marked table drawn anew from its CSV, and the number of tables.

    Raises:
        DataError: a marker without its end, a missing CSV or column.
    """
    opened, found = text.count("<!-- table:"), len(_MARKER.findall(text))
    if opened != found:
        raise DataError(
            f"{file}: {opened} table markers, {found} of them closed by <!-- end table -->"
        )
    return _MARKER.sub(lambda match: _rendered(match, file), text), found


@dataclass(frozen=True)
class Experiment:
    """Which Markdown files, and whether to write or only to compare."""

    files: tyro.conf.Positional[tuple[Path, ...]] = (Path("README.md"),)
    """Markdown files with table markers."""
    check: bool = False
    """Change nothing; exit 3 if a table differs from its CSV."""
    traceback: bool = False
    """Show the full traceback of an error."""


EXPERIMENT = Experiment()


def main(experiment: Experiment) -> dict[str, Any]:
    """Writes or checks the tables of each file; returns their number and the stale files."""
    stale, tables = [], 0
    for file in experiment.files:
        if not file.is_file():
            raise DataError(f"{file}: no such file")
        old = file.read_text(encoding="utf-8")
        new, found = update_markdown(old, file)
        tables += found
        if new != old:
            stale.append(str(file))
            if not experiment.check:
                storage.write_text(file, new)
    if experiment.check and stale:
        raise GateFailed(
            f"tables differ from their CSV in {', '.join(stale)}; "
            f"run python -m workbench.tables {' '.join(stale)}"
        )
    return {"tables": tables, "changed": len(stale)}


if __name__ == "__main__":
    from workbench.cli import cli

    cli(main, EXPERIMENT)
