"""One plain figure style for all packages, readable without colour, made without global state.

Figures are `matplotlib.figure.Figure` objects (never pyplot). Every series differs by colour *and*
marker *and* dash; intervals are drawn wherever they are given; the functions draw from the same
tidy rows (a list of dicts) that `Run.figure` writes as the CSV beside the figure.

    figure, axes = new_figure()
    line_plot(axes, rows, x="bits", y="perplexity", series="method", low="low", high="high",
              xlabel="bits per weight", ylabel="perplexity")
    run.figure("rate_distortion", figure, rows, caption="… n = 120 blocks", alt="…")
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from workbench.errors import DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]

INK = "#1f2430"
"""Text, axes, reference lines."""
GRID = "#d9dce3"
"""Grid lines."""
PAPER = "#ffffff"
"""Background."""
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8787ff", "#696978", "#965a3c")
"""Series colours: four of Okabe & Ito 2008 and three more. Each has a contrast of at least 3:1 on
white and on the report's dark ground, and any two differ by CIEDE2000 ≥ 10 in each dichromacy."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
"""Series markers, in the order of `PALETTE`."""
DASHES: tuple[Any, ...] = (
    "-",
    (0, (5, 1.5)),
    (0, (2, 1.2)),
    (0, (6, 1.5, 1.5, 1.5)),
    (0, (1, 1)),
    (0, (8, 2)),
    (0, (3, 1, 1, 1, 1, 1)),
)
"""Line styles, in the order of `PALETTE`."""
TEXT_POINTS = 9.0
SEQUENTIAL = "cividis"
"""Colour map of amounts (reads the same for colour-blind readers and in grey)."""
DIVERGING = "PuOr"
"""Colour map of differences around zero."""

STYLE: dict[str, Any] = {
    "font.size": TEXT_POINTS,
    "axes.titlesize": TEXT_POINTS + 1,
    "axes.labelsize": TEXT_POINTS,
    "xtick.labelsize": TEXT_POINTS - 0.5,
    "ytick.labelsize": TEXT_POINTS - 0.5,
    "legend.fontsize": TEXT_POINTS - 0.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.titlecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.facecolor": PAPER,
    "figure.facecolor": PAPER,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "axes.unicode_minus": True,
}


def new_figure(
    width: float = 6.4,
    height: float = 4.0,
    rows: int = 1,
    columns: int = 1,
    *,
    share_x: bool = False,
    share_y: bool = False,
) -> tuple[Figure, Any]:
    """A figure of `width` × `height` inches in the house style, and its axes.

    `axes` is one Axes for a single panel, else a numpy array as of `Figure.subplots`.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained", facecolor=PAPER)
        axes = figure.subplots(rows, columns, sharex=share_x, sharey=share_y)
        for one in np.atleast_1d(axes).flat:
            dress(one)
    return figure, axes


def dress(axes: Axes) -> None:
    """Gives axes the house style: two spines, a light grid behind the data, 9-point text."""
    axes.set_facecolor(PAPER)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(INK)
        axes.spines[side].set_linewidth(0.8)
    axes.tick_params(labelsize=TEXT_POINTS - 0.5, color=INK, labelcolor=INK, width=0.8)
    axes.grid(True, color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)


def _label(axes: Axes, xlabel: str, ylabel: str, title: str) -> None:
    for setter, text in ((axes.set_xlabel, xlabel), (axes.set_ylabel, ylabel)):
        if text:
            setter(text, fontsize=TEXT_POINTS, color=INK)
    if title:
        axes.set_title(title, fontsize=TEXT_POINTS + 1, color=INK, loc="left")


def _legend(axes: Axes, names: Sequence[Any], **options: Any) -> None:
    if len(names) > 1:
        axes.legend(fontsize=TEXT_POINTS - 0.5, labelcolor=INK, frameon=False, **options)


def groups_of(rows: Sequence[Row], series: str | None) -> dict[str, list[Row]]:
    """Rows by the value of column `series`, in the order of first appearance."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(str(row[series]) if series else "", []).append(row)
    return groups


def _column(rows: Sequence[Row], name: str, where: str) -> np.ndarray:
    values = []
    for row in rows:
        if name not in row:
            raise DataError(f"{where}: no column {name!r}; found {', '.join(map(str, row))}")
        value = row[name]
        values.append(math.nan if value is None or value == "" else float(value))
    return np.asarray(values, dtype=float)


