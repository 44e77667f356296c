"""The room's figures and its one-sentence verdict, drawn from the rows of the tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workbench.run import Run

LABELS = {
    "no_prompt": "no prompt",
    "prompted": "prompted (teacher)",
    "truncate_prompt": "prompt cut to its end",
    "lm_on_prompt": "language modelling on the prompt",
    "lora": "LoRA",
    "memory": "memory tokens",
    "kv": "KV prefix",
    "full": "all weights",
}


def verdict(rows: Sequence[dict[str, Any]], student: str, prompt_tokens: int) -> str:
    """One sentence: recovery, forgetting, tokens saved."""
    arms = {row["arm"]: row for row in rows}
    mine = arms[student]
    saved = prompt_tokens - mine["prefix_tokens"]
    if mine["recovery"] is None:
        return (
            "The prompt has no measurable effect on the held-out questions, so recovery is n/a; "
            "check that the model obeys its prompt before consolidating it."
        )
    text = (
        f"{LABELS[student]}: recovery {mine['recovery']:.2f} "
        f"[{mine['recovery_low']:.2f}, {mine['recovery_high']:.2f}] on held-out wordings, "
        f"perplexity on unrelated text × {mine['ppl_ratio']:.3f}, in-context ability × "
        f"{mine['icl_retention']:.2f}, {saved} prompt tokens saved per request"
    )
    others = [
        f"{LABELS.get(name, name)} {row['recovery']:.2f}"
        for name, row in arms.items()
        if name not in (student, "no_prompt", "prompted") and row["recovery"] is not None
    ]
    return text + (f" (others: {', '.join(others)})." if others else ".")


def retention_figure(run: Run, rows: Sequence[dict[str, Any]], n: int) -> None:
    """Recovery against in-context retention, one point per arm, both with intervals."""
    from workbench.plots import INK, MARKERS, PALETTE, TEXT_POINTS, new_figure

    # the bare model is the point (1, 0) by definition
    shown = [row for row in rows if row["recovery"] is not None and row["arm"] != "no_prompt"]
    if not shown:
        return
    figure, axes = new_figure(6.4, 4.2)
    for index, row in enumerate(shown):
        colour, marker = PALETTE[index % len(PALETTE)], MARKERS[index % len(MARKERS)]
        x, y = row["icl_retention"], row["recovery"]
        axes.errorbar(
            x,
            y,
            xerr=[
                [max(0.0, x - row["icl_retention_low"])],
                [max(0.0, row["icl_retention_high"] - x)],
            ],
            yerr=[[max(0.0, y - row["recovery_low"])], [max(0.0, row["recovery_high"] - y)]],
            color=colour,
            marker=marker,
            markersize=6.5,
            linewidth=1.1,
            capsize=2.5,
            linestyle="none",
            label=f"{LABELS.get(row['arm'], row['arm'])}  (ppl × {row['ppl_ratio']:.2f})",
        )
    axes.axhline(1.0, color=INK, linewidth=0.8, linestyle=(0, (1, 2)))
    axes.axvline(1.0, color=INK, linewidth=0.8, linestyle=(0, (1, 2)))
    axes.set_xlabel("in-context ability kept (1 = untouched model)", fontsize=TEXT_POINTS)
    axes.set_ylabel("recovery on held-out wordings (1 = with prompt)", fontsize=TEXT_POINTS)
    axes.set_title("What arrived, and what was lost", fontsize=TEXT_POINTS + 1, loc="left")
    _legend_below(axes)
    points = "; ".join(
        f"{LABELS.get(r['arm'], r['arm'])}: recovery {r['recovery']:.2f}, retention "
        f"{r['icl_retention']:.2f}, perplexity × {r['ppl_ratio']:.2f}"
        for r in shown
    )
    run.figure(
        "recovery_and_retention",
        figure,
        [dict(row) for row in shown],
        caption=(
            f"Recovery against in-context ability kept, by arm; 95 % bootstrap intervals; n = {n} "
            "questions in held-out wordings. The top right corner is the goal."
        ),
        alt=points,
    )


def _legend_below(axes: Any) -> None:
    """Names under the panel, where they hide no data."""
    from workbench.plots import INK, TEXT_POINTS

    axes.legend(
        fontsize=TEXT_POINTS - 1,
        labelcolor=INK,
        frameon=False,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.16),
        ncols=2,
    )


def curve_figure(run: Run, curves: Sequence[dict[str, Any]], n: int) -> None:
    """Recovery on held-out wordings against optimiser steps, one line per trained arm."""
    from workbench.plots import line_plot, new_figure

    if not curves:
        return
    named = [{**row, "arm": LABELS.get(row["arm"], row["arm"])} for row in curves]
    figure, axes = new_figure(6.4, 3.8)
    line_plot(
        axes,
        named,
        x="step",
        y="recovery",
        series="arm",
        xlabel="optimiser steps",
        ylabel="recovery on held-out wordings",
        title="How fast a prompt moves in",
        reference={"with prompt": 1.0},
    )
    _legend_below(axes)
    last = {row["arm"]: row["recovery"] for row in named}
    ends = "; ".join(f"{arm} ends at {value:.2f}" for arm, value in last.items())
    run.figure(
        "learning_curve",
        figure,
        named,
        caption=f"Recovery on n = {n} questions in held-out wordings while training.",
        alt=ends,
    )


def triple_figure(run: Run, columns: dict[str, Any], what: str) -> None:
    """Means over the items with the standard error, one bar per arm."""
    from workbench.plots import bar_plot, new_figure

    names = {
        "full_context": "with context",
        "no_context": "without",
        "lm_on_prompt": "language modelling on it",
        "distilled": "distilled",
    }
    rows = []
    for name, column in columns.items():
        mean = float(column.mean())
        error = float(column.std() / max(1, len(column)) ** 0.5)
        rows.append(
            {"arm": names.get(name, name), "mean": mean, "low": mean - error, "high": mean + error}
        )
    n = len(next(iter(columns.values())))
    figure, axes = new_figure(6.0, 2.6)
    bar_plot(axes, rows, label="arm", value="mean", low="low", high="high", xlabel=what)
    run.figure(
        "triple",
        figure,
        rows,
        caption=f"{what}, mean and standard error, n = {n}.",
        alt="; ".join(f"{row['arm']} {row['mean']:.3g}" for row in rows),
    )
