"""What self-study saves: teacher targets over a cached prompt against re-reading the prompt.

    python benchmarks/sycomode/bench_scoring.py

Same process, same rows, same targets (the largest difference is printed); the shape of the gain is
(n + T)/T for a prompt of n and conversations of T tokens.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def seconds_of(action, repeats: int = 3) -> float:
    """CPU seconds of the fastest of some runs."""
    best = float("inf")
    for _ in range(repeats):
        start = time.process_time()
        action()
        best = min(best, time.process_time() - start)
    return best


def main() -> None:
    """Time both ways of scoring at every prompt length and print the ratio."""
    import torch

    from sycomode.selfstudy import lesson
    from sycomode.students import Prompted
    from workbench.seeding import Streams
    from workbench.tiny import tiny_model

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, nargs="+", default=[64, 128, 256, 448])
    parser.add_argument("--time", type=int, default=32)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/sycomode_scoring.csv"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = tiny_model("mistral").requires_grad_(False)
    stream = Streams(0)("bench")
    talk = stream.integers(3, 259, (options.rows, options.time)).tolist()
    rows = []
    for n in options.prompts:
        prompt = stream.integers(3, 259, n).tolist()
        made = {}

        def score(cached: bool, prompt: list[int] = prompt, made: dict = made) -> None:
            teacher = Prompted(model, 1, prompt, cached=cached)
            made[cached] = lesson(teacher, talk, top_k=20)

        fast, slow = seconds_of(lambda: score(True)), seconds_of(lambda: score(False))
        a, b = made[True].targets.logp, made[False].targets.logp
        rows.append(
            {
                "prompt_tokens": n,
                "conversation_tokens": options.time,
                "cached_seconds": round(fast, 4),
                "reread_seconds": round(slow, 4),
                "ratio": round(slow / fast, 2),
                "expected_ratio": round((n + options.time) / options.time, 2),
                "largest_difference": f"{(a - b).abs().max().item():.1e}",
            }
        )
        print("  ".join(f"{key} {value}" for key, value in rows[-1].items()))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with open(options.out, "w", encoding="utf-8", newline="") as handle:
        writer = csv.DictWriter(handle, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
