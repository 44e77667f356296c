"""Tokens per second of a compressed model at batch 1, by how its codes are used.

    python -m lplr_q.throughput --model runs/lplr_q/run-1234/models/lplr-2.5
    python -m lplr_q.throughput --model micro-mistral --codebook tcq --rank 8
    python -m lplr_q.throughput --model FOLDER --device cuda --compile reduce-overhead

Single-token steps with a cache, after a warm-up. Variants: `dense` (every compressed layer as an
ordinary layer in the run's number format), `dequant` (codes decoded in every step), `kernel`
(products with the codes where they are compiled, factors kept decoded), `cached` (dense matrix
kept by the layer), each of the coded ones also without the factors L R: what these cost. Variants
take turns; the fastest of `repeats` turns counts. A model that is not compressed gets random codes
of the given form: speed does not depend on their values.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from workbench.cli import RunField, RunOptions, cli
from workbench.errors import ConfigError, require_least
from workbench.run import Run

if TYPE_CHECKING:
    import torch

VARIANTS = ("dense", "dequant", "kernel", "cached")


@dataclass(frozen=True)
class Experiment:
    """Which model, which variants, how long."""

    model: str = "micro-mistral"
    """Folder of a compressed model, or any model: built-in name, folder, hub id."""
    codebook: str = "e8p"
    """For a model that is not compressed: codebook of Q."""
    q_bits: int = 2
    """Bits of Q."""
    rank: int = 8
    """Components of L R in every layer."""
    factor_bits: int | tuple[int, int] = 4
    """Bits per entry of L and R, or two numbers: of L, of R."""
    variants: tuple[str, ...] = VARIANTS
    """dense, dequant, kernel, cached."""
    without_factors: bool = True
    """Also measure the coded variants without L R."""
    tokens: int = 128
    """Steps per turn (500 in the published tables)."""
    warmup: int = 8
    """Steps before the clock starts."""
    repeats: int = 3
    """Turns of each variant."""
    compile: Literal["no", "default", "reduce-overhead"] = "no"
    """torch.compile of the step; reduce-overhead uses CUDA graphs."""
    seed: int = 0
    """Seed of random codes and of the first token."""
    run: RunField = RunOptions()

    def __post_init__(self) -> None:
        unknown = sorted(set(self.variants) - set(VARIANTS))
        if unknown or not self.variants or len(set(self.variants)) < len(self.variants):
            raise ConfigError(
                f"variants={','.join(self.variants)}: choose different ones of "
                f"{', '.join(VARIANTS)}"
            )
        require_least(self, 1, "tokens", "repeats")
        if self.warmup < 0 or self.rank < 0:
            raise ConfigError("warmup and rank cannot be negative")


EXPERIMENT = Experiment()  # edit me


def main(experiment: Experiment) -> dict[str, Any]:
    """Measure every variant; returns the rows of the table."""
    with Run.open("lplr_q.throughput", experiment) as run:
        return run.results if run.finished else _measure(run, experiment)


def _measure(run: Run, e: Experiment) -> dict[str, Any]:
    from lplr_q.kernels.dispatch import status

    device = run.device.device
    if e.compile == "reduce-overhead" and device.type != "cuda":
        raise ConfigError("--compile reduce-overhead uses CUDA graphs; --device cuda has them")
    model = _subject(run, e)
    run.note(status(device, grouped=any(x.form.q_group > 0 for x in _layers(model))))
    cases = [(v, True) for v in e.variants]
    if e.without_factors and any(layer.rank for layer in _layers(model)):
        cases += [(v, False) for v in e.variants if v != "dense"]
    turns: dict[tuple[str, bool], list[dict[str, Any]]] = {case: [] for case in cases}
    for turn in range(e.repeats):
        for case in run.progress(cases, f"turn {turn + 1}"):
            name = f"{case[0]}/{'whole' if case[1] else 'q-only'}/{turn}"
            turns[case].append(run.once(name, lambda c=case: _one_turn(run, e, model, *c)))
    rows = [_row(case, found, e.tokens) for case, found in turns.items()]
    return _report(run, e, model, rows)


def _subject(run: Run, e: Experiment) -> Any:
    """The compressed model; with random codes if it was not compressed."""
    model, _ = run.load_model(e.model)
    if not list(_layers(model)):
        generator = run.streams.torch("codes")
        count = put_random_codes(
            model, e.codebook, e.q_bits, e.rank, e.factor_bits, generator=generator
        )
        run.note(f"{e.model} is not compressed: {count} layers get random {e.codebook} codes")
    return model.to(run.device.device).requires_grad_(False)


def _layers(model: Any) -> list[Any]:
    from lplr_q.activation_aware.quantized_layer import quantised_layers

    return [layer for _, layer in quantised_layers(model)]


def put_random_codes(
    model: Any,
    codebook: str,
    q_bits: int,
    rank: int,
    factor_bits: int | tuple[int, int],
    *,
    generator: torch.Generator,
) -> int:
    """Replace every linear layer of the decoder blocks by a layer of random codes whose matrix has
    the same rms; returns how many."""
    import torch

    from lplr_q.activation_aware.discovery import linear_names, linear_weight, unfuse_experts
    from lplr_q.activation_aware.quantized_layer import LPLRQuantizedLinear

    unfuse_experts(model)
    names = [name for block in linear_names(model).values() for name in block]
    for name in names:
        old = model.get_submodule(name)
        weight = linear_weight(old)
        m, n = weight.shape
        layer = LPLRQuantizedLinear(
            n, m, codebook=codebook, q_bits=q_bits, rank=min(rank, m, n), factor_bits=factor_bits,
            bias=old.bias is not None, dtype=weight.dtype,
        )  # fmt: skip
        rms = float(weight.float().square().mean().sqrt())
        for key, buffer in layer.named_buffers():
            if key == "q_scale":
                buffer.copy_(torch.tensor([rms]).view(torch.int32))
            elif key.endswith("_scales"):
                buffer.fill_(int(torch.tensor(0.1 * rms**0.5).bfloat16().view(torch.int16)))
            elif buffer.dtype == torch.uint8:
                buffer.random_(0, 256, generator=generator)
            elif key in ("l_codes", "r_codes") and layer.form.side_bits(key[0]) == 16:
                values = torch.randn(buffer.shape, generator=generator) * 0.1 * rms**0.5
                buffer.copy_(values.bfloat16().view(torch.int16))
            else:
                buffer.random_(-(2**15), 2**15, generator=generator)
        if old.bias is not None:
            layer.bias = torch.nn.Parameter(old.bias.detach(), requires_grad=False)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer)
    return len(names)


def variant_of(model: Any, variant: str, *, factors: bool) -> Any:
    """A copy of the model whose compressed layers work as ``variant`` says."""
    import copy

    import torch

    from lplr_q.activation_aware.components import take_factors
    from lplr_q.activation_aware.quantized_layer import quantised_layers

    made = copy.deepcopy(model)
    for name, layer in list(quantised_layers(made)):
        if variant == "dense":
            dtype = next(model.parameters()).dtype
            weight = torch.nn.Parameter(layer.dequantize().to(dtype), requires_grad=False)
            plain = torch.nn.Linear(1, 1, bias=False, device="meta")
            plain.in_features, plain.out_features = layer.in_features, layer.out_features
            plain.weight, plain.bias = weight, layer.bias
            parent, _, last = name.rpartition(".")
            setattr(made.get_submodule(parent), last, plain)
            continue
        if not factors and layer.rank and layer.form.q_bits:
            take_factors(layer)
        layer.set_mode(variant)
    return made


class Steps:
    """Single-token steps of a model with its cache; starts anew when the context is full."""

    def __init__(self, model: Any, compile_mode: str, device: torch.device, first: int) -> None:
        import torch

        self.model, self.device = model, device
        self.limit = getattr(model.config, "max_position_embeddings", None) or 1 << 30
        self.static = compile_mode != "no"
        self.call = model
        if self.static:
            mode = None if compile_mode == "default" else compile_mode
            self.call = torch.compile(model, mode=mode)
        self.token = torch.tensor([[first]], device=device)
        self.state: dict[str, Any] = {}
        self.position = 0

    def _start(self) -> None:
        self.position, self.state = 0, {}
        if self.static:
            from transformers import StaticCache

            length = min(self.limit, 1024)
            cache = StaticCache(config=self.model.config, max_cache_len=length)
            self.limit, self.state = length, {"past_key_values": cache}

    def one(self) -> None:
        """One token; the most likely one is the next input."""
        if self.position == 0 or self.position >= self.limit:
            self._start()
        out = self.call(input_ids=self.token, use_cache=True, **self.state)
        for key in ("past_key_values", "cache_params"):
            if out.get(key) is not None:
                self.state = {key: out[key]}
        self.token = out.logits[:, -1:].argmax(-1)
        self.position += 1

    def many(self, count: int) -> float:
        """Seconds of ``count`` steps."""
        import torch

        with torch.inference_mode():
            self._wait()
            begin = time.perf_counter()
            for _ in range(count):
                self.one()
            self._wait()
            return time.perf_counter() - begin

    def _wait(self) -> None:
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _one_turn(run: Run, e: Experiment, model: Any, variant: str, factors: bool) -> dict[str, Any]:
    import torch

    device = run.device.device
    made = variant_of(model, variant, factors=factors)
    first = int(run.streams("first token").integers(3, model.config.vocab_size))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    steps = Steps(made, e.compile, device, first)
    steps.many(max(4 if steps.static else 1, e.warmup))  # the first ones compile
    run.check_interrupt()
    seconds = steps.many(e.tokens)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return {"seconds": seconds, "bytes": held_bytes(made), "peak_bytes": peak}


def held_bytes(model: Any) -> int:
    """Bytes of the model's tensors, with what its compressed layers keep decoded."""
    seen = {
        t.data_ptr(): t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()]
    }
    return sum(seen.values()) + sum(layer.kept_bytes() for layer in _layers(model))


