"""Tables and figures of errors: layers x sublayers x methods, and step by step."""

from __future__ import annotations

from statistics import median
from typing import Any

LABELS: dict[str, str] = {
    "rtn": "RTN",
    "gptq": "GPTQ",
    "quip-sharp": "QuIP# (no L R)",
    "lplr": "LPLR (no Q)",
    "lr_first": "LPLR-LDLQ, LR first",
    "q_first": "LPLR-LDLQ, Q first",
    "odlri": "LPLR-LDLQ, ODLRI",
    "srr": "LPLR-LDLQ, SRR",
    "auto": "LPLR-LDLQ, auto",
}
"""Methods as tables and figures name them."""
SINGLE = ("rtn", "gptq", "quip-sharp", "lplr")
"""Methods without alternation; the others are starts of it."""


def best_step(row: dict[str, Any]) -> int:
    """Number of the sub-step with the smallest error."""
    errors = [step["error"] for step in row["history"]]
    return errors.index(min(errors)) + 1


def summary_rows(errors: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per method, the smallest median error first."""
    matrices: dict[tuple, list[dict[str, Any]]] = {}
    for row in errors:
        matrices.setdefault((row["layer"], row["sublayer"]), []).append(row)
    gptq = {
        key: row["error"]
        for key, members in matrices.items()
        for row in members
        if row["method"] == LABELS["gptq"]
    }
    winners = [min(members, key=lambda r: r["error"])["method"] for members in matrices.values()]
    rows = []
    for method in dict.fromkeys(r["method"] for r in errors):
        mine = [r for r in errors if r["method"] == method]
        found = [r["error"] for r in mine]
        rows.append(
            {
                "method": method,
                "error": median(found),
                "smallest": min(found),
                "largest": max(found),
                "best_on": winners.count(method),
                "below_gptq": sum(
                    r["error"] < gptq.get((r["layer"], r["sublayer"]), 0.0) for r in mine
                ),
                "true_bits": sum(r["true_bits"] for r in mine) / len(mine),
                "frobenius": median(r["frobenius"] for r in mine),
                "seconds": sum(r["seconds"] for r in mine),
            }
        )
    return sorted(rows, key=lambda r: r["error"])


def spread_rows(errors: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Median and range over the layers, per sublayer and method."""
    rows = []
    for sublayer in dict.fromkeys(r["sublayer"] for r in errors):
        for method in dict.fromkeys(r["method"] for r in errors):
            found = [
                r["error"] for r in errors if r["sublayer"] == sublayer and r["method"] == method
            ]
            rows.append(
                {
                    "sublayer": sublayer,
                    "method": method,
                    "error": median(found),
                    "low": min(found),
                    "high": max(found),
                }
            )
    return rows


def step_table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Median and range over the layers after every sub-step of the alternating methods."""
    groups: dict[tuple[str, str, int, str], list[float]] = {}
    for row in rows:
        if row["method"] in SINGLE:
            continue
        for number, step in enumerate(row["history"], start=1):
            key = (row["sublayer"], LABELS[row["method"]], number, step["component"])
            groups.setdefault(key, []).append(step["error"])
    last = {}
    for sublayer, method, number, _ in groups:
        last[sublayer, method] = max(number, last.get((sublayer, method), 0))
    return [
        {
            "sublayer": sublayer,
            "method": method,
            "step": number,
            "component": component,
            "error": median(found),
            "low": min(found),
            "high": max(found),
            "layers": len(found),
            "last": number == last[sublayer, method],
        }
        for (sublayer, method, number, component), found in groups.items()
    ]


def method_figure(rows: list[dict[str, Any]]) -> Any:
    """Every sublayer on the x axis, a mark with its range for each method, log y."""
    from workbench.plots import INK, MARKERS, PALETTE, TEXT_POINTS, line_plot, new_figure

    names = list(dict.fromkeys(r["sublayer"] for r in rows))
    methods = list(dict.fromkeys(r["method"] for r in rows))
    figure, axes = new_figure(1.1 * len(names) + 3.2, 4.2)
    width = 0.7 / len(methods)
    placed = [
        {
            **r,
            "x": names.index(r["sublayer"])
            + (methods.index(r["method"]) - (len(methods) - 1) / 2) * width,
        }
        for r in rows
    ]
    line_plot(
        axes,
        placed,
        x="x",
        y="error",
        series="method",
        xlabel=" ",
        ylabel="relative activation-aware error e (log)",
        log="y",
    )
    for index, line in enumerate(axes.lines):
        line.set_linestyle("none")
        mine = [r for r in placed if r["method"] == methods[index]]
        colour = PALETTE[index % len(PALETTE)]
        axes.vlines(
            [r["x"] for r in mine],
            [r["low"] for r in mine],
            [r["high"] for r in mine],
            color=colour,
            linewidth=1.2,
        )
        line.set_marker(MARKERS[index % len(MARKERS)])
    axes.set_xticks(range(len(names)), [name.rpartition(".")[2] for name in names])
    axes.legend(
        fontsize=TEXT_POINTS - 0.5,
        labelcolor=INK,
        frameon=False,
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
    )
    return figure


def step_figure(rows: list[dict[str, Any]]) -> Any:
    """One panel per sublayer: error against the sub-step, log y.

    It begins when every component has been updated once; before that there is no whole state.
    """
    from matplotlib.ticker import MaxNLocator

    figure, panels = sublayer_panels(
        {
            name: [r for r in rows if r["sublayer"] == name and r["step"] > 1]
            for name in dict.fromkeys(r["sublayer"] for r in rows)
        },
        height=2.7,
        x="step",
        y="error",
        series="method",
        xlabel="sub-step",
        ylabel="error e (log)",
    )
    for panel in panels:
        panel.yaxis.set_major_locator(MaxNLocator(5))
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def sublayer_panels(
    rows_of: dict[str, list[dict[str, Any]]],
    *,
    height: float,
    xlabel: str,
    ylabel: str,
    **columns_drawn: str,
) -> tuple[Any, list[Any]]:
    """(figure, panels): lines of each sublayer in a panel of its own, log y, axes named at the rim,
    one legend. ``columns_drawn`` as of ``line_plot``."""
    from workbench.plots import line_plot, new_figure

    n = len(rows_of)
    columns = min(4, n)
    deep = -(-n // columns)
    figure, axes = new_figure(2.9 * columns + 0.4, height * deep, rows=deep, columns=columns)
    panels = [axes] if n == 1 else list(axes.flat)
    for unused in panels[n:]:
        unused.set_visible(False)
    for place, (name, rows) in enumerate(rows_of.items()):
        line_plot(
            panels[place],
            rows,
            xlabel=xlabel if place >= n - columns else " ",
            ylabel=ylabel if place % columns == 0 else " ",
            title=name,
            log="y",
            **columns_drawn,
        )
    shared_legend(figure, panels[:n])
    return figure, panels[:n]


def shared_legend(figure: Any, panels: list[Any]) -> None:
    """One legend beneath all panels in place of one in each."""
    from workbench.plots import INK, TEXT_POINTS

    handles, labels = panels[0].get_legend_handles_labels()
    for panel in panels:
        if panel.get_legend():
            panel.get_legend().remove()
    if len(labels) > 1:
        figure.legend(
            handles,
            labels,
            loc="outside lower center",
            ncols=len(labels),
            frameon=False,
            fontsize=TEXT_POINTS - 0.5,
            labelcolor=INK,
        )


def describe(summary: list[dict[str, Any]]) -> str:
    """The figure of the methods in words."""
    parts = [
        f"{r['method']}: median {r['error']:.4f}, {r['smallest']:.4f} to {r['largest']:.4f}"
        for r in summary
    ]
    return "Error by sublayer and method. " + "; ".join(parts)
