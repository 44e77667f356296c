"""The learning curve of a training, from its metrics."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workbench.backbones.recipes import Recipe
    from workbench.run import Run

PROBE_QUESTIONS = 150  # about so many places, owners and colours among 24 × 8 questions


def learning_curve(run: Run, recipe: Recipe) -> None:
    """Draw recall from documents against tokens seen, with binomial standard errors."""
    from workbench.plots import line_plot, new_figure

    rows: list[dict[str, Any]] = []
    text = (run.directory / "metrics.jsonl").read_text(encoding="utf-8")
    for record in map(json.loads, text.splitlines()):
        for key, value in record.items():
            if key.startswith("probe/recall_"):
                error = math.sqrt(max(value * (1 - value), 1e-3) / PROBE_QUESTIONS)
                rows.append(
                    {
                        "million_tokens": record["step"] * recipe.tokens_per_step / 1e6,
                        "documents": f"{key.rpartition('_')[2]} facts",
                        "recall": value,
                        "low": max(0.0, value - error),
                        "high": min(1.0, value + error),
                    }
                )
    if not rows:
        return
    figure, axes = new_figure()
    line_plot(
        axes,
        rows,
        x="million_tokens",
        y="recall",
        series="documents",
        low="low",
        high="high",
        xlabel="million tokens",
        ylabel="questions answered",
    )
    axes.set_ylim(-0.02, 1.02)
    last = rows[-1]
    run.figure(
        "learning_curve",
        figure,
        rows,
        caption=f"{recipe.name}: share of questions on unseen documents that are answered; "
        f"n = 24 documents × 8 questions per point, bands of one standard error.",
        alt=f"Recall over tokens; at the end {last['recall']:.2f} for {last['documents']}.",
    )
