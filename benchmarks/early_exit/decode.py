"""Decoding speed of every policy beside Hugging Face's generate, interleaved in one process.

    python benchmarks/early_exit/decode.py
    python benchmarks/early_exit/decode.py --family mamba2 --width 256 --layers 8

A random model whose blocks above the exit do nothing (their output projections are zero), so that
every exit is right and the bound is known: with the exit after block e of L, L/(e+1) in blocks.
Prints one line per setting and writes CSV with --out. Times are process CPU seconds, the median
over rounds; read the ratios, not the seconds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

THEIRS, OWN = "generate (Hugging Face)", "engine, no exits"


def zero_tail(model, layers: int, exit_layer: int):
    """Blocks above the exit add nothing to the stream."""
    stack = model.model if hasattr(model, "model") else model.backbone
    with torch.no_grad():
        for block in stack.layers[exit_layer + 1 :]:
            for name in ("self_attn.o_proj", "mlp.down_proj", "mixer.out_proj"):
                try:
                    block.get_submodule(name).weight.zero_()
                except AttributeError:
                    continue
    return model


def build(family: str, width: int, layers: int, exit_layer: int):
    """A random model whose blocks above the exit do nothing."""
    from workbench.tiny import tiny_model

    shape = {"hidden_size": width, "num_hidden_layers": layers, "vocab_size": 2048}
    if family == "mistral":
        shape |= {"intermediate_size": 8 * width // 3, "head_dim": width // 4}
    if family == "mamba2":
        shape |= {"num_heads": 2 * width // 16}
    return zero_tail(tiny_model(family, **shape), layers, exit_layer)


def engines_of(adapter, exit_layer: int) -> dict[str, Any]:
    """Every policy by name."""
    from early_exit.engine import Engine
    from early_exit.heads import Exits

    exits = Exits((exit_layer,), adapter.gate_width, adapter.width)

    def engine(threshold: float, policy: str, pending: int = 8, criterion: str = "gate"):
        return Engine(
            adapter,
            exits,
            criterion=criterion,
            threshold=threshold,
            policy=policy,
            max_pending=pending,
        )

    return {
        OWN: engine(1.0, "propagate"),
        "gate, propagate": engine(0.4, "propagate"),  # an untrained gate says 1/2
        "gate, defer 8": engine(0.4, "defer"),
        "gate, defer 32": engine(0.4, "defer", 32),
        "maxprob, propagate": engine(-0.5, "propagate", criterion="maxprob"),
        "gate, skip": engine(0.4, "skip"),
    }


def generate(model, prompt: torch.Tensor, new: int) -> torch.Tensor:
    """Greedy decoding by Hugging Face."""
    return model.generate(
        prompt[None],
        attention_mask=torch.ones_like(prompt)[None],
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
    )


def timed(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median CPU seconds of each call, all of them in turn in every round; one round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(rounds + 1):
        for name, call in calls.items():
            begin = time.process_time()
            call()
            if round_:
                seconds[name].append(time.process_time() - begin)
    return {name: statistics.median(times) for name, times in seconds.items()}


def table(
    seconds: dict[str, float], engines: dict[str, Any], adapter, prompt: torch.Tensor, new: int
) -> list[dict[str, Any]]:
    """One row per setting: time per token, ratios of times, and the speed-ups that were counted."""
    rows = []
    for name, median in seconds.items():
        tally = engines[name].decode(prompt, new).tally if name in engines else None
        speed = tally.speedups(adapter.costs(), adapter.width) if tally else {}
        rows.append(
            {
                "setting": name,
                "ms_per_token": round(1000 * median / new, 3),
                "against_generate": round(seconds[THEIRS] / median, 3),
                "against_engine": round(seconds[OWN] / median, 3),
                "blocks": round(speed.get("speedup_blocks", 1.0), 3),
                "arithmetic": round(speed.get("speedup_arithmetic", 1.0), 3),
            }
        )
    return rows


def main() -> None:
    """Time all settings, print the table, write it with --out."""
    from early_exit.adapters.base import adapt
    from workbench.tables import write_csv

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--family", default="mistral", choices=["mistral", "mamba", "mamba2"])
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--exit", type=int, default=2)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = build(options.family, options.width, options.layers, options.exit)
    adapter = adapt(model)
    prompt = torch.randint(3, 2000, (32,), generator=torch.Generator().manual_seed(0))
    new = options.new_tokens
    engines = engines_of(adapter, options.exit)
    calls: dict[str, Callable[[], Any]] = {THEIRS: lambda: generate(model, prompt, new)}
    calls |= {name: lambda one=one: one.decode(prompt, new) for name, one in engines.items()}
    rows = table(timed(calls, options.rounds), engines, adapter, prompt, new)
    bound = options.layers / (options.exit + 1)
    print(
        f"{options.family}, width {options.width}, {options.layers} blocks, exit after block "
        f"{options.exit}: bound {bound:.2f}x in blocks; torch {torch.__version__}, "
        f"{options.threads} thread(s), {options.rounds} rounds"
    )
    print(
        f"{'setting':<26}{'ms/token':>10}{'/generate':>11}{'/engine':>9}{'blocks':>8}{'arith.':>8}"
    )
    for row in rows:
        print(
            f"{row['setting']:<26}{row['ms_per_token']:>10}{row['against_generate']:>11}"
            f"{row['against_engine']:>9}{row['blocks']:>8}{row['arithmetic']:>8}"
        )
    if options.out:
        write_csv(options.out, rows)


if __name__ == "__main__":
    main()
