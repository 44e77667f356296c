"""Rows per second of the vectorised generators beside the per-row form, in one process.

    python benchmarks/mad/generators.py [--seconds 1.0] [--csv FILE]
    python benchmarks/mad/generators.py --all      # time all 66 published data sets

Both forms draw the same task; the per-row form follows the published order of random calls. For
fuzzy recall it lists all motifs of every size for every row and chooses from the lists, as a plain
program does. Each is timed by CPU seconds, in turns, best of three. Goals: recall at least 30 x,
memorization and compression 100 x, selective copying 4 x, fuzzy recall 10 x at V 16 and 1000 x at
V 128; all data sets within five minutes.
"""

import argparse
import itertools
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mad.dataset import published_sets
from mad.tasks.compression import Compression
from mad.tasks.copying import Copying, SelectiveCopying
from mad.tasks.fuzzy import FuzzyInContextRecall
from mad.tasks.memorization import Memorization
from mad.tasks.mqar import MultiQueryRecall
from mad.tasks.recall import InContextRecall, NoisyInContextRecall
from mad.tasks.task import BLOCK_ROWS, Task, generate
from workbench.tables import to_markdown, write_csv


class ListedDeck:
    """All motifs of one size as a shuffled list."""

    def __init__(self, rng: np.random.Generator, tokens: int, size: int, first: int) -> None:
        self.motifs = list(itertools.permutations(range(first, first + tokens), size))
        rng.shuffle(self.motifs)

    def draw(self, rng: np.random.Generator) -> tuple[int, ...]:
        """A uniform motif."""
        return tuple(rng.choice(self.motifs).tolist())


@dataclass(frozen=True)
class PlainFuzzy(FuzzyInContextRecall):
    """Fuzzy recall whose per-row form lists the motifs."""

    deck: ClassVar[type] = ListedDeck


CASES: list[tuple[str, Task, float]] = [
    ("in-context-recall V16 L128", InContextRecall(), 30),
    ("in-context-recall V128 L128", InContextRecall(vocab_size=128), 30),
    ("in-context-recall V16 L1024", InContextRecall(seq_len=1024), 30),
    ("noisy-in-context-recall V32 L128", NoisyInContextRecall(), 30),
    ("fuzzy-in-context-recall V16 L128", PlainFuzzy(), 10),
    ("fuzzy-in-context-recall V32 L128", PlainFuzzy(vocab_size=32), 10),
    ("fuzzy-in-context-recall V128 L128", PlainFuzzy(vocab_size=128), 1000),
    ("selective-copying V16 L256", SelectiveCopying(), 4),
    ("selective-copying V16 L1024", SelectiveCopying(seq_len=1024), 4),
    ("copying V16 L256", Copying(), 4),
    ("compression V16 L32", Compression(), 100),
    ("compression V16 L256", Compression(seq_len=256), 0),
    ("mqar V8192 L64, 8 pairs", MultiQueryRecall(), 0),
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


def time_all() -> list[dict[str, float | str]]:
    """CPU seconds of every task's data sets of the published grid, all three splits."""
    rows: dict[str, dict[str, float | str]] = {}
    for data in published_sets():
        row = rows.setdefault(
            data.task, {"task": data.task, "data_sets": 0, "rows": 0, "cpu_seconds": 0.0}
        )
        begin = time.process_time()
        for split, n in data.sizes.items():
            for start in range(0, n, 4 * BLOCK_ROWS):
                generate(data.setting, min(4 * BLOCK_ROWS, n - start), split, data.seed, start)
            row["rows"] += n
        row["cpu_seconds"] += time.process_time() - begin
        row["data_sets"] += 1
    total = {"task": "all"}
    for name in ("data_sets", "rows", "cpu_seconds"):
        total[name] = sum(row[name] for row in rows.values())
    return [row | {"cpu_seconds": round(row["cpu_seconds"], 2)} for row in (*rows.values(), total)]


def main() -> int:
    """Print the table; the exit status is 1 when a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="CPU seconds per measurement")
    parser.add_argument("--csv", type=Path, help="also write the rows to this file")
    parser.add_argument("--all", action="store_true", help="time all 66 data sets instead")
    options = parser.parse_args()
    if options.all:
        rows = time_all()
        print(to_markdown(rows))
        if options.csv:
            write_csv(options.csv, rows)
        return int(rows[-1]["cpu_seconds"] > 300)
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
