"""The figure of the room: error against coverage, and who is admitted from which group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sdm.evaluate import Selection, risk_coverage

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rows = list[dict[str, Any]]
SHOWN_POINTS = 400
"""Points of a curve that are drawn and written at most."""


def curve_rows(selections: Sequence[Selection], labels: np.ndarray) -> Rows:
    """Coverage and error rate of every method but the one that never rejects."""
    rows: Rows = []
    for one in selections:
        if one.method == "no reject":
            continue
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
    from workbench.plots import PALETTE, bar_plot, line_plot, new_figure

    figure, (left, right) = new_figure(width=10.5, height=4.4, columns=2)
    line_plot(
        left,
        curves,
        x="coverage",
        y="error_rate",
        series="method",
        xlabel="share of claims answered",
        ylabel="share of the answered that is wrong",
        title="Error against coverage",
        reference={f"1 − α = {1 - target:.2g}": 1 - target},
    )
    known = labels >= 0
    names = list(dict.fromkeys(row["method"] for row in curves))
    for one in selections:
        taken = one.accepted & known
        if one.method in names and taken.any():
            wrong = float((one.prediction != labels)[taken].mean())
            colour = PALETTE[names.index(one.method) % len(PALETTE)]
            left.plot(taken.sum() / known.sum(), wrong, "*", markersize=11, color=colour)
    shown = [row for row in table if row["method"] != "no reject"]
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
