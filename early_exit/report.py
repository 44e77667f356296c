"""Figures of the room: agreement against speed-up, exits by depth, token heat maps."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import numpy as np

from workbench.plots import MARKERS, PALETTE, SEQUENTIAL, new_figure

Row = dict[str, Any]
ACCOUNTINGS = (
    ("blocks", "blocks before the token (latency)"),
    ("arithmetic", "arithmetic executed"),
    ("seconds", "time, measured"),
)


def speed_figure(
    curve: Sequence[Row], baselines: Sequence[Row], measured: Sequence[Row], title: str = ""
) -> tuple[Any, list[Row]]:
    """Agreement against speed-up in three accountings, and the rows behind it.

    Lines: the simulated threshold curve (exact state). Filled marks: real decoding. Points far
    below the decoded ones are left out of the picture and kept in the rows.
    """
    figure, axes = new_figure(9.6, 4.0, 1, 3, share_y=True)
    rows: list[Row] = []
    for panel, (key, label) in zip(axes, ACCOUNTINGS, strict=True):
        simulated = {"blocks": "speedup_blocks", "arithmetic": "speedup_arithmetic_propagate"}
        if key in simulated:
            x = np.array([row[simulated[key]] for row in curve])
            y = np.array([row["agreement"] for row in curve])
            order = np.argsort(x, kind="stable")
            panel.plot(x[order], y[order], color=PALETTE[0], linewidth=1.8, label="gate, simulated")
            panel.fill_between(
                x[order],
                np.array([row["low"] for row in curve])[order],
                np.array([row["high"] for row in curve])[order],
                color=PALETTE[0],
                alpha=0.18,
                linewidth=0,
            )
            rows += [_point(key, "gate, simulated", a, r) for a, r in zip(x, curve, strict=True)]
        if key == "blocks":
            for kind, colour, marker in (
                ("fixed", PALETTE[3], "v"),
                ("pruned", PALETTE[6], "X"),
                ("oracle", PALETTE[2], "*"),
            ):
                chosen = [row for row in baselines if row["method"].startswith(kind)]
                names = {"fixed": "one exit for all", "pruned": "layers pruned", "oracle": "oracle"}
                _marks(panel, chosen, "speedup_blocks", colour, marker, names[kind])
                rows += [_point(key, r["method"], r["speedup_blocks"], r) for r in chosen]
        policies = list(dict.fromkeys(row["policy"] for row in measured))
        for number, policy in enumerate(policies):
            chosen = [row for row in measured if row["policy"] == policy]
            column = f"speedup_{key}"
            colour = PALETTE[1] if number == 0 else PALETTE[5]
            _marks(panel, chosen, column, colour, MARKERS[number], f"decoded, {policy}")
            rows += [_point(key, r["setting"], r[column], r) for r in chosen]
        panel.axvline(1.0, color="#6b7280", linewidth=0.8, linestyle=(0, (1, 2)))
        panel.set_title(label, loc="left", fontsize=10)
        panel.set_xlabel("speed-up ×")
    axes[0].set_ylabel("agreement with the full model")
    bottom = max(0.0, min(row.get("low", row["agreement"]) for row in measured) - 0.1)
    axes[0].set_ylim(bottom, 1.0 + 0.03 * (1 - bottom))
    for panel, (key, _) in zip(axes, ACCOUNTINGS, strict=True):
        inside = [r["speedup"] for r in rows if r["panel"] == key and r["agreement"] >= bottom]
        panel.set_xlim(min(0.98, *inside) - 0.02, max(inside) * 1.04)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False, fontsize=8.5)
    if title:
        figure.suptitle(title, fontsize=10.5, x=0.01, ha="left")
    return figure, rows


def _marks(
    panel: Any, rows: Sequence[Row], column: str, colour: str, marker: str, label: str
) -> None:
    if not rows:
        return
    y = np.array([row["agreement"] for row in rows])
    below = y - np.array([row.get("low", row["agreement"]) for row in rows])
    above = np.array([row.get("high", row["agreement"]) for row in rows]) - y
    panel.errorbar(
        [row[column] for row in rows],
        y,
        yerr=np.clip([below, above], 0, None),
        fmt=marker,
        color=colour,
        markersize=9 if marker == "*" else 6,
        linewidth=1.0,
        capsize=2,
        label=label,
    )


def _point(panel: str, series: str, speedup: float, row: Row) -> Row:
    return {
        "panel": panel,
        "series": series,
        "speedup": float(speedup),
        "agreement": row["agreement"],
        "low": row.get("low"),
        "high": row.get("high"),
        "threshold": row.get("threshold"),
    }


def exits_figure(rows: Sequence[Row], layers: int) -> Any:
    """Per exit: how often it agrees with the full model, and how well each score knows it."""
    figure, (left, right) = new_figure(8.4, 3.4, 1, 2)
    depth = [row["exit"] for row in rows]
    left.plot(depth, [row["agreement"] for row in rows], color=PALETTE[0], marker="o")
    left.set_xlabel(f"exit after block (of {layers})")
    left.set_ylabel("agreement with the full model")
    left.set_ylim(0, 1.02)
    left.set_xticks(depth)
    left.set_title("what an exit would emit", loc="left", fontsize=10)
    names = ("gate", "maxprob", "margin", "entropy", "saturation")
    for number, name in enumerate(names):
        values = [row[f"auroc_{name}"] for row in rows]
        shown = [float("nan") if v is None else v for v in values]
        right.plot(
            depth,
            shown,
            color=PALETTE[number],
            marker=MARKERS[number],
            linewidth=2.0 if name == "gate" else 1.2,
            label=name,
        )
    right.axhline(0.5, color="#6b7280", linewidth=0.8, linestyle=(0, (1, 2)))
    right.set_xticks(depth)
    right.set_xlabel(f"exit after block (of {layers})")
    right.set_ylabel("AUROC of the score")
    right.set_title("does the score know when it agrees?", loc="left", fontsize=10)
    right.legend(fontsize=8, frameon=False, ncols=2)
    return figure


def reliability_figure(
    scores: np.ndarray, agree: np.ndarray, exits: Sequence[int], bins: int = 10
) -> tuple[Any, list[Row]]:
    """Share of agreement per bin of the gate's probability, one line per exit."""
    figure, panel = new_figure(4.6, 4.0)
    rows: list[Row] = []
    panel.plot([0, 1], [0, 1], color="#6b7280", linewidth=0.9, linestyle=(0, (1, 2)))
    for number, layer in enumerate(exits):
        which = np.clip((scores[:, number] * bins).astype(int), 0, bins - 1)
        count = np.bincount(which, minlength=bins)
        keep = count >= 10
        safe = np.maximum(count, 1)
        mean = np.bincount(which, scores[:, number], minlength=bins) / safe
        share = np.bincount(which, agree[:, number].astype(float), minlength=bins) / safe
        panel.plot(
            mean[keep],
            share[keep],
            color=PALETTE[number % len(PALETTE)],
            marker=MARKERS[number % len(MARKERS)],
            markersize=5,
            label=f"exit {layer}",
        )
        rows += [
            {"exit": layer, "score": float(m), "agreement": float(s), "tokens": int(c)}
            for m, s, c in zip(mean, share, count, strict=True)
            if c
        ]
    panel.set_xlabel("gate's probability")
    panel.set_ylabel("share that agrees")
    panel.legend(fontsize=8.5, frameon=False)
    return figure, rows


