"""Times on a GPU: rounding, one decoder layer of a 7B model, products with codes, cost of L R.

    python benchmarks/lplr_q/gpu.py                              # the first CUDA device
    python benchmarks/lplr_q/gpu.py --only gemv layer            # a few minutes less
    python benchmarks/lplr_q/gpu.py --device cpu --size 256      # rehearsal: every part, small

`rounding` is one pass of LDLQ (E8P, 2 bits), `decoder` the seven matrices of a decoder layer with
their four Hessians, `gemv` the product of one activation with codes, `layer` whole compressed
layers (rotations included) with and without L R, beside dense ones. Products go round through
copies of a matrix that together exceed the cache, so that they read memory as decoding does; on
CUDA they are also replayed as one graph, without the cost of launching them. The share of the
bandwidth is bytes of codes over seconds, against a copy in the same process. Rows go to gpu.csv
beside this file on a GPU only.
"""

import argparse
import math
import platform
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from layer import random_codes, random_layer

from lplr_q.activation_aware.decompose import decompose, prepare_hessian
from lplr_q.codebooks.base import make_codebook
from lplr_q.kernels import dispatch
from lplr_q.kernels.product import product
from lplr_q.linalg.hadamard import random_signs, rotate_weight
from lplr_q.linalg.ldlq import CodebookBlocks, guarded_sweep, ldlq, weighted_loss
from workbench.tables import write_csv

INNER = 11008 / 4096
"""Width of the feed-forward part over that of the model, Llama-2 7B."""
DTYPES = (torch.float16, torch.bfloat16)
Row = dict[str, Any]


def row(item: str, shape: str, value: float, unit: str, target: str = "") -> Row:
    """One measured number; ``target`` is what was asked for."""
    return {"item": item, "shape": shape, "value": value, "unit": unit, "target": target}


