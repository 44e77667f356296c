"""Tables and figures of a compression run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

METHOD_NAMES = {
    "16-bit": "16 bit",
    "rtn": "RTN",
    "gptq": "GPTQ",
    "quip-sharp": "QuIP#-style",
    "lplr-ldlq": "LPLR-LDLQ",
}


FIRST_WHOLE = 2
"""Sub-step after which Q and L R have both been fitted."""


def short_source(source: str) -> str:
    """A text's name as shown in tables."""
    return {"microworld:doc": "documents", "stdlib": "library text"}.get(source, source)


def in_bits(first: float, second: float | None = None) -> str:
    """One width in words, "1 bit", or two that may differ, "4 and 8 bits"."""
    if second is not None and second != first:
        return f"{first:g} and {second:g} bits"
    return f"{first:g} bit{'' if first == 1 else 's'}"


def perplexity_figure(rows: Sequence[dict[str, Any]]) -> Any:
    """Perplexity against true bits per weight, one panel per text, log y, 16 bit as a dotted
    line."""
    from workbench.plots import line_plot, new_figure

    sources = list(dict.fromkeys(r["text"] for r in rows))
    figure, axes = new_figure(4.6 * len(sources), 3.8, columns=len(sources))
    panels = [axes] if len(sources) == 1 else list(axes)
    for panel, source in zip(panels, sources, strict=True):
        mine = [r for r in rows if r["text"] == source]
        base = next(r for r in mine if r["method"] == METHOD_NAMES["16-bit"])
        drawn = [
            {
                **r,
                "low": base["perplexity"] * r["ratio_low"],
                "high": base["perplexity"] * r["ratio_high"],
            }
            for r in mine
            if r is not base
        ]
        line_plot(
            panel,
            drawn,
            x="true_bits",
            y="perplexity",
            low="low",
            high="high",
            series="method",
            xlabel="bits per weight, all overheads counted",
            ylabel="perplexity (log)",
            title=source,
            log="y",
            reference={f"16 bit: {base['perplexity']:.2f}": base["perplexity"]},
        )
    return figure


def perplexity_alt(rows: Sequence[dict[str, Any]]) -> str:
    """The figure in words: every point."""
    parts = [
        f"{r['text']}, {r['method']} at {r['true_bits']:.2f} bits: {r['perplexity']:.3g}"
        for r in rows
    ]
    return "Perplexity against bits per weight. " + "; ".join(parts)


