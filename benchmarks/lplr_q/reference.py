"""Every method on the seeded 512 x 512 problem of ``lplr_q.reference_problem``, beside the error an
independent implementation of the same equations reached on it.

    python benchmarks/lplr_q/reference.py
    python benchmarks/lplr_q/reference.py --only trellis          # rows whose name contains this

Columns: method, bits per weight with all overheads, e = sqrt(tr(E H E^T) / tr(W H W^T)), the
expected e (empty where there is none), best round, CPU seconds on one thread.
"""

import argparse
import math
import time
from pathlib import Path

import torch

from lplr_q.activation_aware.decompose import decompose, prepare_hessian, quip_sharp
from lplr_q.baselines import gptq, round_to_nearest
from lplr_q.bits import group_bits
from lplr_q.linalg.ldlq import weighted_loss
from lplr_q.reference_problem import reference_problem
from workbench.tables import read_csv, write_csv

PLAIN = {"sweeps": 0, "refinements": 0}
Q_ONLY = {"rank": 0, "rounds": 1}
LOW_RANK = {"q_bits": 0, "rank": 32, "refinements": 0}
BOTH = {"rank": 32, "refinements": 0}
EXACT = {**BOTH, "sweeps": 0, "rounds": 4, "factor_bits": 16}
TRELLIS = {"codebook": "tcq"}

# name -> (arguments of decompose, expected error or None); rotation (None: none) is of the Hessian,
# column multiplies the sixth column of W
ROWS: dict[str, tuple[dict, float | None]] = {
    "RHT + LDLQ, Lloyd-Max scalar": ({**Q_ONLY, **PLAIN, "codebook": "lloyd-max"}, 0.1965),
    "RHT + LDLQ, E8P": ({**Q_ONLY, **PLAIN}, 0.1775),
    "RHT + LDLQ, E8P, 1 guarded sweep": ({**Q_ONLY, "sweeps": 1}, 0.1710),
    "RHT + LDLQ, E8P, 3 guarded sweeps": ({**Q_ONLY, "sweeps": 3}, 0.1701),
    "RHT + LDLQ, trellis L = 8, 16 x 16": ({**Q_ONLY, **PLAIN, "codebook": "tcq-8-16x16"}, 0.1666),
    "RHT + LDLQ, trellis L = 10, 16 x 16": (
        {**Q_ONLY, **PLAIN, "codebook": "tcq-10-16x16"},
        0.1574,
    ),
    "RHT + LDLQ, trellis L = 10": ({**Q_ONLY, **PLAIN, **TRELLIS}, None),
    "RHT + LDLQ, trellis L = 10, 2 guarded sweeps": ({**Q_ONLY, **TRELLIS}, None),
    "RHT + LDLQ, residual E8P, 4 bits": ({**Q_ONLY, **PLAIN, "q_bits": 4}, 0.0717),
    "low rank only, bfloat16": ({**LOW_RANK, "factor_bits": 16}, 0.374),
    "low rank only, 4-bit Lloyd-Max factors": (LOW_RANK, 0.388),
    "low rank only, 4-bit E8P factors": ({**LOW_RANK, "factor_codebook": "e8p"}, 0.421),
    "alternation, bfloat16 factors, Q first": ({**EXACT, "init": "q_first"}, 0.124),
    "alternation, bfloat16 factors, LR first": (EXACT, 0.0948),
    "alternation, bfloat16 factors, ODLRI": ({**EXACT, "init": "odlri"}, 0.1037),
    "alternation, 4-bit E8P factors": (
        {**BOTH, "sweeps": 0, "rounds": 4, "factor_codebook": "e8p"},
        0.1145,
    ),
    "alternation, 4-bit E8P factors, 2 sweeps": ({**BOTH, "factor_codebook": "e8p"}, 0.1110),
    "alternation, 4-bit Lloyd-Max factors": ({**BOTH, "sweeps": 0, "rounds": 4}, 0.1114),
    "alternation, 4-bit Lloyd-Max factors, 2 sweeps": (BOTH, 0.1086),
    "the same and a joint refinement": ({"rank": 32}, None),
    "the same, L of 3 bits, R of 5 bits": ({"rank": 32, "factor_bits": (3, 5)}, None),
    "the same, L of 5 bits, R of 3 bits": ({"rank": 32, "factor_bits": (5, 3)}, None),
    "alternation, downdate": ({**BOTH, "q_hessian": "downdate"}, 0.149),
    "alternation, ProjQ": ({**BOTH, "q_hessian": "projq"}, None),
    "trellis L = 10, 4-bit factors, 2 rounds, no sweeps": (
        {**BOTH, **TRELLIS, "sweeps": 0, "rounds": 2},
        0.1029,
    ),
    "trellis L = 10, 4-bit factors, refined": ({**TRELLIS, "rank": 32, "rounds": 2}, None),
    "trellis L = 10, 5-bit factors, rank 26": (
        {**TRELLIS, "rank": 26, "factor_bits": 5, "rounds": 2},
        None,
    ),
    "trellis L = 10, 3-bit factors, rank 43": (
        {**TRELLIS, "rank": 43, "factor_bits": 3, "rounds": 2},
        None,
    ),
    "trellis L = 12, 3-bit factors, rank 43": (
        {"codebook": "tcq-12", "rank": 43, "factor_bits": 3, "rounds": 1},
        None,
    ),
    **{
        f"{'rotation ' + rotation if rotation else 'no rotation'}, E8P, 2 guarded sweeps{wild}": (
            {**Q_ONLY, "rotation": rotation, "column": column},
            None,
        )
        for wild, column in (("", 1), (", a column x 20", 20))
        for rotation in ("had", "kron", "fft", None)
    },
    "scales per row, E8P": ({**Q_ONLY, "q_group": -1}, None),
    "scales per row, E8P, no rotation": ({**Q_ONLY, "q_group": -1, "rotation": None}, None),
    "scales per row and 128 columns, E8P": ({**Q_ONLY, "q_group": 128}, None),
    "scales per row, trellis L = 10": ({**Q_ONLY, **TRELLIS, "q_group": -1}, None),
    "in place of scales per row rank 2, E8P": ({"rank": 2}, None),
    "in place of scales per row rank 2, trellis L = 10": ({**TRELLIS, "rank": 2}, None),
    "scales per row, E8P, rank 30": ({"rank": 30, "q_group": -1}, None),
}


