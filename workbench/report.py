"""Render finished runs of any package as one self-contained HTML page.

    python -m workbench.report runs/tour/* --out runs/tour/report.html --title "The tour"
    python -m workbench.report runs/mad/train-1a2b3c4d

The page needs no script and no network: figures are inline SVG that follows the reader's light or
dark setting, each with its table beneath it; it prints on A4. A folder without results.json is
searched for runs below. All text from runs is escaped, and figures are rebuilt from a list of
allowed SVG elements, so nothing in a run can put code into the page.
"""

from __future__ import annotations

import base64
import datetime
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal
from xml.etree import ElementTree
from xml.sax.saxutils import escape, quoteattr

import tyro

from workbench import storage
from workbench.errors import DataError
from workbench.plots import GRID, INK, PAPER
from workbench.tables import columns_of, format_value, is_numeric_column, read_csv

TEMPLATE = "report_template.html.j2"
MAX_ROWS = 40
"""Rows of a table shown in the page; the rest is in the CSV."""
MAX_SVG_BYTES = 5_000_000
"""A larger file is not even read."""
MAX_MARKUP_BYTES = 150_000
"""A drawing that stays larger than this is embedded as its PNG if that is smaller."""
MAX_PNG_BYTES = 2_000_000
BESIDE_COLUMNS, BESIDE_ROWS = 5, 18
"""Size up to which the first table stands beside a single figure."""
WIDE = 2.1
"""Width over height from which a figure takes the whole width of the page."""
SEARCH_DEPTH = 4
HEADLINES = 3
"""The first so many numbers of a run's results stand on its card."""
_MINOR = re.compile(
    r"seconds|(^|_)(n|low|high|seed|steps?|epochs?|iterations?|parameters|width|chance|ceiling)(_|$)"
)
"""Results that are settings, counts or ends of intervals: no headline while there are others."""

_COLOURS = {INK: "var(--ink)", GRID: "var(--grid)", PAPER: "var(--figure)"}
_DRAWING = ("path", "rect", "circle", "ellipse", "line", "polyline", "polygon", "image", "use")
_ELEMENTS = frozenset((*_DRAWING, "svg", "g", "defs", "clipPath", "pattern", "text", "tspan"))
_SAFE_REFERENCE = re.compile(r"#[\w.-]+|data:image/png;base64,[A-Za-z0-9+/=\s]+")


@dataclass(frozen=True)
class Table:
    """One table, ready to be shown."""

    caption: str
    columns: list[str]
    numeric: list[bool]
    rows: list[list[str]]
    more: int
    file: str


@dataclass(frozen=True)
class Figure:
    """One figure: safe SVG markup or a PNG as data, and the table behind it."""

    caption: str
    alt: str
    markup: str
    table: Table | None
    wide: bool
    """Much wider than high: takes the whole width of the page."""


@dataclass(frozen=True)
class Section:
    """Everything the page says about one run."""

    anchor: str
    package: str
    script: str
    title: str
    question: str
    summary: str
    headlines: list[tuple[str, str]]
    figures: list[Figure]
    tables: list[Table]
    values: list[tuple[str, str]]
    command: str
    seconds: float
    hardware: str
    commit: str
    folder: str
    beside: bool
    """One figure and a narrow table: shown side by side where there is room."""
    environment: dict[str, Any] = field(default_factory=dict)


# ---------------------------------------------------------------- finding runs


