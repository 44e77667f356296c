"""The four demonstrations as rows of numbers.   [arXiv 2310.11028 §5]

Each function takes matrices and settings and returns rows; nothing is written here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lplr_q.data_agnostic.budget import (
    METHODS,
    TITLES,
    Result,
    bits_per_weight,
    compress_to_budget,
    search_bits,
)
from lplr_q.data_agnostic.compressed import CompressedMatrix, relative_error
from lplr_q.data_agnostic.inputs import Embeddings
from workbench.errors import ConfigError

Stream = Callable[[str], torch.Generator]
Row = dict[str, Any]


def budgeted(
    matrix: Float[Tensor, "n d"],
    method: str,
    *,
    naive_bits: int,
    bits: int,
    bits_right: int,
    ratio: float,
    generator: torch.Generator,
    sketch: str = "gaussian",
    power_iterations: int = 0,
    affine: bool = False,
    side: str = "columns",
    search: bool = False,
) -> Result:
    """A method at a budget, with those of the options that it has."""
    options: dict[str, Any] = {} if method == "lplr-q" else {"affine": affine}
    if method in ("lplr", "iterative"):
        options |= {"sketch": sketch, "power_iterations": power_iterations}
    if method in METHODS:
        options["side"] = side
    if search and method in METHODS:
        seed = int(torch.randint(2**31, (1,), generator=generator))
        return search_bits(matrix, method, naive_bits=naive_bits, ratio=ratio, seed=seed, **options)
    return compress_to_budget(
        matrix,
        method,
        naive_bits=naive_bits,
        bits=bits,
        bits_right=bits_right,
        ratio=ratio,
        generator=generator,
        **options,
    )


def factor_bits(made: Result) -> int | None:
    """Bits of L of the first term; None for methods without such factors."""
    left = made.terms[0].left if isinstance(made, CompressedMatrix) else None
    return None if left is None else left.bits


def signal_to_noise(original: Tensor, copy: Tensor) -> float:
    """PSNR = 10 log10(peak^2 / MSE) in dB, peak = largest minus smallest value of the original."""
    peak = float(original.max() - original.min())
    mse = float((original.double() - copy.double()).square().mean())
    return math.inf if mse == 0 else 10 * math.log10(max(peak * peak, 1e-300) / mse)


def image_rows(
    image: Float[Tensor, "height width"],
    methods: Sequence[str],
    *,
    naive_bits: int,
    settings: Mapping[str, Any],
    stream: Stream,
) -> tuple[list[Row], dict[str, Tensor]]:
    """PSNR and relative error of every method at one budget, and the reconstructed pictures."""
    rows, pictures = [], {}
    for method in methods:
        made = budgeted(
            image, method, naive_bits=naive_bits, generator=stream(f"image/{method}"), **settings
        )
        copy = made.dequantize().to(image)
        pictures[method] = copy
        rows.append(
            {
                "method": TITLES[method],
                "naive_bits": naive_bits,
                "rank": made.rank,
                "factor_bits": factor_bits(made),
                "bits_per_pixel": bits_per_weight(made),
                "psnr_db": signal_to_noise(image, copy),
                "relative_error": relative_error(image, copy),
            }
        )
    return rows, pictures


def nearest(
    stored: Float[Tensor, "n d"], queries: Float[Tensor, "q d"], k: int
) -> Int64[np.ndarray, "q k"]:
    """Exact Euclidean neighbours by faiss, the nearest first."""
    import faiss

    index = faiss.IndexFlatL2(stored.shape[1])
    index.add(np.ascontiguousarray(stored.float().cpu().numpy()))
    return index.search(np.ascontiguousarray(queries.float().cpu().numpy()), k)[1]


def vote(labels: Int64[np.ndarray, "q k"]) -> Int64[np.ndarray, " q"]:
    """Most frequent label of each row; of equally frequent ones that of the nearer neighbour."""
    counts = (labels[:, :, None] == labels[:, None, :]).sum(2)
    return labels[np.arange(len(labels)), counts.argmax(1)]


def neighbour_rows(
    source: str,
    data: Embeddings,
    methods: Sequence[str],
    *,
    naive_bits: int,
    k: int,
    settings: Mapping[str, Any],
    stream: Stream,
) -> list[Row]:
    """Recall@k and vote accuracy when the stored vectors are compressed; queries stay exact.

    Recall is the share of the true k nearest that are still among the k nearest. Intervals of the
    accuracy are Wilson's at 95 %.
    """
    if k > len(data.stored):
        raise ConfigError(f"k={k} neighbours of {len(data.stored)} stored vectors")
    truth = data.query_labels.numpy()
    labels = data.labels.numpy()
    exact = nearest(data.stored, data.queries, k)
    rows = [_neighbour_row(source, "exact", 32, 32.0, 0.0, exact, exact, labels, truth)]
    for method in methods:
        made = budgeted(
            data.stored,
            method,
            naive_bits=naive_bits,
            generator=stream(f"neighbours/{source}/{method}"),
            **settings,
        )
        copy = made.dequantize().to(data.stored)
        found = nearest(copy, data.queries, k)
        error = relative_error(data.stored, copy)
        size = bits_per_weight(made)
        rows.append(
            _neighbour_row(
                source, TITLES[method], naive_bits, size, error, found, exact, labels, truth
            )
        )
    return rows


def _neighbour_row(
    source: str,
    method: str,
    naive_bits: int,
    size: float,
    error: float,
    found: np.ndarray,
    exact: np.ndarray,
    labels: np.ndarray,
    truth: np.ndarray,
) -> Row:
    right = vote(labels[found]) == truth
    low, high = wilson(int(right.sum()), len(right))
    kept = [len(np.intersect1d(a, b)) / len(b) for a, b in zip(found, exact, strict=True)]
    return {
        "source": source,
        "method": method,
        "naive_bits": naive_bits,
        "bits_per_entry": size,
        "relative_error": error,
        "recall": float(np.mean(kept)),
        "accuracy": float(right.mean()),
        "accuracy_low": low,
        "accuracy_high": high,
        "queries": len(right),
    }


def wilson(successes: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's interval of a share."""
    share, scale = successes / n, 1 + z * z / n
    centre = (share + z * z / (2 * n)) / scale
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / scale
    return max(0.0, centre - half), min(1.0, centre + half)