def relative_error(weight: torch.Tensor, other: torch.Tensor, hessian: torch.Tensor) -> float:
    """e of an approximation."""
    difference = (weight - other).double()
    return math.sqrt(weighted_loss(difference, hessian) / weighted_loss(weight.double(), hessian))


def measured(weight: torch.Tensor, hessian: torch.Tensor, options: dict | None) -> dict:
    """bits, e, best round and seconds of one row; ``None`` is the QuIP# form."""
    begin = time.process_time()
    generator = torch.Generator().manual_seed(0)
    options = None if options is None else dict(options)
    rotation = "had" if options is None else options.pop("rotation", "had")
    if options is not None:
        weight = weight.clone()
        weight[:, 5] *= options.pop("column", 1)
    prepared = prepare_hessian(
        hessian,
        weight.shape[1],
        generator=generator if rotation else None,
        regularised=True,
        rotation=rotation or "had",
    )
    if options is None:
        result = quip_sharp(weight, prepared, generator=generator)
    else:
        result = decompose(weight, prepared, generator=generator, **options)
    best = min(result.history, key=lambda h: abs(h["error"] - result.error))
    assert result.bits is not None
    return {
        "bits": result.bits.per_weight,
        "e": result.error,
        "best_round": f"{best['round']} {best['component']}",
        "seconds": time.process_time() - begin,
    }


def baselines(weight: torch.Tensor, hessian: torch.Tensor) -> dict[str, tuple[dict, float]]:
    """Rounding in groups of 128, with and without feedback."""
    found = {}
    for name, bits, expected in (
        ("round to nearest, groups of 128", 2, 0.537),
        ("GPTQ, groups of 128, 2 bits", 2, 0.343),
        ("GPTQ, groups of 128, 3 bits", 3, 0.139),
        ("GPTQ, groups of 128, 4 bits", 4, 0.0647),
    ):
        begin = time.process_time()
        nearest = name.startswith("round")
        made = round_to_nearest(weight, bits=bits) if nearest else gptq(weight, hessian, bits=bits)
        error = relative_error(weight, made.weight, hessian.double())
        seconds = time.process_time() - begin
        row = {
            "bits": group_bits(*weight.shape, bits=bits, group=128),
            "e": error,
            "best_round": "",
            "seconds": seconds,
        }
        found[name] = (row, expected)
    return found


def main(only: str, output: Path) -> None:
    """Measure the methods whose name contains this; rows of others in the file stay."""
    torch.set_num_threads(1)
    weight, hessian = reference_problem()
    kept = {row["method"]: row for row in read_csv(output)} if output.exists() else {}
    rows = dict(kept)

    def note(name: str, found: dict, expected: float | None) -> None:
        rows[name] = {"method": name, **found, "expected_e": "" if expected is None else expected}
        print(f"{name:52s} {found['bits']:6.3f} {found['e']:8.4f} {expected or ''}", flush=True)
        write_csv(output, list(rows.values()))

    if not only:
        for name, (found, expected) in baselines(weight, hessian).items():
            note(name, found, expected)
    for name, (options, expected) in ROWS.items():
        if only in name:
            note(name, measured(weight, hessian, options), expected)
    if only in "QuIP# form":
        note("QuIP# form: E8P, scale 0.9, 10 guarded sweeps", measured(weight, hessian, None), None)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".csv"))
    arguments = parser.parse_args()
    main(arguments.only, arguments.output)
