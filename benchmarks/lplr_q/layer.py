"""One compressed layer at batch 1: codes decoded by torch, decoded in C, multiplied in C, dense.

    python benchmarks/lplr_q/layer.py --size 4096

All forms of a matrix take turns in one process on one thread; the smallest times and their ratios
are printed and written beside this file. `torch` decodes all codes with plain torch and multiplies
(the form without a compiler); `tiles` decodes tile by tile in C; `codes` multiplies with the codes
in C; `dense` is the product with a dense float32 matrix. `factors` is what L R adds to a whole
layer in mode `kernel` (rotation included), against the same layer without them.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch

from lplr_q.activation_aware.components import take_factors
from lplr_q.activation_aware.layer_state import code_layout, decode_rows
from lplr_q.activation_aware.quantized_layer import LPLRQuantizedLinear
from lplr_q.codebooks.base import make_codebook
from lplr_q.kernels import dispatch
from lplr_q.kernels.product import product
from workbench.tables import write_csv

BOOKS = (("e8p", 2), ("e8p", 4), ("tcq", 2))


def smallest(forms: dict[str, Callable], repeats: int) -> dict[str, float]:
    """Smallest CPU milliseconds of every form, run in turns."""
    found = {name: float("inf") for name in forms}
    for _ in range(repeats):
        for name, function in forms.items():
            begin = time.process_time()
            function()
            found[name] = min(found[name], 1000 * (time.process_time() - begin))
    return found


def random_codes(name: str, bits: int, size: int, generator: torch.Generator) -> list:
    """Code tensors of a square matrix; any integers are codes."""
    parts = []
    for shape, kind in code_layout("q", size, size, make_codebook(name, bits)).values():
        low, high = (-(2**15), 2**15) if kind == torch.int16 else (0, 256)
        parts.append(torch.randint(low, high, shape, generator=generator).to(kind))
    return parts


def product_row(name: str, bits: int, size: int, repeats: int) -> dict:
    """Times of the product with Q."""
    generator = torch.Generator().manual_seed(0)
    codes = random_codes(name, bits, size, generator)
    x = torch.randn(1, size, generator=generator)
    scale = torch.ones(1).view(torch.int32)
    dense = dispatch.rows(codes, None, name, bits, (size, size), 0, size)
    forms = {
        "torch": lambda: x @ decode_rows(codes, None, name, bits, size, 0, size).T,
        "tiles": lambda: product(x, codes, None, scale, name, bits, size, 0, False, 0),
        "codes": lambda: dispatch.gemv(x, codes, None, scale, name, bits, size),
        "dense": lambda: x @ dense.T,
    }
    for function in forms.values():
        function()
    found = smallest(forms, repeats)
    row = {"item": f"{name} {bits} bits", "size": size}
    row |= {f"{form}_ms": value for form, value in found.items()}
    return row | {
        "torch_over_codes": found["torch"] / found["codes"],
        "torch_over_tiles": found["torch"] / found["tiles"],
        "dense_over_codes": found["dense"] / found["codes"],
    }


def random_layer(size: int, rank: int, device: torch.device | str = "cpu") -> LPLRQuantizedLinear:
    """A layer of random E8P codes with factors of 4 bits."""
    generator = torch.Generator().manual_seed(rank)
    layer = LPLRQuantizedLinear(size, size, rank=rank)
    for name, buffer in layer.named_buffers():
        if buffer.dtype == torch.uint8:
            buffer.random_(0, 256, generator=generator)
        elif name == "q_codes":
            buffer.random_(-(2**15), 2**15, generator=generator)
        elif name == "q_scale":
            buffer.fill_(int(torch.ones(1).view(torch.int32)))
    layer.to(device).set_mode("kernel")
    return layer


def factor_row(size: int, rank: int, repeats: int) -> dict:
    """Times of a whole layer with and without its factors."""
    generator, layer = torch.Generator().manual_seed(0), random_layer(size, rank)
    bare = LPLRQuantizedLinear.from_settings(layer.settings())
    bare.load_state_dict(layer.state_dict())
    take_factors(bare)
    bare.set_mode("kernel")
    x = torch.randn(1, size, generator=generator)
    forms = {"with": lambda: layer(x), "without": lambda: bare(x)}
    for function in forms.values():
        function()
    found = smallest(forms, 5 * repeats)
    return {
        "item": f"e8p 2 bits, rank {rank}, whole layer",
        "size": size,
        "with_factors_ms": found["with"],
        "without_factors_ms": found["without"],
        "factor_cost": found["with"] / found["without"] - 1,
    }


@torch.inference_mode()
def main(repeats: int, size: int, output: Path) -> None:
    """Time all codebooks and two ranks, print and write the table."""
    torch.set_num_threads(1)
    rows = [product_row(name, bits, size, repeats) for name, bits in BOOKS]
    rows += [factor_row(size, size // part, repeats) for part in (64, 16)]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    rows = [{key: row.get(key) for key in columns} for row in rows]
    for row in rows:
        print(
            ", ".join(
                f"{k} {v:.3g}" if isinstance(v, float) else str(v)
                for k, v in row.items()
                if v is not None
            )
        )
    write_csv(output, rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".csv"))
    arguments = parser.parse_args()
    main(arguments.repeats, arguments.size, arguments.output)