def line_plot(
    axes: Axes,
    rows: Sequence[Row],
    *,
    x: str,
    y: str,
    series: str | None = None,
    low: str | None = None,
    high: str | None = None,
    xlabel: str = "",
    ylabel: str = "",
    title: str = "",
    log: str = "",
    reference: Mapping[str, float] | None = None,
) -> None:
    """One line per value of `series`, sorted by `x`, with the band from `low` to `high`.

    `log` is "", "x", "y" or "xy"; `reference` draws named horizontal lines (a baseline, a floor).
    """
    if not rows:
        raise DataError("line_plot: no rows to draw")
    groups = groups_of(rows, series)
    for index, (name, members) in enumerate(groups.items()):
        xs, ys = _column(members, x, "line_plot"), _column(members, y, "line_plot")
        order = np.argsort(xs, kind="stable")
        colour = PALETTE[index % len(PALETTE)]
        axes.plot(
            xs[order],
            ys[order],
            color=colour,
            linestyle=DASHES[index % len(DASHES)],
            marker=MARKERS[index % len(MARKERS)] if len(xs) <= 60 else None,
            markersize=4.5,
            linewidth=1.6,
            label=name,
        )
        if low and high:
            bottom, top = _column(members, low, "line_plot"), _column(members, high, "line_plot")
            axes.fill_between(
                xs[order], bottom[order], top[order], color=colour, alpha=0.18, linewidth=0
            )
    for name, value in (reference or {}).items():
        axes.axhline(value, color=INK, linewidth=0.9, linestyle=(0, (1, 2)))
        axes.annotate(
            name,
            (0.0, value),
            xycoords=("axes fraction", "data"),
            xytext=(4, 2),
            textcoords="offset points",
            ha="left",
            va="bottom",
            fontsize=TEXT_POINTS - 1,
            color=INK,
            bbox={"facecolor": PAPER, "edgecolor": "none", "alpha": 0.75, "pad": 0.6},
        )
    for axis, letter in ((axes.xaxis, "x"), (axes.yaxis, "y")):
        if letter in log:
            _plain_log(axes, axis, letter)
    _label(axes, xlabel or x, ylabel or y, title)
    _legend(axes, list(groups))


def _plain_log(axes: Axes, axis: Any, letter: str) -> None:
    """A logarithmic axis with plain numbers, also between the powers of ten on short ranges."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    getattr(axes, f"set_{letter}scale")("log")
    low, high = axis.get_view_interval()
    decades = math.log10(high / low) if low > 0 else 3.0
    marks = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if decades < 1 else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(subs=marks if decades < 3 else (1.0,)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def bar_plot(
    axes: Axes,
    rows: Sequence[Row],
    *,
    label: str,
    value: str,
    low: str | None = None,
    high: str | None = None,
    series: str | None = None,
    xlabel: str = "",
    title: str = "",
    digits: int = 3,
    reference: Mapping[str, float] | None = None,
) -> None:
    """Horizontal bars from zero, one per `label` (side by side per `series`), value at the end.

    The interval from `low` to `high` is drawn as a whisker. First row on top.
    """
    if not rows:
        raise DataError("bar_plot: no rows to draw")
    groups = groups_of(rows, series)
    labels = list(dict.fromkeys(str(row[label]) for row in rows))
    thickness = 0.78 / len(groups)
    hatches = ("", "//", "..", "xx", "\\\\", "oo", "++")
    for index, (name, members) in enumerate(groups.items()):
        places = [
            labels.index(str(row[label])) + (index - (len(groups) - 1) / 2) * thickness
            for row in members
        ]
        values = _column(members, value, "bar_plot")
        axes.barh(
            places,
            values,
            height=thickness * 0.92,
            color=PALETTE[index % len(PALETTE)],
            hatch=hatches[index % len(hatches)],
            edgecolor=PAPER,
            linewidth=0,
            label=name,
        )
        ends = values
        if low and high:
            bottom, top = _column(members, low, "bar_plot"), _column(members, high, "bar_plot")
            axes.errorbar(
                values,
                places,
                xerr=np.abs(np.stack([values - bottom, top - values])),
                fmt="none",
                ecolor=INK,
                elinewidth=1.0,
                capsize=2.5,
            )
            ends = np.fmax(values, top)
        for place, number, end in zip(places, values, ends, strict=True):
            if math.isfinite(number):
                axes.annotate(
                    f"{number:.{digits}g}",
                    (end, place),
                    xytext=(4, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=TEXT_POINTS - 1,
                    color=INK,
                )
    for name, number in (reference or {}).items():
        axes.axvline(number, color=INK, linewidth=0.9, linestyle=(0, (1, 2)))
        axes.annotate(
            name,
            (number, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=TEXT_POINTS - 1,
            color=INK,
        )
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.grid(False, axis="y")
    axes.margins(x=0.12)
    left, right = axes.get_xlim()
    axes.set_xlim(min(0.0, left), max(0.0, right))
    _label(axes, xlabel or value, "", title)
    # beneath the axis, where no bar and no number of a bar can lie
    inches = axes.get_position().height * axes.get_figure(root=True).get_figheight()
    below = -min(0.16, 0.45 / inches)
    _legend(axes, list(groups), loc="upper center", bbox_to_anchor=(0.5, below), ncols=len(groups))


def heat_map(
    axes: Axes,
    rows: Sequence[Row],
    *,
    x: str,
    y: str,
    value: str,
    xlabel: str = "",
    ylabel: str = "",
    title: str = "",
    digits: int = 2,
    low: float | None = None,
    high: float | None = None,
    diverging: bool = False,
) -> None:
    """A grid of cells, columns by `x`, rows by `y`, each with its number; missing cells are blank.

    The numbers carry the information, the colour (cividis, or PuOr around zero) only guides.
    """
    if not rows:
        raise DataError("heat_map: no rows to draw")
    across = list(dict.fromkeys(str(row[x]) for row in rows))
    down = list(dict.fromkeys(str(row[y]) for row in rows))
    grid = np.full((len(down), len(across)), np.nan)
    for row, number in zip(rows, _column(rows, value, "heat_map"), strict=True):
        grid[down.index(str(row[y])), across.index(str(row[x]))] = number
    bottom, top = _limits(grid, low, high, diverging)
    _draw_cells(axes, grid, bottom, top, diverging)
    if grid.size <= 400:
        for (i, j), number in np.ndenumerate(grid):
            if math.isfinite(number):
                _cell_text(axes, j, i, f"{number:.{digits}f}", number, bottom, top, diverging)
    rotation = 30 if max(map(len, across)) > 8 and len(across) > 4 else 0
    axes.set_xticks(
        range(len(across)), across, rotation=rotation, ha="right" if rotation else "center"
    )
    axes.set_yticks(range(len(down)), down)
    _label(axes, xlabel, ylabel, title)


def _limits(
    grid: np.ndarray, low: float | None, high: float | None, diverging: bool
) -> tuple[float, float]:
    finite = grid[np.isfinite(grid)]
    if not finite.size:
        raise DataError("heat map: no finite value to draw")
    bottom = float(finite.min()) if low is None else low
    top = float(finite.max()) if high is None else high
    if diverging:
        top = max(abs(bottom), abs(top)) or 1.0
        bottom = -top
    return (bottom, top) if top > bottom else (bottom - 0.5, bottom + 0.5)


def _draw_cells(axes: Axes, grid: np.ndarray, low: float, high: float, diverging: bool) -> None:
    """Cells as vector rectangles (an image would be a blurred bitmap inside the SVG)."""
    axes.pcolormesh(
        np.arange(grid.shape[1] + 1) - 0.5,
        np.arange(grid.shape[0] + 1) - 0.5,
        np.ma.masked_invalid(grid),
        cmap=DIVERGING if diverging else SEQUENTIAL,
        vmin=low,
        vmax=high,
        edgecolors=PAPER,
        linewidth=1.2,
    )
    axes.invert_yaxis()
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0)


def _cell_text(
    axes: Axes,
    column: float,
    row: float,
    text: str,
    number: float,
    low: float,
    high: float,
    diverging: bool,
    size: float = TEXT_POINTS - 1,
) -> None:
    """Text on a cell, dark or light, whichever has the higher contrast on the cell's colour."""
    from matplotlib import colormaps

    share = (number - low) / (high - low) if math.isfinite(number) else 0.0
    cell = colormaps[DIVERGING if diverging else SEQUENTIAL](min(1.0, max(0.0, share)))[:3]
    bright = relative_luminance(cell) > 0.18  # where black and white text have equal contrast
    axes.text(
        column,
        row,
        text,
        ha="center",
        va="center",
        fontsize=size,
        color="#000001" if bright else "#fffffe",
    )


