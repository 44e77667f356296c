"""Figures of ``lplr_q.matrix_compression``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lplr_q.data_agnostic.budget import TITLES
from lplr_q.report import in_bits

Row = Mapping[str, Any]


def shared_legend(figure: Any, panels: Sequence[Any]) -> None:
    """One legend beneath all panels, where no line lies under it."""
    from workbench.plots import INK, TEXT_POINTS

    handles, names = panels[0].get_legend_handles_labels()
    for panel in panels:
        if panel.get_legend() is not None:
            panel.get_legend().remove()
    figure.legend(
        handles,
        names,
        loc="outside lower center",
        ncols=min(len(names), 3 if len(panels) == 1 else 6),
        fontsize=TEXT_POINTS - 0.5,
        labelcolor=INK,
        frameon=False,
    )


def picture_figure(
    original: Tensor, pictures: Mapping[int, Mapping[str, Tensor]], rows: Sequence[Row]
) -> Any:
    """Original and reconstructions side by side, a row per budget, PSNR over each."""
    from workbench.plots import INK, TEXT_POINTS, new_figure

    budgets = list(pictures)
    methods = list(next(iter(pictures.values())))
    height, width = original.shape
    figure, axes = new_figure(
        1.45 * (len(methods) + 1),
        1.45 * len(budgets) * height / width + 0.32 * len(budgets),
        rows=len(budgets),
        columns=len(methods) + 1,
    )
    grid = axes.reshape(len(budgets), len(methods) + 1)
    low, high = float(original.min()), float(original.max())
    quality = {(row["method"], row["naive_bits"]): row["psnr_db"] for row in rows}
    for line, budget in zip(grid, budgets, strict=True):
        shown = [("original", original)]
        shown += [(TITLES[m], picture) for m, picture in pictures[budget].items()]
        for panel, (name, picture) in zip(line, shown, strict=True):
            panel.imshow(
                picture.cpu().numpy(), cmap="gray", vmin=low, vmax=high, interpolation="nearest"
            )
            panel.set_xticks([])
            panel.set_yticks([])
            panel.grid(False)
            for spine in panel.spines.values():
                spine.set_visible(False)
            heading = f"{name}\n{quality[name, budget]:.1f} dB" if panel is not line[0] else name
            panel.set_title(heading, fontsize=TEXT_POINTS - 1, color=INK)
        line[0].set_ylabel(f"{in_bits(budget)} / pixel", fontsize=TEXT_POINTS, color=INK)
    return figure


def image_figure(rows: Sequence[Row]) -> Any:
    """PSNR against stored bits per pixel."""
    from workbench.plots import line_plot, new_figure

    figure, axes = new_figure(6.0, 3.8)
    line_plot(
        axes,
        rows,
        x="bits_per_pixel",
        y="psnr_db",
        series="method",
        xlabel="stored bits per pixel",
        ylabel="PSNR, dB",
    )
    shared_legend(figure, [axes])
    return figure


def neighbour_figure(rows: Sequence[Row], k: int) -> Any:
    """Recall and accuracy against the budget, a column per source of vectors."""
    from workbench.plots import GRID, line_plot, new_figure

    sources = list(dict.fromkeys(row["source"] for row in rows))
    figure, axes = new_figure(4.2 * len(sources), 6.2, rows=2, columns=len(sources))
    for column, source in zip(axes.reshape(2, -1).T, sources, strict=True):
        mine = [row for row in rows if row["source"] == source]
        exact = next(row for row in mine if row["method"] == "exact")
        drawn = [row for row in mine if row["method"] != "exact"]
        line_plot(
            column[0],
            drawn,
            x="naive_bits",
            y="recall",
            series="method",
            xlabel="bits per entry",
            ylabel=f"recall@{k}",
            title=source,
        )
        line_plot(
            column[1],
            drawn,
            x="naive_bits",
            y="accuracy",
            series="method",
            xlabel="bits per entry",
            ylabel=f"accuracy of the vote of {k}",
            reference={f"exact {exact['accuracy']:.3f}": exact["accuracy"]},
        )
        column[1].axhspan(
            exact["accuracy_low"], exact["accuracy_high"], color=GRID, alpha=0.6, linewidth=0
        )
        for panel in column:
            panel.set_xticks(sorted({row["naive_bits"] for row in drawn}))
    shared_legend(figure, list(axes.flat))
    return figure


def layer_figure(summary: Sequence[Row]) -> Any:
    """Mean relative error against the budget, a panel per width of the factor codes."""
    from workbench.plots import line_plot, new_figure

    widths = list(dict.fromkeys((row["bits"], row["bits_right"]) for row in summary))
    figure, axes = new_figure(4.6 * len(widths), 3.8, columns=len(widths))
    panels = [axes] if len(widths) == 1 else list(axes)
    for panel, (bits, bits_right) in zip(panels, widths, strict=True):
        mine = [r for r in summary if (r["bits"], r["bits_right"]) == (bits, bits_right)]
        plain = {row["naive_bits"]: row["naive_error"] for row in mine}
        naive = [
            {"method": TITLES["naive"], "naive_bits": b, "column_sketch_error": e}
            for b, e in plain.items()
        ]
        line_plot(
            panel,
            [*naive, *mine],
            x="naive_bits",
            y="column_sketch_error",
            series="method",
            xlabel="bits per weight",
            ylabel="relative error, mean over matrices (log)",
            title=f"factors of {in_bits(bits, bits_right)}" if bits else "factor bits measured",
            log="y",
        )
        panel.set_xticks(sorted(plain))
    shared_legend(figure, panels)
    return figure


def curve_figure(rows: Sequence[Row]) -> Any:
    """Seconds and error against the rank."""
    from workbench.plots import line_plot, new_figure

    figure, axes = new_figure(8.4, 3.8, columns=2)
    for panel, (column, label) in zip(
        axes,
        (("seconds", "seconds (log)"), ("relative_error", "relative error (log)")),
        strict=True,
    ):
        line_plot(
            panel,
            rows,
            x="rank",
            y=column,
            series="method",
            xlabel="rank (log)",
            ylabel=label,
            log="xy",
        )
    shared_legend(figure, list(axes))
    return figure
