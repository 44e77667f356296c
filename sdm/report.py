"""The figure of the room: error against coverage, and who is admitted from which group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sdm.evaluate import Selection, risk_coverage

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rows = list[dict[str, Any]]
DRAWN = ("SDM region", "sdm ≥ α", "temperature, model", "temperature, adaptor")
"""Methods in the figure, in this order; the table has all of them."""
SHOWN_POINTS = 400
"""Points of a curve that are drawn and written at most."""


def curve_rows(selections: Sequence[Selection], labels: np.ndarray) -> Rows:
    """Coverage and error rate of the drawn methods."""
    rows: Rows = []
    for one in sorted(
        (one for one in selections if one.method in DRAWN), key=lambda one: DRAWN.index(one.method)
    ):
        coverage, risk = risk_coverage(one, labels)
        keep = np.unique(np.linspace(0, len(coverage) - 1, SHOWN_POINTS).astype(int))
        rows += [
            {"method": one.method, "coverage": float(coverage[i]), "error_rate": float(risk[i])}
            for i in keep
        ]
    return rows


def admission_figure(
    curves: Rows, table: Rows, selections: Sequence[Selection], labels: np.ndarray, target: float
) -> Figure:
    """Left: risk–coverage over all claims, dots where each method stands. Right: share admitted."""
    from workbench.plots import INK, PALETTE, TEXT_POINTS, bar_plot, line_plot, new_figure

    figure, (left, right) = new_figure(width=10.5, height=4.8, columns=2)
    line_plot(
        left,
        curves,
        x="coverage",
        y="error_rate",
        series="method",
        xlabel="share of claims answered",
        ylabel="share of the answered that is wrong",
        title="Error against coverage",
    )
    left.axhline(1 - target, color=INK, linewidth=0.9, linestyle=(0, (1, 2)))
    left.annotate(
        f"1 − α = {1 - target:.2g}",
        (1.0, 1 - target),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        fontsize=TEXT_POINTS - 1,
        color=INK,
    )
    known = labels >= 0
    names = list(dict.fromkeys(row["method"] for row in curves))
    for one in selections:
        taken = one.accepted & known
        if one.method in names and taken.any():
            wrong = float((one.prediction != labels)[taken].mean())
            colour = PALETTE[names.index(one.method) % len(PALETTE)]
            left.plot(taken.sum() / known.sum(), wrong, "*", markersize=11, color=colour)
    shown = [row for name in DRAWN for row in table if row["method"] == name]
    bar_plot(
        right,
        shown,
        label="group",
        value="admitted_share",
        low="admitted_share_low",
        high="admitted_share_high",
        series="method",
        xlabel="share admitted (95 % interval)",
        title="Who is admitted",
    )
    if (legend := right.get_legend()) is not None:
        legend.remove()  # colours and hatches are those of the left legend
    return figure


def describe(table: Rows, method: str) -> str:
    """The shares and accuracies of one method in words."""
    parts = []
    for row in table:
        if row["method"] != method:
            continue
        text = f"{row['group']}: {row['admitted']} of {row['n']} admitted"
        if isinstance(row["accuracy"], float):
            text += f", accuracy {row['accuracy']:.3f}"
        parts.append(text)
    return "; ".join(parts)
