"""Tables, figures and sentences of the lab, drawn from results and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mad.protocols import PROTOCOLS

if TYPE_CHECKING:
    from workbench.run import Run

Results = Mapping[str, Any]

SCORED = {True: "the weights best on validation", False: "the last step's weights"}


def setting(results: Results) -> str:
    """The task setting in one line, e.g. `in-context-recall, V = 16, L = 32, 2000 rows`."""
    return (
        f"{results['task']}, V = {results['vocab_size']}, L = {results['seq_len']}, "
        f"{results['num_train_examples']} training rows"
    )


def describe(results: Results) -> str:
    """A run's outcome in one sentence."""
    scored = SCORED[PROTOCOLS[results["protocol"]].selected]
    return (
        f"Test accuracy {results['test_accuracy']:.3f} "
        f"(95 % interval {results['test_accuracy_low']:.3f} to "
        f"{results['test_accuracy_high']:.3f}, {results['n_scored']} answers in "
        f"{results['n_rows']} rows) of {scored} after {results['steps']} steps on "
        f"{setting(results)}; chance {results['chance']:.3f}, ceiling {results['ceiling']:.3f}; "
        f"{results['parameters']} parameters."
    )


def curve_rows(runs: Sequence[Results]) -> list[dict[str, Any]]:
    """Validation accuracy over steps of several runs as tidy rows."""
    return [
        {"task": one["task"], "stack": one["stack"], **point}
        for one in runs
        for point in one["curve"]
    ]


def references(results: Results) -> dict[str, float]:
    """Chance and ceiling of the task; a ceiling of one is the axis' own end."""
    lines = {"chance": results["chance"]}
    return lines | ({"ceiling": results["ceiling"]} if results["ceiling"] < 0.995 else {})


def draw_run(run: Run, results: Results) -> None:
    """The learning curve and the score table of one training run."""
    from workbench.plots import line_plot, new_figure

    figure, axes = new_figure(width=5.2, height=3.2)
    rows = curve_rows([results])
    line_plot(
        axes,
        rows,
        x="step",
        y="accuracy",
        xlabel="optimiser step",
        ylabel="validation accuracy",
        title=f"{results['stack']} on {results['task']}",
        reference=references(results),
    )
    axes.set_ylim(0, 1.03)
    run.figure(
        "learning_curve",
        figure,
        rows,
        caption=f"Validation accuracy during training; {setting(results)}, "
        f"n = {results['n_rows']} validation rows.",
        alt=f"Accuracy goes from {rows[0]['accuracy']:.3f} at step {rows[0]['step']} to "
        f"{rows[-1]['accuracy']:.3f} at step {rows[-1]['step']}; "
        f"chance is {results['chance']:.3f}.",
    )
    skipped = ("curve", "task", "stack", "protocol")
    run.table(
        "scores",
        [{"figure": key, "value": value} for key, value in results.items() if key not in skipped],
        caption="Scores; accuracies are micro averages except `macro_batch`, which follows the "
        "published code and is for comparison only.",
    )


def comparison_rows(runs: Sequence[Results]) -> list[dict[str, Any]]:
    """One row per task and stack: the numbers of the bars."""
    return [
        {
            "task": one["task"],
            "stack": one["stack"],
            "layers": one["layers"],
            "accuracy": one["test_accuracy"],
            "low": one["test_accuracy_low"],
            "high": one["test_accuracy_high"],
            "accuracy_macro_batch": one["test_accuracy_macro_batch"],
            "chance": one["chance"],
            "ceiling": one["ceiling"],
            "steps": one["steps"],
            "parameters": one["parameters"],
            "state_floats": one["state_floats"],
            "n_scored": one["n_scored"],
            "n_rows": one["n_rows"],
        }
        for one in runs
    ]


def draw_comparison(run: Run, runs: Sequence[Results]) -> None:
    """Learning curves (left) and final test accuracies (right), one line of panels per task."""
    import numpy as np

    from workbench.plots import INK, PALETTE, bar_plot, line_plot, new_figure

    tasks = list(dict.fromkeys(one["task"] for one in runs))
    curves, scores = curve_rows(runs), comparison_rows(runs)
    figure, axes = new_figure(width=9.6, height=3.1 * len(tasks), rows=len(tasks), columns=2)
    for line, task in zip(np.atleast_2d(axes), tasks, strict=True):
        first = next(one for one in runs if one["task"] == task)
        line_plot(
            line[0],
            [row for row in curves if row["task"] == task],
            x="step",
            y="accuracy",
            series="stack",
            xlabel="optimiser step",
            ylabel="validation accuracy",
            title=f"{task}, V = {first['vocab_size']}, L = {first['seq_len']}",
            reference=references(first),
        )
        line[0].set_ylim(0, 1.03)
        bar_plot(
            line[1],
            [row for row in scores if row["task"] == task],
            label="stack",
            value="accuracy",
            low="low",
            high="high",
            xlabel="test accuracy, 95 % interval",
            reference=references(first),
        )
        line[1].set_xlim(0, 1.15)
        for index, bar in enumerate(line[1].patches):  # a stack's bar has the colour of its curve
            bar.set_facecolor(PALETTE[index % len(PALETTE)])
        if line[0].get_legend() is not None:
            line[0].get_legend().remove()
    handles, names = np.atleast_2d(axes)[0, 0].get_legend_handles_labels()
    figure.legend(
        handles,
        names,
        loc="outside lower center",
        ncols=5,
        frameon=False,
        labelcolor=INK,
        fontsize=9,
    )
    numbers = "; ".join(f"{row['task']} {row['stack']}: {row['accuracy']:.3f}" for row in scores)
    seen = sorted({row["n_rows"] for row in scores})
    run.figure(
        "comparison",
        figure,
        scores,
        caption="Left: validation accuracy during training. Right: test accuracy with 95 % "
        "Wilson intervals that allow for the dependence of answers within a row; "
        f"n = {' and '.join(map(str, seen))} rows per bar, one seed. Dotted: chance.",
        alt=f"Test accuracies. {numbers}.",
    )
    narrow = [{key: row[key] for key in row if key != "layers"} for row in scores]
    run.table(  # the figure's CSV names the layers in full
        "comparison", narrow, caption="Test accuracy by task and stack."
    )
    run.table(
        "curves", curves, caption="Validation accuracy during training (the lines of the figure)."
    )


def summarize(runs: Sequence[Results]) -> str:
    """Best and worst stack of each task in one sentence."""
    parts = []
    for task in dict.fromkeys(one["task"] for one in runs):
        ranked = sorted(
            (one for one in runs if one["task"] == task), key=lambda one: -one["test_accuracy"]
        )
        named = ", ".join(f"{one['stack']} {one['test_accuracy']:.3f}" for one in ranked)
        parts.append(f"{setting(ranked[0])} (chance {ranked[0]['chance']:.3f}): {named}")
    return "; ".join(parts) + "."
