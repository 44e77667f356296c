"""Tables for the bitshift trellis trained on Gaussian samples.   [Marcellin & Fischer 1990, §III]

Lloyd's iteration with the Viterbi search in place of the nearest point: find the best closed paths
of fresh samples, then move the value of each state to the mean of the samples that passed through
it. The tables in ``trellis_tables.safetensors`` were made by
``benchmarks/lplr_q/trellis_tables.py``; they are part of the format, so what they decode never
changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from lplr_q.codebooks.trellis import circles, windows

TABLES = Path(__file__).with_name("trellis_tables.safetensors")


def table_key(window: int, bits: int) -> str:
    """Name of a table in the file.

    >>> table_key(10, 2)
    'L10-k2'
    """
    return f"L{window}-k{bits}"


def train_table(
    start: Float[Tensor, " states"],
    bits: int,
    *,
    rounds: int,
    sequences: int,
    generator: torch.Generator,
    length: int = 256,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Float[Tensor, " states"]:
    """Values of the states after ``rounds`` of Lloyd's iteration from ``start``, rounded to half
    precision; every round sees fresh samples. States that no path visits keep their value."""
    table = start.clone()
    window = table.numel().bit_length() - 1
    for _ in progress(range(rounds)):
        x = torch.randn(sequences, length, generator=generator)
        states = windows(circles(x, table, bits), bits, window).long().flatten()
        visits = torch.bincount(states, minlength=table.numel())
        total = torch.zeros_like(table, dtype=torch.float64)
        total.index_add_(0, states, x.flatten().double())
        table = torch.where(visits > 0, (total / visits.clamp_min(1)).float(), table)
    return table.half().float()