def find_runs(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """(finished, unfinished) run folders at or below `paths`, in the order given, then by name.

    Raises:
        DataError: a path does not exist, or there is no run at all.
    """
    finished: dict[Path, None] = {}
    unfinished: dict[Path, None] = {}
    for path in paths:
        if not path.exists():
            raise DataError(f"{path}: no such run folder")
        for folder in _run_folders(path, SEARCH_DEPTH) if path.is_dir() else ():
            (finished if (folder / "results.json").is_file() else unfinished)[folder] = None
    if not finished:
        searched = ", ".join(str(p) for p in paths[:3])
        raise DataError(
            f"no finished run at or below {searched}: no results.json; "
            f"{len(unfinished)} unfinished (run their command again to continue them)"
        )
    return list(finished), list(unfinished)


def _run_folders(path: Path, depth: int) -> Iterator[Path]:
    if (path / "results.json").is_file() or (path / "config.yaml").is_file():
        yield path
    elif depth:
        for child in sorted(path.iterdir()):
            hidden = child.name.startswith(".") or ".old" in child.name
            if child.is_dir() and not child.is_symlink() and not hidden:
                yield from _run_folders(child, depth - 1)


# ---------------------------------------------------------------- reading one run


def read_section(folder: Path, number: int) -> Section:
    """The record of one finished run, its tables and its figures."""
    record = storage.read_json(folder / "results.json")
    if not isinstance(record, dict) or not isinstance(record.get("values"), dict):
        raise DataError(f"{folder / 'results.json'}: no record of a finished run")
    file = folder / "environment.json"
    environment = storage.read_json(file) if file.is_file() else {}
    numbers = [
        (label_of(key), format_value(value))
        for key, value in record["values"].items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    ]
    figures = [_figure(folder, f"r{number}f{i}", f) for i, f in _entries(record, "figures")]
    tables = [
        read_table(_inside(folder, "tables", f, ".csv"), str(f.get("caption", "")))
        for _, f in _entries(record, "tables")
    ]
    return Section(
        anchor=f"run-{number}",
        package=str(record.get("package", "")),
        script=str(record.get("script", "")),
        title=str(record.get("title") or folder.name),
        question=str(record.get("question", "")),
        summary=str(record.get("summary", "")),
        headlines=headlines_of(record.get("headline") or record["values"]),
        figures=figures,
        tables=tables,
        beside=len(figures) == 1
        and not figures[0].wide
        and bool(tables)
        and len(tables[0].columns) <= BESIDE_COLUMNS
        and len(tables[0].rows) <= BESIDE_ROWS,
        values=numbers,
        command=str(record.get("command", "")),
        seconds=float(record.get("seconds") or 0.0),
        hardware=hardware_line(environment),
        commit=str(environment.get("commit") or "")[:10],
        folder=folder.as_posix(),
        environment=environment,
    )


def headlines_of(values: dict[str, Any]) -> list[tuple[str, str]]:
    """The first three results that are no settings, counts or interval ends, in their own order."""
    numbers = {
        key: value
        for key, value in values.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
    major = [key for key in numbers if not _MINOR.search(key)] or list(numbers)
    return [(label_of(key), format_value(numbers[key], 3)) for key in major[:HEADLINES]]


def _entries(record: dict[str, Any], key: str) -> list[tuple[int, dict[str, Any]]]:
    return [(i, e) for i, e in enumerate(record.get(key) or [], 1) if isinstance(e, dict)]


def _inside(folder: Path, kind: str, entry: dict[str, Any], ending: str) -> Path:
    """The file of a figure or table, never outside the run's folder."""
    name = str(entry.get("name", ""))
    if not re.fullmatch(r"[\w][\w .-]{0,120}", name) or ".." in name:
        raise DataError(f"{folder / 'results.json'}: {kind} name {name!r} is no file name")
    return folder / kind / f"{name}{ending}"


def label_of(key: str) -> str:
    """A key of the results as words: `bits_per_weight` → `bits per weight`."""
    return key.replace("_", " ").replace("/", " · ").strip()


def hardware_line(environment: dict[str, Any]) -> str:
    """One line: machine, cores or device, Python and torch."""
    packages = environment.get("packages") or {}
    parts = [str(environment.get("device") or environment.get("processor") or "")]
    if environment.get("cores"):
        parts.append(f"{environment['cores']} cores")
    if environment.get("python"):
        parts.append(f"Python {environment['python']}")
    if packages.get("torch"):
        parts.append(f"torch {packages['torch']}")
    return ", ".join(part for part in parts if part)


def read_table(path: Path, caption: str) -> Table:
    """A CSV as the page shows it; a missing one is said so in its caption."""
    if not path.is_file():
        return Table(f"{caption} (missing: {path.name})", [], [], [], 0, path.name)
    rows = read_csv(path)
    columns = columns_of(rows)
    shown = [[format_value(row.get(name)) for name in columns] for row in rows[:MAX_ROWS]]
    return Table(
        caption,
        [label_of(name) for name in columns],
        [is_numeric_column(rows, name) for name in columns],
        shown,
        max(0, len(rows) - MAX_ROWS),
        path.name,
    )


# ---------------------------------------------------------------- figures


def _figure(folder: Path, prefix: str, entry: dict[str, Any]) -> Figure:
    svg = _inside(folder, "figures", entry, ".svg")
    caption, alt = str(entry.get("caption", "")), str(entry.get("alt", ""))
    table = svg.with_suffix(".csv")
    markup = _markup(svg, prefix, caption, alt)
    box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', markup)
    return Figure(
        caption=caption,
        alt=alt,
        markup=markup,
        wide=bool(box and float(box[1]) > WIDE * float(box[2])),
        table=read_table(table, f"The numbers behind the figure: {caption}")
        if table.is_file()
        else None,
    )


def _markup(svg: Path, prefix: str, caption: str, alt: str) -> str:
    png = svg.with_suffix(".png")
    drawing = ""
    if svg.is_file() and svg.stat().st_size <= MAX_SVG_BYTES:
        drawing = safe_svg(svg.read_text(encoding="utf-8"), prefix, caption, alt, svg)
    if drawing and len(drawing) <= MAX_MARKUP_BYTES:
        return drawing
    size = png.stat().st_size * 4 // 3 if png.is_file() else MAX_PNG_BYTES
    if size < (len(drawing) or MAX_PNG_BYTES):
        data = base64.b64encode(png.read_bytes()).decode("ascii")
        return f'<img alt={quoteattr(alt or caption)} src="data:image/png;base64,{data}">'
    return drawing or f"<p>The drawing {escape(svg.name)} is missing or too large to embed.</p>"


def safe_svg(text: str, prefix: str, title: str, description: str, where: Path | str = "") -> str:
    """SVG for use inside HTML: allowed elements only, own ids, named, in the page's colours.

    Raises:
        DataError: not an SVG, or it declares entities.
    """
    if "<!ENTITY" in text:
        raise DataError(f"{where}: an SVG that declares entities is refused")
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise DataError(f"{where}: damaged SVG ({error}); run the script again") from None
    if _local(root.tag) != "svg":
        raise DataError(f"{where}: found <{_local(root.tag)}>, expected <svg>")
    width, height = _size(root)
    body = "".join(_write(child, prefix) for child in root)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img" '
        f'aria-labelledby="{prefix}-t {prefix}-d" style="max-width:{width * 4 / 3:.0f}px">'
        f'<title id="{prefix}-t">{escape(title or "Figure")}</title>'
        f'<desc id="{prefix}-d">{escape(description)}</desc>{body}</svg>'
    )


def _local(tag: Any) -> str:
    return str(tag).rpartition("}")[2]


def _size(root: ElementTree.Element) -> tuple[float, float]:
    numbers = re.findall(r"-?\d+\.?\d*", root.get("viewBox", ""))
    if len(numbers) == 4 and float(numbers[2]) > 0 and float(numbers[3]) > 0:
        return float(numbers[2]), float(numbers[3])
    return 460.0, 288.0


def _write(element: ElementTree.Element, prefix: str) -> str:
    name = _local(element.tag)
    if name not in _ELEMENTS or not isinstance(element.tag, str):
        return ""
    attributes = []
    for raw, value in element.attrib.items():
        key = _local(raw)
        if key.lower().startswith("on") or key in ("base", "space"):
            continue
        if key == "href":
            if not _SAFE_REFERENCE.fullmatch(value):
                continue
            value = f"#{prefix}-{value[1:]}" if value.startswith("#") else value
        elif key == "id":
            value = f"{prefix}-{value}"
        elif key in ("d", "points", "x", "y", "width", "height"):
            value = re.sub(r"(\.\d\d)\d+", r"\1", value)  # hundredths of a point suffice
        else:
            value = _safe_style(value, prefix)
        attributes.append(f" {key}={quoteattr(value)}")
    children = "".join(_write(child, prefix) + _text(child.tail) for child in element)
    inside = _text(element.text) + children
    if name == "g" and not inside:
        return ""
    return (
        f"<{name}{''.join(attributes)}>{inside}</{name}>"
        if inside
        else (f"<{name}{''.join(attributes)}/>")
    )


def _text(text: str | None) -> str:
    return escape(text) if text and text.strip() else ""


def _safe_style(value: str, prefix: str) -> str:
    """A style or attribute value: local references only, house colours as variables."""
    value = re.sub(r"url\(\s*['\"]?#([\w.-]+)['\"]?\s*\)", rf"url(#{prefix}-\1)", value)
    if re.search(r"url\((?!#)|expression|javascript:|@import", value, re.IGNORECASE):
        return ""
    for colour, variable in _COLOURS.items():
        value = re.sub(re.escape(colour), variable, value, flags=re.IGNORECASE)
    return re.sub(r"(font:[^;]*?px )'[^;]*", r"\1var(--sans)", value)


# ---------------------------------------------------------------- the page


@dataclass(frozen=True)
class Card:
    """One package on the overview: its main run, and links to its others."""

    package: str
    main: Section
    others: list[Section]


def split_parts(sections: Sequence[Section]) -> tuple[list[Section], dict[str, list[Section]]]:
    """(own runs, parts by anchor): a run started by another script is a part of that one's run.

    `python -m mad.compare` makes a run of mad.train per layer; the page shows these as lines of a
    table below the comparison. Without the other run in the page, they stay runs of their own.
    """
    parts: dict[str, list[Section]] = {}
    own = []
    for section in sections:
        parent = next(
            (
                other
                for other in sections
                if other is not section
                and other.command == section.command
                and _started(section.command, other)
                and not _started(section.command, section)
            ),
            None,
        )
        if parent is None:
            own.append(section)
        else:
            parts.setdefault(parent.anchor, []).append(section)
    return own, parts


def _started(command: str, section: Section) -> bool:
    return f"-m {section.package}.{section.script} " in f"{command} "


def cards_of(sections: Sequence[Section]) -> list[Card]:
    """One card per package; its main run is the last one with a figure, else the last."""
    cards = []
    for package in dict.fromkeys(section.package for section in sections):
        members = [section for section in sections if section.package == package]
        main_run = next((s for s in reversed(members) if s.figures), members[-1])
        cards.append(Card(package, main_run, [s for s in members if s is not main_run]))
    return cards


def render(
    finished: Sequence[Path],
    unfinished: Sequence[Path] = (),
    *,
    title: str = "Fivefold",
    introduction: str = "",
    order: Literal["time", "given"] = "time",
) -> str:
    """The HTML page for the given run folders, in the order they were begun or were given in."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    sections = [read_section(folder, number) for number, folder in enumerate(finished, 1)]
    if order == "time":
        sections.sort(key=lambda section: str(section.environment.get("started", "")))
    sections, parts = split_parts(sections)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["duration"] = format_seconds
    started = sorted(str(s.environment.get("started", "")) for s in sections)
    return environment.get_template(TEMPLATE).render(
        title=title,
        introduction=introduction,
        sections=sections,
        parts=parts,
        cards=cards_of(sections),
        unfinished=[folder.as_posix() for folder in unfinished],
        total_seconds=sum(section.seconds for section in sections),
        packages=list(dict.fromkeys(section.package for section in sections)),
        hardware=list(dict.fromkeys(section.hardware for section in sections)),
        date=started[-1][:10] or datetime.datetime.now(datetime.UTC).date().isoformat(),
    )


def format_seconds(seconds: float) -> str:
    """Seconds as a reader says them: `8.2 s`, `3 min 5 s`, `2 h 10 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


@dataclass(frozen=True)
class Experiment:
    """Which runs go into the page, and where it is written."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Run folders, or folders that hold runs."""
    out: Path = Path("report.html")
    """The page to write."""
    title: str = "Fivefold"
    """Heading of the page."""
    introduction: Annotated[str, tyro.conf.arg(aliases=["--intro"])] = ""
    """A paragraph under the heading."""
    order: Literal["time", "given"] = "time"
    """Order of the runs: as they were begun, or as given."""
    traceback: bool = False
    """Show the full traceback of an error."""


EXPERIMENT = Experiment()


def main(experiment: Experiment) -> dict[str, Any]:
    """Writes the page; returns its path, size and number of runs."""
    if not experiment.runs:
        raise DataError("no runs given: python -m workbench.report runs/tour/* --out report.html")
    page = experiment.out.absolute()
    given = [path for path in experiment.runs if path.absolute() != page]
    finished, unfinished = find_runs(given)
    html = render(
        finished,
        unfinished,
        title=experiment.title,
        introduction=experiment.introduction,
        order=experiment.order,
    )
    storage.write_text(page, html)
    return {
        "report": str(experiment.out),
        "runs": len(finished),
        "unfinished": len(unfinished),
        "kilobytes": round(len(html.encode()) / 1000, 1),
    }


if __name__ == "__main__":
    from workbench.cli import cli

    cli(main, EXPERIMENT)
