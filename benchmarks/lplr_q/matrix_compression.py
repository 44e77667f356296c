"""One random sketch against a full SVD: seconds and error of the low-rank methods, one thread.

    python benchmarks/lplr_q/matrix_compression.py

A 2000 x 2000 matrix with singular values (1 + i)^-1, factors of 4 bits. LPLR runs at every rank
with each sketch, with one power iteration, and with rounds on the residual; direct SVD and LPLR-SVD
need the same full SVD, which is made once per rank and method. Printed and written beside this
file: CPU seconds (smallest of the repeats; of one call for those with an SVD), relative error, and
how many times faster than direct SVD.
"""

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch

from lplr_q.data_agnostic.budget import METHODS
from lplr_q.data_agnostic.compressed import CompressedMatrix, relative_error
from lplr_q.data_agnostic.inputs import power_law_matrix
from workbench.tables import write_csv

FORMS = {
    "direct SVD": ("dsvd", {}),
    "LPLR-SVD": ("lsvd", {}),
    "LPLR, Gaussian": ("lplr", {}),
    "LPLR, sparse": ("lplr", {"sketch": "sparse"}),
    "LPLR, SRHT": ("lplr", {"sketch": "srht"}),
    "LPLR, 1 power iteration": ("lplr", {"power_iterations": 1}),
    "iterative LPLR": ("iterative", {}),
}


def seconds(
    function: Callable[[], CompressedMatrix], repeats: int
) -> tuple[CompressedMatrix, float]:
    """The value and the smallest CPU seconds."""
    times, values = [], []
    for _ in range(repeats):
        begin = time.process_time()
        values.append(function())
        times.append(time.process_time() - begin)
    return values[0], min(times)


def main(size: int, ranks: list[int], bits: int, repeats: int, output: Path) -> None:
    """Time every form at every rank, print and write the table."""
    torch.set_num_threads(1)
    matrix = power_law_matrix(size, size, 1.0, torch.Generator().manual_seed(0))
    rows = []
    for rank in ranks:
        slow = math.nan
        for name, (method, options) in FORMS.items():

            def call(method=method, options=options, rank=rank):
                generator = torch.Generator().manual_seed(1)
                return METHODS[method](matrix, rank=rank, bits=bits, generator=generator, **options)

            made, spent = seconds(call, 1 if method in ("dsvd", "lsvd") else repeats)
            slow = spent if method == "dsvd" else slow
            rows.append(
                {
                    "rank": rank,
                    "method": name,
                    "bits_per_entry": made.bits_per_weight,
                    "relative_error": relative_error(matrix, made.dequantize()),
                    "seconds": spent,
                    "ratio": slow / spent,
                }
            )
            print(
                f"rank {rank:4d}  {name:24s} error {rows[-1]['relative_error']:.3f}  "
                f"{spent:8.4f} s  {rows[-1]['ratio']:7.1f} x",
                flush=True,
            )
    write_csv(output, rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=2000)
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".csv"))
    arguments = parser.parse_args()
    main(arguments.size, arguments.ranks, arguments.bits, arguments.repeats, arguments.output)
