"""Makes the trained tables of the trellis codebooks.

    python benchmarks/lplr_q/trellis_tables.py --output trellis_tables.safetensors

Lloyd's iteration from the 1mad table scaled near its best, for L = 8 and 10 and 1 to 4 bits: some
minutes on one core with the C kernel. Prints the error on samples that were not trained on.
"""

import argparse
from pathlib import Path

import torch

from lplr_q.codebooks.tcq import trellis_table
from lplr_q.codebooks.training import table_key, train_table
from lplr_q.codebooks.trellis import circles, windows
from workbench.storage import write_safetensors

START = {1: 0.85, 2: 1.0, 3: 1.06, 4: 1.1}  # standard deviation of the first table


def error(table: torch.Tensor, bits: int) -> float:
    """Mean squared error of coding Gaussian numbers that no table was fitted to."""
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(12345))
    x = x / x.square().mean().sqrt()
    window = table.numel().bit_length() - 1
    return float((table[windows(circles(x, table, bits), bits, window)] - x).square().mean())


def main(rounds: int, sequences: int, output: Path) -> None:
    """Train a table for every window and width and write them all."""
    torch.set_num_threads(1)
    tables = {}
    for window in (8, 10):
        for bits in (1, 2, 3, 4):
            start = trellis_table(window, "1mad")
            start = start * (START[bits] / start.std())
            table = train_table(
                start,
                bits,
                rounds=rounds,
                sequences=sequences,
                generator=torch.Generator().manual_seed(1000 * window + bits),
            )
            before, after = error(start, bits), error(table, bits)
            ratio = after * 4.0**bits
            print(f"L={window} k={bits}  {before:.4f} -> {after:.4f} ({ratio:.3f} x bound)")
            tables[table_key(window, bits)] = table.half()
    write_safetensors(output, tables, {"source": "Lloyd's iteration on Gaussian samples"})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--sequences", type=int, default=2500)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    main(arguments.rounds, arguments.sequences, arguments.output)