def layer_rows(
    name: str,
    weight: Float[Tensor, "m n"],
    methods: Sequence[str],
    *,
    naive_bits: int,
    settings: Mapping[str, Any],
    stream: Stream,
) -> list[Row]:
    """One row per method: error of the column sketch, of the row sketch, and of naive rounding."""

    def error(method: str, side: str) -> tuple[float, Result]:
        generator = stream(f"layers/{name}/{method}/{side}")
        made = budgeted(
            weight, method, naive_bits=naive_bits, generator=generator, side=side, **settings
        )
        return relative_error(weight, made.dequantize().to(weight)), made

    plain, _ = error("naive", "columns")
    rows = []
    for method in (m for m in methods if m != "naive"):
        columns, made = error(method, "columns")
        rows.append(
            {
                "module": name,
                "shape": f"{weight.shape[0]}x{weight.shape[1]}",
                "method": TITLES[method],
                "bits": settings["bits"],
                "bits_right": settings["bits_right"],
                "chosen_bits": factor_bits(made),
                "naive_bits": naive_bits,
                "ratio": settings["ratio"],
                "rank": made.rank,
                "bits_per_weight": bits_per_weight(made),
                "row_sketch_error": error(method, "rows")[0] if method in METHODS else None,
                "column_sketch_error": columns,
                "naive_error": plain,
            }
        )
    return rows


def layer_summary(rows: Sequence[Row]) -> list[Row]:
    """Mean errors over the matrices per method and budget; ``better`` counts those below naive."""
    groups: dict[tuple, list[Row]] = {}
    keys = ("method", "bits", "bits_right", "naive_bits", "ratio")
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    summary = []
    for key, members in groups.items():
        entry: Row = dict(zip(keys, key, strict=True))
        for column in ("row_sketch_error", "column_sketch_error", "naive_error"):
            values = [row[column] for row in members if row[column] is not None]
            entry[column] = sum(values) / len(values) if values else None
        entry["count"] = len(members)
        entry["better"] = sum(row["column_sketch_error"] < row["naive_error"] for row in members)
        summary.append(entry)
    return summary


def timed(function: Callable[[], Any], device: torch.device, repeats: int) -> tuple[Any, float]:
    """The value, and the smallest time of ``repeats`` calls: CPU seconds, or wall on a GPU."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    value, best = None, math.inf
    for _ in range(repeats):
        begin = clock()
        value = function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, clock() - begin)
    return value, best


def curve_rows(
    matrix: Float[Tensor, "n d"],
    methods: Sequence[str],
    *,
    rank: int,
    bits: int,
    bits_right: int,
    sketch: str = "gaussian",
    power_iterations: int = 0,
    repeats: int = 1,
    stream: Stream,
) -> list[Row]:
    """Relative error and seconds of every low-rank method at one rank."""
    rows = []
    for method in (m for m in methods if m in METHODS):
        options: dict[str, Any] = {}
        if method in ("lplr", "iterative"):
            options = {"sketch": sketch, "power_iterations": power_iterations}

        def run(method: str = method, options: Mapping[str, Any] = options) -> Any:
            return METHODS[method](
                matrix,
                rank=rank,
                bits=bits,
                bits_right=bits_right,
                generator=stream(f"curve/{method}/{rank}"),
                **options,
            )

        made, seconds = timed(run, matrix.device, repeats)
        rows.append(
            {
                "method": TITLES[method],
                "rank": rank,
                "bits_per_entry": bits_per_weight(made),
                "relative_error": relative_error(matrix, made.dequantize().to(matrix)),
                "seconds": seconds,
            }
        )
    return rows