class Clock:
    """Seconds on one device, waiting for what was launched."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device, self.repeats = device, repeats

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def once(self, function: Callable[[], Any]) -> tuple[float, Any]:
        """Seconds and result of one call."""
        self.wait()
        begin = time.perf_counter()
        result = function()
        self.wait()
        return time.perf_counter() - begin, result

    def smallest(self, function: Callable[[], Any]) -> float:
        """Smallest seconds of a call, after two that compile and fill caches."""
        self.once(function)
        self.once(function)
        return min(self.once(function)[0] for _ in range(self.repeats))

    def replayed(self, function: Callable[[], Any]) -> float | None:
        """As :meth:`smallest`, the launches captured in a graph; None where there is no graph."""
        if self.device.type != "cuda":
            return None
        self.once(function)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                function()
        except RuntimeError as error:
            print(f"no graph: {str(error).splitlines()[0]}")
            return None
        return self.smallest(graph.replay)

    def free(self) -> int:
        """Bytes allocated at most since the last call."""
        if self.device.type != "cuda":
            return 0
        peak = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        return peak


# ---------------------------------------------------------------- compressing


def second_moment(n: int, device: torch.device) -> torch.Tensor:
    """H of inputs whose channels decay as a power."""
    generator = torch.Generator(device).manual_seed(n)
    total = torch.zeros(n, n, device=device)
    spread = torch.arange(1, n + 1, device=device) ** -0.25
    for _ in range(8):
        x = torch.randn(max(1, n // 4), n, generator=generator, device=device) * spread
        total += x.T @ x
    return total / total.diagonal().mean()


def matrix(m: int, n: int, device: torch.device) -> torch.Tensor:
    """Weights with a decaying spectrum and noise."""
    generator = torch.Generator(device).manual_seed(m + n)
    few = max(1, min(m, n) // 8)
    left = torch.randn(m, few, generator=generator, device=device)
    right = torch.randn(few, n, generator=generator, device=device)
    size = torch.arange(1, few + 1, device=device) ** -0.6
    noise = torch.randn(m, n, generator=generator, device=device)
    return 0.02 * (left * size @ right / n**0.5 + 0.3 * noise)


def rounding(clock: Clock, size: int) -> Iterator[Row]:
    """Seconds of LDLQ and of a guarded sweep, E8P at 2 bits."""
    shape, device = f"{size} x {size}", clock.device
    hessian, weight = second_moment(size, device), matrix(size, size, device)
    generator = torch.Generator().manual_seed(0)
    seconds, prepared = clock.once(lambda: prepare_hessian(hessian, size, generator=generator))
    assert prepared.signs_in is not None
    weight = rotate_weight(weight, random_signs(size, generator), prepared.signs_in)
    weight = weight / weight.square().mean().sqrt()
    yield row("Hessian: regularise, rotate, factor", shape, seconds, "s")
    seconds, lower = clock.once(lambda: prepared.lower_for(8))
    yield row("block LDL", shape, seconds, "s")
    blocks = CodebookBlocks(make_codebook("e8p", 2), size)
    codes, points = ldlq(weight, lower, blocks)
    single = prepared.single()
    seconds = clock.smallest(lambda: ldlq(weight, lower, blocks))
    yield row("LDLQ, E8P 2 bits", shape, seconds, "s", "<= 3")
    seconds = clock.smallest(lambda: guarded_sweep(weight, single, blocks, codes, points))
    yield row("guarded sweep, E8P 2 bits", shape, seconds, "s")
    error = math.sqrt(weighted_loss(weight - points, single) / weighted_loss(weight, single))
    yield row("relative error of LDLQ, E8P 2 bits", shape, error, "")


def decoder(clock: Clock, size: int, rank: int, rounds: int) -> Iterator[Row]:
    """Seconds of the seven matrices of a decoder layer, Hessians included."""
    inner = 8 * round(size * INNER / 8)
    groups = {
        "q, k, v": [(size, size)] * 3,
        "o": [(size, size)],
        "gate, up": [(inner, size)] * 2,
        "down": [(size, inner)],
    }
    whole = 0.0
    for name, shapes in groups.items():
        n = shapes[0][1]
        hessian, generator = second_moment(n, clock.device), torch.Generator().manual_seed(n)
        clock.free()
        seconds, prepared = clock.once(
            lambda h=hessian, g=generator: prepare_hessian(h, len(h), generator=g)
        )
        for m, n in shapes:
            weight = matrix(m, n, clock.device)
            more, result = clock.once(
                lambda w=weight, p=prepared, g=generator: decompose(
                    w, p, rank=rank, rounds=rounds, generator=g
                )
            )
            seconds += more
        whole += seconds
        shape = f"{len(shapes)} x {m} x {n}"
        yield row(f"{name}: E8P 2 bits, rank {rank}, {rounds} rounds", shape, seconds, "s")
        yield row(f"{name}: relative error", shape, result.error, "")
        yield row(f"{name}: peak memory", shape, clock.free() / 2**30, "GiB")
        del hessian, prepared, weight, result
    shape = f"{size} wide, {inner} inside"
    yield row(f"decoder layer, rank {rank}, {rounds} rounds", shape, whole, "s", "<= 60")


# ---------------------------------------------------------------- products


def bandwidth(clock: Clock, size: int) -> float:
    """Bytes per second, read and written, of a copy that exceeds the cache by far."""
    source = torch.ones(max(2**16, 32 * size * size), dtype=torch.int16, device=clock.device)
    goal = torch.empty_like(source)
    return 2 * source.numel() * 2 / clock.smallest(lambda: goal.copy_(source))


def copies(each: int, device: torch.device) -> int:
    """How many matrices of ``each`` bytes exceed the cache four times over."""
    if device.type != "cuda":
        return 2
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 2**26
    return max(2, -(-4 * cache // each))


def in_turn(
    clock: Clock, forms: list[Callable[[], Any]], *, graph: bool = True
) -> dict[str, float]:
    """Milliseconds of one form when all are run one after the other, launched and replayed."""

    def all_of_them() -> None:
        for form in forms:
            form()

    found: dict[str, float | None] = {"launched": clock.smallest(all_of_them)}
    found["graph"] = clock.replayed(all_of_them) if graph else None
    return {k: 1000 * v / len(forms) for k, v in found.items() if v is not None}


def dense(clock: Clock, size: int, dtype: torch.dtype) -> dict[str, float]:
    """Milliseconds of a product with a dense matrix."""
    count = copies(size * size * dtype.itemsize, clock.device)
    options = {"device": clock.device, "dtype": dtype}
    x = torch.randn(1, size, **options)
    weights = [torch.randn(size, size, **options) for _ in range(count)]
    linear = torch.nn.functional.linear
    return in_turn(clock, [lambda w=w: linear(x, w) for w in weights])


def gemv(clock: Clock, size: int) -> Iterator[Row]:
    """Products of one activation: codes against dense matrices and against a copy."""
    shape, device = f"{size} x {size}", clock.device
    speed = bandwidth(clock, size)
    yield row("copy", "", speed / 1e9, "GB/s")
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        for how, found in dense(clock, size, dtype).items():
            share = size * size * dtype.itemsize / (found / 1000) / speed
            yield row(f"dense {name}, {how}", shape, found, "ms")
            yield row(f"dense {name}, {how}: share of the bandwidth", shape, share, "")
    scale = torch.ones(1, device=device).view(torch.int32)
    x = torch.randn(1, size, device=device, dtype=torch.float16)
    for book, bits in (("e8p", 2), ("e8p", 3), ("e8p", 4), ("tcq", 2)):
        generator = torch.Generator().manual_seed(0)
        first = [part.to(device) for part in random_codes(book, bits, size, generator)]
        size_of = sum(part.numel() * part.element_size() for part in first)
        many = [[part.clone() for part in first] for _ in range(copies(size_of, device))]
        compiled = dispatch.gemv(x, first, None, scale, book, bits, size) is not None
        if not compiled:
            many = many[:2]  # torch decodes: slow, and not bound by reading codes
        forms = [
            lambda c=c, b=book, k=bits: product(x, c, None, scale, b, k, size, 0, True, 0)
            for c in many
        ]
        form = f"{book} {bits} bits, {'kernel' if compiled else 'decoded by torch'}"
        for how, found in in_turn(clock, forms, graph=compiled).items():
            share = size_of / (found / 1000) / speed
            target = ">= 0.6" if (book, bits, how) == ("e8p", 2, "graph") else ""
            yield row(f"{form}, {how}", shape, found, "ms")
            yield row(f"{form}, {how}: share of the bandwidth", shape, share, "", target)


def layer(clock: Clock, size: int, ranks: list[int]) -> Iterator[Row]:
    """Whole layers, rotations included, and what L R adds to them."""
    shape, device = f"{size} x {size}", clock.device
    count = copies(size * size // 4, device)
    for dtype in DTYPES:
        name, alone = str(dtype).removeprefix("torch."), {}
        x = torch.randn(1, size, device=device, dtype=dtype)
        for rank in (0, *ranks):
            layers = [random_layer(size, rank, device) for _ in range(count)]
            for how, found in in_turn(clock, [partial(one, x) for one in layers]).items():
                form = f"layer, E8P 2 bits, rank {rank}, {name}, {how}"
                yield row(form, shape, found, "ms")
                alone.setdefault(how, found)
                if rank:
                    target = "<= 0.15" if how == "graph" else ""
                    yield row(f"{form}: L R adds", shape, found / alone[how] - 1, "", target)
            del layers


# ---------------------------------------------------------------- the whole


PARTS = ("rounding", "decoder", "gemv", "layer")


def measured(parts: list[str], clock: Clock, a: argparse.Namespace) -> Iterator[Row]:
    """Rows of the parts asked for."""
    ranks = [rank for rank in a.ranks if rank <= a.size]
    found = {
        "rounding": lambda: rounding(clock, a.size),
        "decoder": lambda: decoder(clock, a.size, min(a.rank, a.size), a.rounds),
        "gemv": lambda: gemv(clock, a.size),
        "layer": lambda: layer(clock, a.size, ranks),
    }
    for part in parts:
        for one in found[part]():
            yield {"part": part, **one}


def main(words: list[str] | None = None) -> list[Row]:
    """Measure the parts asked for; the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", type=int, default=4096, help="width; a multiple of 8")
    parser.add_argument("--rank", type=int, default=256, help="of the decoder layer")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    arguments = parser.parse_args(words)
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.exit(2, "no CUDA device; --device cpu --size 256 rehearses\n")
    if arguments.size % 8 or arguments.size < 8:
        parser.error(f"--size {arguments.size}: expected a multiple of 8")
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else platform.processor() or "cpu"
    print(f"{name}, torch {torch.__version__}; {dispatch.status(device)}")
    rows = []
    with torch.inference_mode():
        for one in measured(arguments.only, Clock(device, arguments.repeats), arguments):
            target = f"   (asked for: {one['target']})" if one["target"] else ""
            print(f"{one['item']:<60} {one['shape']:<18} {one['value']:.4g} {one['unit']}{target}")
            rows.append({**one, "device": name, "torch": torch.__version__})
            if cuda:  # a row is written as soon as it is there
                write_csv(Path(__file__).with_suffix(".csv"), rows)
    return rows


if __name__ == "__main__":
    main()