def token_heat_map(
    pieces: Sequence[str], exit_layers: Sequence[int], layers: int, title: str = "", width: int = 84
) -> Any:
    """The text, each token on the colour of the block after which it left."""
    from matplotlib import colormaps
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    lines = wrap_tokens(pieces, width)
    figure, panel = new_figure(9.2, 0.95 + 0.27 * len(lines))
    panel.grid(False)
    panel.set_axis_off()
    panel.set_xlim(0, width)
    panel.set_ylim(len(lines), 0)
    scale, colours = Normalize(0, layers - 1), colormaps[SEQUENTIAL]
    for y, line in enumerate(lines):
        for x, number in line:
            shown = visible(pieces[number])
            colour = colours(scale(exit_layers[number]))
            dark = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] < 0.5
            panel.add_patch(
                Rectangle((x + 0.06, y + 0.06), len(shown) - 0.12, 0.88, facecolor=colour)
            )
            panel.text(
                x + len(shown) / 2,
                y + 0.54,
                shown.replace("$", r"\$"),
                family="monospace",
                fontsize=8.5,
                ha="center",
                va="center",
                color="white" if dark else "black",
            )
    used = sorted(set(exit_layers))
    handles = [Rectangle((0, 0), 1, 1, facecolor=colours(scale(e))) for e in used]
    names = [f"block {e}" + (" (full)" if e == layers - 1 else "") for e in used]
    figure.legend(
        handles, names, loc="outside lower center", ncols=len(used), frameon=False, fontsize=8.5
    )
    if title:
        panel.set_title(title, loc="left", fontsize=10)
    return figure


def visible(piece: str) -> str:
    """A token's text with line breaks and leading spaces made visible."""
    return piece.replace("\n", "⏎").replace("\t", "→") or "·"


def wrap_tokens(pieces: Sequence[str], width: int) -> list[list[tuple[int, int]]]:
    """Lines of (column, token number), no line wider than `width` characters.

    >>> wrap_tokens(["aa", "bbb", "c"], 5)
    [[(0, 0), (2, 1)], [(0, 2)]]
    """
    lines: list[list[tuple[int, int]]] = [[]]
    column = 0
    for number, piece in enumerate(pieces):
        size = len(visible(piece))
        if column and column + size > width:
            lines.append([])
            column = 0
        lines[-1].append((column, number))
        column += size
    return lines


def heat_map_html(
    pieces: Sequence[str],
    exit_layers: Sequence[int],
    scores: Sequence[Sequence[float]],
    layers: int,
) -> str:
    """A self-contained page: tokens coloured by exit, the scores asked on hover."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    spans = []
    for piece, layer, asked in zip(pieces, exit_layers, scores, strict=True):
        colour = colormaps[SEQUENTIAL](layer / max(1, layers - 1))
        dark = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] < 0.5
        tip = f"block {layer} of {layers - 1}; scores " + ", ".join(f"{s:.3f}" for s in asked)
        spans.append(
            f'<span title="{html.escape(tip)}" style="background:{to_hex(colour)};'
            f'color:{"#fff" if dark else "#000"}">{html.escape(visible(piece))}</span>'
        )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>exit layers</title>'
        '<body style="font:15px/1.9 ui-monospace,monospace;max-width:60em;margin:2em auto">'
        f"<p>Dark = left early, light = full depth ({layers} blocks). Hover for the scores.</p>"
        f"<p>{''.join(spans)}</p></body></html>\n"
    )
