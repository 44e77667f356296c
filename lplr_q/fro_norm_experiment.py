"""Error of every sublayer under every method, after each step: layers x sublayers x methods.
[CALDERA §6]

    python -m lplr_q.fro_norm_experiment --model micro-mistral
    python -m lplr_q.fro_norm_experiment --layers 0 7 --sublayers q_proj down_proj --bits 3
    python -m lplr_q.fro_norm_experiment --model FOLDER --rank 256 --rounds 20 --methods lr_first

All methods get the same total bits per weight, overheads included, unless --rank fixes the rank.
The parameters stand in EXPERIMENT in this file, to be edited there or given as flags or as
--set key=value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lplr_q.error_figures import (
    LABELS,
    best_step,
    describe,
    method_figure,
    spread_rows,
    step_figure,
    step_table,
    summary_rows,
)
from lplr_q.layer_study import LayerStudy, load_study
from workbench.cli import cli
from workbench.errors import ConfigError
from workbench.run import Run

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from lplr_q.activation_aware.decompose import Decomposition, PreparedHessian
    from lplr_q.activation_aware.hessian import Calibration

Method = Literal["rtn", "gptq", "quip-sharp", "lplr", "lr_first", "q_first", "odlri", "srr", "auto"]

ROUNDING = ("rtn", "gptq")


@dataclass(frozen=True)
class Experiment(LayerStudy):
    """Which matrices, which methods, how many bits."""

    layers: tuple[int, ...] = (0, 3, 7)
    """Decoder blocks; none given: all."""
    sublayers: tuple[str, ...] = ()
    """Names inside the block or their last parts, e.g. q_proj; none given: all."""
    methods: tuple[Method, ...] = (
        "rtn",
        "gptq",
        "quip-sharp",
        "lplr",
        "lr_first",
        "q_first",
        "odlri",
    )
    """What is compared; lr_first, q_first, odlri, srr and auto are starts of LPLR-LDLQ."""
    bits: float = 2.5
    """Budget in bits per weight."""
    overhead: float = 0.15
    """Bits per weight that scales and signs may add, the same for every method."""
    codebook: str = "e8p"
    """Codebook of Q: e8p, lloyd-max, tcq or module:factory."""
    q_bits: int = 2
    """Bits of Q."""
    rank: int | None = None
    """Components of L R; None: as many as the budget holds."""
    factor_bits: int | tuple[int, int] = 4
    """Bits per entry of L and R, or two numbers: of L, of R; 16 keeps them in bfloat16."""
    rounds: int = 4
    """Outer rounds of the alternation."""
    inner_iterations: int = 5
    """Least-squares steps for the rounded factors per round."""
    sweeps: int = 2
    """Guarded sweeps after LDLQ."""
    q_hessian: Literal["plain", "downdate", "projq", "auto"] = "plain"
    """Which H the Q step sees."""
    rht: bool = True
    """Randomised Hadamard transform on both sides."""

    def __post_init__(self) -> None:
        """Settings that cannot work together."""
        super().__post_init__()
        if not self.methods:
            raise ConfigError(f"methods is empty; give some of {', '.join(LABELS)}")
        for name in ("methods", "layers", "sublayers"):
            given = getattr(self, name)
            if len(set(given)) < len(given):
                raise ConfigError(f"{name}={' '.join(map(str, given))}: one is named twice")
        if any(layer < 0 for layer in self.layers):
            raise ConfigError(f"layers={self.layers}: counted from 0")
        if not 1 <= self.bits <= 8 or self.overhead < 0:
            raise ConfigError(
                f"bits={self.bits:g}, overhead={self.overhead:g}; choose 1 to 8 and at least 0"
            )
        if self.rank is not None and self.rank < 1:
            raise ConfigError(f"rank={self.rank}; leave it out to fill the budget, or give 1 up")
        if self.rounds < 1:
            raise ConfigError(f"rounds={self.rounds}: nothing would be decomposed; use at least 1")


EXPERIMENT = Experiment()  # edit me


# ---------------------------------------------------------------- one matrix, one method


def measure(
    experiment: Experiment,
    method: str,
    weight: Float[Tensor, "m n"],
    hessian: Float[Tensor, "n n"],
    prepared: Callable[[], PreparedHessian],
    generator: Any,
) -> dict[str, Any]:
    """Errors after every step, the best one, and the bits spent, of one method on one matrix.

    ``hessian`` is regularised; ``prepared`` gives the same one rotated.
    """
    m, n = weight.shape
    if method in ROUNDING:
        return _rounded(experiment, method, weight, hessian)
    result = _decomposed(experiment, method, weight, prepared(), generator)
    assert result.bits is not None
    return {
        "history": result.history,
        "error": result.error,
        "frobenius": result.frobenius,
        "true_bits": result.bits.total / (m * n),
        "rank": result.rank,
        "init": result.settings.get("init", ""),
    }


def _rounded(experiment: Experiment, method: str, weight: Tensor, hessian: Tensor) -> dict:
    """RTN or GPTQ with the smallest group that fits the budget."""
    from lplr_q.baselines import gptq, round_to_nearest
    from lplr_q.bits import group_bits, group_for_budget
    from lplr_q.linalg.ldlq import weighted_loss

    m, n = weight.shape
    width = int(experiment.bits)
    group = group_for_budget(n, experiment.bits + experiment.overhead, bits=width)
    if method == "rtn":
        result = round_to_nearest(weight, bits=width, group=group)
    else:
        result = gptq(weight, hessian, bits=width, group=group)
    original = weight.double()
    difference = original - result.weight.double()
    whole = max(weighted_loss(original, hessian), 1e-300)
    error = (weighted_loss(difference, hessian) / whole) ** 0.5
    return {
        "history": [{"round": 1, "component": "Q", "error": error}],
        "error": error,
        "frobenius": float(difference.norm() / original.norm().clamp_min(1e-300)),
        "true_bits": group_bits(m, n, bits=width, group=group),
        "rank": 0,
        "init": "",
    }


def budget_rank(experiment: Experiment, shape: tuple[int, int], *, q_bits: int) -> int:
    """The rank asked for, clipped to the matrix; by default what fills the matched budget.

    Raises:
        ConfigError: the budget holds no component beside Q.
    """
    from lplr_q.bits import matched_budget, rank_for_budget

    m, n = shape
    if experiment.rank is not None:
        return min(experiment.rank, m, n)
    budget = matched_budget(m, n, experiment.bits, experiment.overhead)
    rank = rank_for_budget(
        m,
        n,
        budget,
        codebook=experiment.codebook,
        q_bits=q_bits,
        factor_bits=experiment.factor_bits,
        rotated=experiment.rht,
    )
    if rank < 1:
        raise ConfigError(
            f"{budget:.3f} bits per weight hold no component of L R on a {m}x{n} matrix beside "
            f"{q_bits} bits of Q; raise --bits or --overhead, or give --rank"
        )
    return rank


def _decomposed(
    experiment: Experiment,
    method: str,
    weight: Tensor,
    prepared: PreparedHessian,
    generator: Any,
) -> Decomposition:
    from lplr_q.activation_aware.decompose import decompose, quip_sharp

    if method == "quip-sharp":
        return quip_sharp(
            weight,
            prepared,
            q_bits=experiment.q_bits,
            sweeps=experiment.sweeps,
            generator=generator,
        )
    q_bits = 0 if method == "lplr" else experiment.q_bits
    return decompose(
        weight,
        prepared,
        codebook=experiment.codebook,
        q_bits=q_bits,
        rank=budget_rank(experiment, (weight.shape[0], weight.shape[1]), q_bits=q_bits),
        factor_bits=experiment.factor_bits,
        rounds=1 if method == "lplr" else experiment.rounds,
        inner_iterations=experiment.inner_iterations,
        sweeps=experiment.sweeps,
        init="lr_first" if method == "lplr" else method,
        q_hessian=experiment.q_hessian,
        generator=generator,
    )


# ---------------------------------------------------------------- the sweep


def chosen(experiment: Experiment, calibration: Calibration) -> list[str]:
    """Full names of the matrices asked for, in the model's order.

    Raises:
        ConfigError: a layer or a sublayer that the model does not have.
    """
    from lplr_q.activation_aware.layer_quantization import find_sublayer
    from lplr_q.activation_aware.weight_compression import layer_index, short_name

    names = list(calibration.key_of)
    have = sorted({layer_index(name) for name in names})
    unknown = sorted(set(experiment.layers) - set(have))
    if unknown:
        raise ConfigError(
            f"layers {' '.join(map(str, unknown))}: {experiment.model} has {have[0]} to {have[-1]}"
        )
    names = [n for n in names if not experiment.layers or layer_index(n) in experiment.layers]
    known = list(dict.fromkeys(short_name(name) for name in names))
    wanted = {find_sublayer(s, known) for s in experiment.sublayers} or set(known)
    return [name for name in names if short_name(name) in wanted]


def main(experiment: Experiment) -> dict[str, Any]:
    """One unit per matrix and method, a JSON of each, tables and figures."""
    with Run.open("lplr_q.fro_norm_experiment", experiment) as run:
        if run.finished:
            return run.results
        from lplr_q import native

        model, calibration = load_study(run, experiment)
        run.note(native.status(run.device.device))
        rows = sweep(run, experiment, model, calibration)
        return report(run, experiment, rows)


def sweep(
    run: Run, experiment: Experiment, model: Any, calibration: Calibration
) -> list[dict[str, Any]]:
    """Measure every chosen matrix by every method; one row each, with its history."""
    from lplr_q.activation_aware.decompose import prepare_hessian
    from lplr_q.activation_aware.weight_compression import layer_index, short_name
    from lplr_q.linalg.ldl import regularise
    from lplr_q.weights import ModuleWeights

    weights = ModuleWeights(model)
    names = chosen(experiment, calibration)
    jobs = [(name, method) for name in names for method in experiment.methods]
    rows: list[dict[str, Any]] = []
    shared: dict[str, tuple[Tensor, PreparedHessian]] = {}  # of the last input only

    def derived(name: str) -> tuple[Tensor, PreparedHessian]:
        key = calibration.key_of[name]
        if key not in shared:
            shared.clear()
            hessian = regularise(
                calibration.of(name).matrix(), sigma=experiment.sigma_reg, name=name
            )
            signs = run.streams.torch(f"signs/in/{key}") if experiment.rht else None
            prepared = prepare_hessian(hessian, len(hessian), generator=signs, regularised=True)
            shared[key] = hessian, prepared
        return shared[key]

    for name, method in run.progress(jobs, "decompose"):

        def compute(name: str = name, method: str = method) -> dict[str, Any]:
            hessian, prepared = derived(name)
            signs = run.streams.torch(f"signs/out/{name}") if experiment.rht else None
            before = run.seconds
            found = measure(experiment, method, weights(name), hessian, lambda: prepared, signs)
            found["seconds"] = run.seconds - before
            return _record(experiment, name, method, found)

        record = run.once(f"{method}/{name}", compute)
        layer, sublayer = layer_index(name), short_name(name)
        run.save_json(f"errors/{layer:03d}.{sublayer}.{method}.json", record)
        rows.append({"layer": layer, "sublayer": sublayer, "method": method, **record})
        run.log(len(rows), {f"{method}/{sublayer}/{layer}": record["error"]})
    return rows


def _record(
    experiment: Experiment, name: str, method: str, found: dict[str, Any]
) -> dict[str, Any]:
    """What a unit keeps and its JSON file shows."""
    import dataclasses

    from lplr_q.activation_aware.layer_quantization import error_record
    from lplr_q.activation_aware.weight_compression import layer_index, short_name

    params = dataclasses.asdict(experiment)
    for field in ("run", "layers", "sublayers", "methods"):
        params.pop(field)
    return error_record(
        found["history"],
        layer_idx=layer_index(name),
        sublayer=short_name(name),
        params={"method": method, **params, "rank": found["rank"]},
        **{k: v for k, v in found.items() if k != "history"},
    )


# ---------------------------------------------------------------- tables and figures


def report(run: Run, experiment: Experiment, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Tables, figures, results."""
    errors = [
        {
            "layer": row["layer"],
            "sublayer": row["sublayer"],
            "method": LABELS[row["method"]],
            "true_bits": row["true_bits"],
            "rank": row["rank"],
            "error": row["error"],
            "error_squared": row["error"] ** 2,
            "frobenius": row["frobenius"],
            "best_step": best_step(row),
            "seconds": row["seconds"],
        }
        for row in rows
    ]
    summary = summary_rows(errors)
    run.table(
        "methods",
        summary,
        caption="Relative activation-aware error e over all matrices (median, smallest, largest), "
        "on how many a method is the best and is below GPTQ, and the mean of the bits it spends.",
    )
    run.table("errors", errors, caption="Every matrix under every method; e, e^2 and |E|/|W|.")
    count = len({(r["layer"], r["sublayer"]) for r in errors})
    n = len({r["layer"] for r in errors})
    points = spread_rows(errors)
    run.figure(
        "methods",
        method_figure(points),
        points,
        caption=f"Relative activation-aware error at {experiment.bits:g} bits per weight (and "
        f"{experiment.overhead:g} of overhead): median over layers, whiskers smallest to largest, "
        f"n = {n} layers.",
        alt=describe(summary),
    )
    steps = step_table(rows)
    if steps:
        run.figure(
            "errors_by_step",
            step_figure(steps),
            steps,
            caption="Error after every sub-step of the alternation from the first whole state on "
            f"(the file also has the step before it): median over layers, n = {n} layers. After "
            f"{experiment.rounds} rounds of two follows the joint sweep over L, R and Q.",
            alt="; ".join(
                f"{r['sublayer']}, {r['method']}, step {r['step']}: {r['error']:.4f}"
                for r in steps
                if r["last"]
            ),
        )
    best = summary[0]
    return run.finish(
        {"methods": summary, "matrices": count},
        title=f"Errors of {experiment.model} at {experiment.bits:g} bits per weight",
        question="Which method leaves the smallest error at equal bits, and after which step?",
        summary=f"Median error over {count} matrices: "
        + ", ".join(f"{r['method']} {r['error']:.4f} ({r['true_bits']:.2f} bits)" for r in summary)
        + ".",
        headline={f"median error of {best['method']}": best["error"]},
    )


if __name__ == "__main__":
    cli(main, EXPERIMENT)