def compressed_rows(layers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of Q + L R where there are any, else of the first method."""
    ours = [r for r in layers if r["method"].startswith(METHOD_NAMES["lplr-ldlq"])]
    return ours or [r for r in layers if r["method"] == layers[0]["method"]]


def error_figure(layers: Sequence[dict[str, Any]]) -> Any:
    """Relative activation-aware error per sublayer type and budget (median over blocks)."""
    from statistics import median

    from workbench.plots import bar_plot, new_figure

    rows = compressed_rows(layers)
    kinds = list(dict.fromkeys(r["kind"] for r in rows))
    budgets = list(dict.fromkeys(r["bits"] for r in rows))
    drawn = [
        {
            "sublayer": kind,
            "budget": in_bits(bits),
            "error": median(r["error"] for r in rows if r["kind"] == kind and r["bits"] == bits),
        }
        for bits in budgets
        for kind in kinds
    ]
    figure, axes = new_figure(7.0, max(3.6, 0.19 * len(drawn) + 1.0))
    bar_plot(
        axes,
        drawn,
        label="sublayer",
        value="error",
        series="budget",
        xlabel="relative activation-aware error e",
        title=f"{rows[0]['method']}: error by kind of layer (median over blocks)",
    )
    return figure, drawn


def curve_rows(curves: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per budget and sub-step: the error over the sublayers, and its ratio to that of the first
    whole state (the second sub-step: before it one part of Q, L R is still zero).

    Sublayers without L R have one step and are left out, unless there is no other.
    """
    from statistics import median

    mine = compressed_rows(curves)
    first = {(r["bits"], r["layer"]): r["error"] for r in mine if r["step"] == FIRST_WHOLE}
    mine = [r for r in mine if (r["bits"], r["layer"]) in first] or mine
    drawn = []
    for bits, step in sorted({(r["bits"], r["step"]) for r in mine}):
        at = [r for r in mine if r["bits"] == bits and r["step"] == step]
        errors = [r["error"] for r in at]
        ratios = [r["error"] / first[bits, r["layer"]] for r in at if first.get((bits, r["layer"]))]
        drawn.append(
            {
                "budget": in_bits(bits),
                "step": step,
                "error": median(errors),
                "least": min(errors),
                "largest": max(errors),
                "over_first_whole": median(ratios) if ratios else None,
                "sublayers": len(errors),
            }
        )
    return drawn


def curve_figure(curves: Sequence[dict[str, Any]]) -> Any:
    """Error after each sub-step by budget, median over sublayers: itself, and over the first whole
    state."""
    from lplr_q.data_agnostic.figures import shared_legend
    from workbench.plots import line_plot, new_figure

    drawn = curve_rows(curves)
    whole = [r for r in drawn if r["step"] >= FIRST_WHOLE]
    figure, panels = new_figure(8.4, 3.8, columns=2)
    line_plot(
        panels[0],
        drawn,
        x="step",
        y="error",
        series="budget",
        xlabel="sub-step of the alternation",
        ylabel="relative error e (log)",
        log="y",
    )
    line_plot(
        panels[1],
        whole or drawn,
        x="step",
        y="over_first_whole",
        series="budget",
        xlabel="sub-step of the alternation",
        ylabel=f"e over that of sub-step {FIRST_WHOLE}",
    )
    for panel, shown in zip(panels, (drawn, whole or drawn), strict=True):
        panel.set_xticks(sorted({r["step"] for r in shown}))
    if len({r["budget"] for r in drawn}) > 1:
        shared_legend(figure, list(panels))
    return figure, drawn


def worst_rows(layers: Sequence[dict[str, Any]], n: int = 10) -> list[dict[str, Any]]:
    """The ``n`` sublayers with the largest error at each budget."""
    rows = compressed_rows(layers)
    columns = ("bits", "layer", "codebook", "q_bits", "rank", "true_bits", "error", "seconds")
    found = []
    for bits in dict.fromkeys(r["bits"] for r in rows):
        mine = sorted((r for r in rows if r["bits"] == bits), key=lambda r: -r["error"])
        found += [{c: r[c] for c in columns} for r in mine[:n]]
    return found


def prediction_figure(layers: Sequence[dict[str, Any]]) -> Any:
    """Measured against foretold error of every allocated sublayer; None where none is foretold."""
    from matplotlib.ticker import StrMethodFormatter

    from workbench.plots import INK, MARKERS, PALETTE, new_figure

    drawn = [
        {key: r[key] for key in ("bits", "layer", "predicted", "error")}
        for r in layers
        if r["predicted"] is not None
    ]
    if not drawn:
        return None
    figure, axes = new_figure(4.6, 4.2)
    for index, bits in enumerate(dict.fromkeys(r["bits"] for r in drawn)):
        mine = [r for r in drawn if r["bits"] == bits]
        axes.plot(
            [r["predicted"] for r in mine],
            [r["error"] for r in mine],
            linestyle="none",
            marker=MARKERS[index % len(MARKERS)],
            markersize=4.5,
            color=PALETTE[index % len(PALETTE)],
            label=f"{bits:g} bits",
        )
    ends = [f(r[k] for r in drawn for k in ("predicted", "error")) for f in (min, max)]
    axes.plot(ends, ends, color=INK, linewidth=0.9, linestyle=(0, (1, 2)))
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.set_xlabel("foretold error e (log)", fontsize=9, color=INK)
    axes.set_ylabel("measured error e (log)", fontsize=9, color=INK)
    axes.legend(fontsize=8.5, labelcolor=INK, frameon=False)
    return figure, drawn


def headline(rows: Sequence[dict[str, Any]], bits: float) -> str:
    """One sentence: ratio to 16 bit of each method at one budget, on the first text."""
    first = rows[0]["text"]
    at = [r for r in rows if r["text"] == first and r["bits"] == bits]
    parts = [f"{r['method']} {r['ratio']:.3f} ({r['true_bits']:.2f} bits)" for r in at]
    return f"Perplexity over 16-bit perplexity on {first} at {bits:g} bits: " + ", ".join(parts)


def ratio_figure(rows: Sequence[dict[str, Any]]) -> Any:
    """Perplexity over 16 bit against true bits, one panel per model and text, log y."""
    from workbench.plots import line_plot, new_figure

    panels = list(dict.fromkeys((r["model"], r["text"]) for r in rows))
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = new_figure(4.6 * columns, 3.8 * lines, rows=lines, columns=columns)
    flat = [axes] if len(panels) == 1 else list(axes.flat)
    for unused in flat[len(panels) :]:
        unused.set_visible(False)
    flat = flat[: len(panels)]
    for panel, (model, text) in zip(flat, panels, strict=True):
        line_plot(
            panel,
            [r for r in rows if (r["model"], r["text"]) == (model, text)],
            x="true_bits",
            y="ratio",
            low="ratio_low",
            high="ratio_high",
            series="method",
            xlabel="bits per weight, all overheads counted",
            ylabel="perplexity over 16 bit (log)",
            title=f"{model}, {text}",
            log="y",
            reference={"16 bit": 1.0},
        )
    return figure