def relative_luminance(rgb: Sequence[float]) -> float:
    """Luminance of an sRGB colour in [0, 1]³, 0 for black and 1 for white.   [WCAG 2.2]"""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def token_heat_map(
    axes: Axes,
    tokens: Sequence[str],
    values: Sequence[float],
    *,
    per_line: int = 14,
    low: float | None = None,
    high: float | None = None,
    title: str = "",
    value_label: str = "",
    digits: int = 0,
) -> None:
    """A text as cells in reading order, each token over the colour and number of its value."""
    if len(tokens) != len(values) or not tokens:
        raise DataError(f"token_heat_map: {len(tokens)} tokens and {len(values)} values")
    lines = math.ceil(len(tokens) / per_line)
    grid = np.full((lines, min(per_line, len(tokens))), np.nan)
    numbers = np.asarray(values, dtype=float)
    for index, number in enumerate(numbers):
        grid[divmod(index, per_line)] = number
    bottom, top = _limits(grid, low, high, False)
    _draw_cells(axes, grid, bottom, top, False)
    for index, (token, number) in enumerate(zip(tokens, numbers, strict=True)):
        row, column = divmod(index, per_line)
        shown = token.strip().replace("\n", "⏎") or "·"
        shown = shown if len(shown) <= 9 else shown[:8] + "…"
        safe = shown.replace("$", r"\$")
        text = f"{safe}\n{number:.{digits}f}" if math.isfinite(number) else safe
        _cell_text(axes, column, row, text, number, bottom, top, False, TEXT_POINTS - 1.5)
    axes.set_xticks([])
    axes.set_yticks([])
    _label(axes, value_label, "", title)
