"""Measure each layer: time of a training step, tokens per second, memory.

    python -m mad.profile --layers mh-attention mamba gated-deltanet
    python -m mad.profile --seq-len 1024 --batch-size 8 --device cuda       # every registered layer

A step is forward and backward of one layer; the median of several is reported, all layers being
measured in turn so that a slow spell of the machine meets all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mad.registry import LAYERS, parse_layer
from workbench.cli import RunField, RunOptions, cli
from workbench.errors import require_least
from workbench.run import Run

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@dataclass(frozen=True)
class Experiment:
    """Which layers at which size."""

    layers: tuple[str, ...] = ()
    """Layers with options if any, or module:Class; none means every registered one."""
    dim: int = 128
    """Width."""
    seq_len: int = 128
    """Tokens per sequence."""
    batch_size: int = 16
    """Sequences per step."""
    repeats: int = 7
    """Measured steps; the median counts."""
    seed: int = 12345
    """Seed of weights and inputs."""
    run: RunField = RunOptions()
    """Where and how."""

    def __post_init__(self) -> None:
        require_least(self, 1, "dim", "seq_len", "batch_size", "repeats")
        for layer in self.layers:
            parse_layer(layer)


EXPERIMENT = Experiment()  # edit me


def main(experiment: Experiment) -> dict[str, Any]:
    """Measure every layer; returns the seconds of a step by layer."""
    with Run.open("mad.profile", experiment) as run:
        if run.finished:
            return run.results
        import torch

        from mad.model import account_layer

        device, dtype = run.device.device, run.device.dtype
        texts = experiment.layers or tuple(LAYERS)
        layers: dict[str, nn.Module] = {}
        for text in texts:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(run.streams.integer(f"init/{text}"))
                layer = parse_layer(text).make(experiment.dim, experiment.seq_len)
            layers[text] = layer.to(device)
        shape = (experiment.batch_size, experiment.seq_len, experiment.dim)
        x = torch.randn(shape, generator=run.streams.torch("inputs")).to(device)

        memory = {text: measure_memory(layer, x, dtype) for text, layer in layers.items()}
        times: dict[str, list[float]] = {text: [] for text in texts}
        for _ in run.progress(range(experiment.repeats), "repeats"):
            for text, layer in layers.items():
                times[text].append(measure_step(layer, x, dtype))

        rows = []
        for text, layer in layers.items():
            seconds = sorted(times[text])[len(times[text]) // 2]
            cost = account_layer(layer, experiment.seq_len)
            rows.append(
                {
                    "layer": text,
                    "ms_per_step": 1e3 * seconds,
                    "fastest_ms": 1e3 * min(times[text]),
                    "tokens_per_second": experiment.batch_size * experiment.seq_len / seconds,
                    **memory[text],
                    "parameters": cost.params,
                    "state_floats": cost.state_floats,
                    "gflops_per_second": 3e-9  # backward counts twice the forward
                    * cost.flops_per_token
                    * experiment.batch_size
                    * experiment.seq_len
                    / seconds,
                }
            )
        rows.sort(key=lambda row: row["ms_per_step"])
        draw(run, experiment, rows)
        for row in rows:
            run.note(
                f"{row['layer']:<34} {row['ms_per_step']:>9.2f} ms  "
                f"{row['tokens_per_second']:>11.0f} tokens/s  {row['saved_mib']:>8.1f} MiB saved"
            )
        fastest, slowest = rows[0], rows[-1]
        return run.finish(
            {f"seconds_{row['layer']}": row["ms_per_step"] / 1e3 for row in rows}
            | {"layers": len(rows), "device": str(device)},
            title="What a training step of each layer takes",
            question="How fast is each layer, and how much does it keep in memory?",
            summary=f"{run.device.describe()}; width {experiment.dim}, {experiment.seq_len} tokens "
            f"× {experiment.batch_size} sequences: from {fastest['ms_per_step']:.2f} ms "
            f"({fastest['layer']}) to {slowest['ms_per_step']:.2f} ms ({slowest['layer']}).",
        )


def step(layer: nn.Module, x: Tensor, dtype: torch.dtype) -> None:
    """Forward and backward once, with mixed precision where the run has it."""
    import torch

    mixed = dtype in (torch.bfloat16, torch.float16)
    with torch.autocast(x.device.type, dtype, enabled=mixed):
        y = layer(x)
    torch.autograd.grad(y.float().sum(), list(layer.parameters()), allow_unused=True)


def synchronise(x: Tensor) -> None:
    """Wait for the device, where it works on its own."""
    import torch

    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)


def measure_step(layer: nn.Module, x: Tensor, dtype: torch.dtype) -> float:
    """Seconds of one step."""
    import time

    synchronise(x)
    begin = time.perf_counter()
    step(layer, x, dtype)
    synchronise(x)
    return time.perf_counter() - begin


def measure_memory(layer: nn.Module, x: Tensor, dtype: torch.dtype) -> dict[str, float | None]:
    """MiB that the forward pass keeps for the backward pass, and the device's peak (CUDA only).

    Counted are the different storages that autograd saves, without the weights and the input.
    """
    import torch

    step(layer, x, dtype)  # whatever is built on first use is not counted
    known = {t.untyped_storage().data_ptr() for t in (x, *layer.parameters(), *layer.buffers())}
    saved: dict[int, int] = {}
    kept: list[Tensor] = []  # alive to the end: an address is not used twice

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    if x.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(x.device)
        before = torch.cuda.memory_allocated(x.device)
        step(layer, x, dtype)
        peak = (torch.cuda.max_memory_allocated(x.device) - before) / 2**20
    else:
        peak = None
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step(layer, x, dtype)
    return {"saved_mib": sum(saved.values()) / 2**20, "peak_mib": peak}


def draw(run: Run, experiment: Experiment, rows: list[dict[str, Any]]) -> None:
    """The table and the bars."""
    from workbench.plots import bar_plot, new_figure

    size = (
        f"width {experiment.dim}, {experiment.seq_len} tokens × {experiment.batch_size} sequences, "
        f"{run.device.describe()}"
    )
    caption = (
        f"Forward and backward of one layer: median of {experiment.repeats} steps; {size}. "
        "`saved_mib`: what autograd keeps for the backward pass."
    )
    run.table("profile", rows, caption=caption)
    figure, axes = new_figure(width=6.4, height=1.2 + 0.27 * len(rows))
    bar_plot(axes, rows, label="layer", value="ms_per_step", xlabel="ms per step", digits=2)
    numbers = "; ".join(f"{row['layer']}: {row['ms_per_step']:.2f}" for row in rows)
    run.figure(
        "profile",
        figure,
        rows,
        caption=f"Milliseconds per training step of one layer; {size}, n = {experiment.repeats}.",
        alt=f"Milliseconds per step. {numbers}.",
    )


if __name__ == "__main__":
    cli(main, EXPERIMENT)