def _row(case: tuple[str, bool], turns: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
    seconds = min(t["seconds"] for t in turns)
    return {
        "variant": case[0],
        "factors": case[1],
        "tokens_per_second": tokens / seconds,
        "milliseconds_per_token": 1000 * seconds / tokens,
        "model_megabytes": turns[0]["bytes"] / 1e6,
        "peak_megabytes": max(t["peak_bytes"] for t in turns) / 1e6 or None,
    }


def _report(run: Run, e: Experiment, model: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    from workbench.plots import bar_plot, new_figure

    by_case = {(r["variant"], r["factors"]): r for r in rows}
    reference = by_case.get(("dense", True))
    for row in rows:
        if reference is not None:
            row["speed_over_dense"] = row["tokens_per_second"] / reference["tokens_per_second"]
        bare = by_case.get((row["variant"], False))
        if row["factors"] and bare is not None:
            row["factor_cost"] = row["milliseconds_per_token"] / bare["milliseconds_per_token"] - 1
    for row in rows:
        for key in ("speed_over_dense", "factor_cost"):
            row.setdefault(key, None)
    layers = _layers(model)
    bits = sum(layer.stored_bits().total for layer in layers) / max(
        1, sum(layer.stored_bits().weights for layer in layers)
    )
    drawn = [
        {**row, "part": "Q + L R" if row["factors"] or row["variant"] == "dense" else "Q alone"}
        for row in rows
    ]
    figure, axes = new_figure()
    bar_plot(
        axes,
        drawn,
        label="variant",
        value="tokens_per_second",
        series="part",
        xlabel="tokens per second",
    )
    said = ", ".join(
        f"{r['variant']}{'' if r['factors'] else ' without factors'} {r['tokens_per_second']:.1f}"
        for r in rows
    )
    caption = (
        f"Tokens per second at batch 1, {e.model}, {bits:.2f} bits per weight, "
        f"{run.device.device}, {run.device.threads} threads; n = {e.tokens} tokens, fastest of "
        f"{e.repeats} turns."
    )
    run.figure("throughput", figure, drawn, caption=caption, alt=f"Tokens per second: {said}.")
    run.table("throughput", rows, caption=caption)
    return run.finish(
        {"bits_per_weight": bits, "seconds": {"rows": rows}},
        title="Speed of generation, one token at a time",
        question="What do codes cost or save at batch 1?",
        summary=f"Tokens per second: {said}.",
    )


if __name__ == "__main__":
    cli(main, EXPERIMENT)
