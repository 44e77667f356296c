"""The figures of `mad.scale`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mad.laws import Line, Row, column_pairs, predict
from workbench.run import Run


def draw_laws(run: Run, rows: Sequence[Row], laws: Sequence[Row], optima: Sequence[Row]) -> None:
    """One panel per law: points and fitted lines, both axes logarithmic."""
    from workbench.plots import INK, MARKERS, PALETTE, TEXT_POINTS, new_figure

    names = list(dict.fromkeys(row["architecture"] for row in rows))
    for kind in dict.fromkeys(law["law"] for law in laws):
        points = optima if kind == "flops" else [row for row in rows if row.get("state_floats")]
        figure, axes = new_figure(width=5.8, height=3.8)
        for i, name in enumerate(names):
            own = [point for point in points if point["architecture"] == name]
            color = PALETTE[i % len(PALETTE)]
            axes.plot(
                [point[kind] for point in own],
                [point["perplexity"] for point in own],
                marker=MARKERS[i % len(MARKERS)],
                color=color,
                linestyle="none",
                label=name,
            )
        for law in (law for law in laws if law["law"] == kind):
            name = law["architecture"]
            x = np.array([p[kind] for p in points if name in ("all", p["architecture"])], float)
            x.sort()
            color = PALETTE[names.index(name) % len(PALETTE)] if name in names else INK
            axes.plot(x, law["factor"] * x ** law["exponent"], color=color, linestyle=":")
        axes.set_xscale("log")
        axes.set_yscale("log")
        what = "training FLOPs" if kind == "flops" else "floats of state"
        axes.set_xlabel(what, fontsize=TEXT_POINTS, color=INK)
        axes.set_ylabel("perplexity", fontsize=TEXT_POINTS, color=INK)
        axes.legend(fontsize=TEXT_POINTS - 0.5, labelcolor=INK, frameon=False)
        numbers = "; ".join(
            f"{law['architecture']}: exponent {law['exponent']:.3f}, n = {law['n']}"
            for law in laws
            if law["law"] == kind
        )
        run.figure(
            f"law_{kind}",
            figure,
            list(points),
            caption=f"Perplexity by {what}; dotted: power laws. {numbers}.",
            alt=f"Power laws. {numbers}.",
        )


def draw_scores(
    run: Run,
    rows: Sequence[Row],
    line: Line,
    *,
    scores: Sequence[float],
    level: float,
    source: str,
) -> None:
    """Points, line and prediction band of score against perplexity."""
    from workbench.plots import INK, MARKERS, PALETTE, TEXT_POINTS, new_figure

    figure, axes = new_figure(width=5.8, height=3.8)
    x, y = column_pairs(rows, "mad_score")
    ends = [x.min(), x.max(), *scores]
    grid = np.linspace(min(ends) - 0.01, max(ends) + 0.01, 60)
    band = [predict(x, y, float(at), level) for at in grid]
    low, high = [one.low for one in band], [one.high for one in band]
    axes.fill_between(grid, low, high, color=PALETTE[0], alpha=0.15, linewidth=0)
    axes.plot(grid, line.offset + line.slope * grid, color=INK, linestyle=":")
    kept = [row for row in rows if row.get("mad_score") is not None]
    names = list(dict.fromkeys(row["architecture"] for row in kept))
    for i, name in enumerate(names):
        own = [row for row in kept if row["architecture"] == name]
        axes.plot(
            [row["mad_score"] for row in own],
            [row["perplexity"] for row in own],
            marker=MARKERS[i % len(MARKERS)],
            color=PALETTE[i % len(PALETTE)],
            linestyle="none",
            label=name,
        )
    told = [predict(x, y, score, level) for score in scores]
    for i, one in enumerate(told):
        axes.errorbar(
            one.score,
            one.perplexity,
            yerr=[[one.perplexity - one.low], [one.high - one.perplexity]],
            marker="_",
            color=INK,
            label="foretold" if i == 0 else None,
        )
    axes.set_xlabel("mean score on the synthetic tasks", fontsize=TEXT_POINTS, color=INK)
    axes.set_ylabel("perplexity", fontsize=TEXT_POINTS, color=INK)
    axes.legend(fontsize=TEXT_POINTS - 0.5, labelcolor=INK, frameon=False)
    numbers = "; ".join(f"{r['architecture']}: {r['mad_score']}, {r['perplexity']}" for r in kept)
    run.figure(
        "score",
        figure,
        [dict(row) for row in kept],
        caption=f"Score against perplexity ({source}); n = {len(kept)}. Band: "
        f"{level:.0%} interval of one more model, by a straight line.",
        alt=f"Score and perplexity. {numbers}.",
    )
