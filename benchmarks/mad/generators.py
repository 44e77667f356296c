"""Rows per second of the vectorised generators beside the per-row form, in one process.

    python benchmarks/mad/generators.py [--seconds 1.0] [--csv FILE]

Both forms draw the same task; the per-row form follows the published order of random calls. Each
is timed by CPU seconds, in turns, best of three. Goal: recall at least 30 x, memorization 100 x.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mad.tasks.memorization import Memorization
from mad.tasks.recall import InContextRecall, NoisyInContextRecall
from mad.tasks.task import BLOCK_ROWS, Task, generate
from workbench.tables import to_markdown, write_csv

CASES: list[tuple[str, Task, float]] = [
    ("in-context-recall V16 L128", InContextRecall(), 30),
    ("in-context-recall V128 L128", InContextRecall(vocab_size=128), 30),
    ("in-context-recall V16 L1024", InContextRecall(seq_len=1024), 30),
    ("noisy-in-context-recall V32 L128", NoisyInContextRecall(), 30),
    ("memorization V256 L32", Memorization(), 100),
    ("memorization V8192 L32", Memorization(vocab_size=8192), 100),
]


def rows_per_second(draw, rows_per_call: int, seconds: float) -> float:
    """Rate of repeated calls of `draw(call number)` over at least that many CPU seconds."""
    begin, calls = time.process_time(), 0
    while (spent := time.process_time() - begin) < seconds or not calls:
        draw(calls)
        calls += 1
    return calls * rows_per_call / spent


def measure(task: Task, seconds: float) -> tuple[float, float]:
    """Rows per second: vectorised, per row."""
    rng = np.random.default_rng(0)
    fast, slow = [], []
    for _ in range(3):
        fast.append(
            rows_per_second(
                lambda call: generate(task, BLOCK_ROWS, "train", 0, start=call * BLOCK_ROWS),
                BLOCK_ROWS,
                seconds / 3,
            )
        )
        slow.append(rows_per_second(lambda call: task.legacy_row(rng), 1, seconds / 3))
    return max(fast), max(slow)


def main() -> int:
    """Print the table; the exit status is 1 when a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="CPU seconds per measurement")
    parser.add_argument("--csv", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    rows = []
    for name, task, goal in CASES:
        fast, slow = measure(task, options.seconds)
        rows.append(
            {
                "task": name,
                "vectorised_rows_per_second": round(fast),
                "per_row_rows_per_second": round(slow),
                "ratio": round(fast / slow, 1),
                "goal": goal,
            }
        )
    print(to_markdown(rows))
    if options.csv:
        write_csv(options.csv, rows)
    return int(any(row["ratio"] < row["goal"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
