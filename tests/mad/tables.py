"""Finished benchmarks made by hand, as files that mad.plot and mad.leaderboard read."""

from pathlib import Path

from mad.grid import BENCHMARK_TASKS
from workbench.storage import write_json


def score_rows(stack: str, accuracies: dict[str, float], mean: str = "MAD") -> list[dict]:
    """Rows of a table of scores, the mean last; every interval is ± 0.02."""
    scores = accuracies | {mean: sum(accuracies.values()) / len(accuracies)}
    return [
        {
            "stack": stack,
            "task": task,
            "accuracy": value,
            "low": value - 0.02,
            "high": value + 0.02,
            "test_max": value + 0.01,
            "optimism": 0.01,
            "normalised": value,
            "accuracy_macro_batch": value,
            "chance": 0.1,
            "ceiling": 1.0,
            "settings": 1 if task in BENCHMARK_TASKS else len(accuracies),
            "diverged": 0,
        }
        for task, value in scores.items()
    ]


def six(start: float) -> dict[str, float]:
    """Accuracies of the six tasks, rising by 0.05 from `start`."""
    return {task: start + 0.05 * i for i, task in enumerate(BENCHMARK_TASKS)}


def write_benchmark(
    root: Path,
    name: str,
    models: dict[str, dict[str, float]],
    *,
    design: str = "0123abcd",
    preset: str = "full",
    mean: str = "MAD",
) -> Path:
    """A folder of a finished benchmark with these accuracies by model and task."""
    values = {
        "preset": preset,
        "design": design,
        "n_rows": 1280,
        "runs": len(models),
        "diverged": 0,
        "models": [
            {"stack": stack, "layers": ["mlp"], "scores": score_rows(stack, tasks, mean)}
            for stack, tasks in models.items()
        ],
    }
    folder = root / "mad" / name
    folder.mkdir(parents=True)
    write_json(folder / "results.json", {"values": values})
    return folder
