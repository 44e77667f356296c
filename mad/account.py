"""Count parameters, state and operations of a stack, and find options that meet a budget.

    python -m mad.account --layers mh-hyena swiglu mh-attention swiglu
    python -m mad.account --layers mamba swiglu mamba swiglu --check-iso 4096 --tol 0.1
    python -m mad.account --layers mh-linear-attention --fit-state 2048

With `--check-iso` the exit status is 3 when the state of the stack leaves the band. State there
means what the iso-state rule counts: matrices and filters' states, without short convolutions.
[arXiv 2403.17844, "iso-state"]
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from mad.registry import LayerChoice, parse_layer, stack_name
from workbench.cli import RunField, RunOptions, cli
from workbench.errors import ConfigError, GateFailed, require_least
from workbench.run import Run


@dataclass(frozen=True)
class Experiment:
    """Which stack, at which size, against which budget."""

    layers: tuple[str, ...] = ("mh-attention", "swiglu", "mh-attention", "swiglu")
    """Layers in order, with options if any, or module:Class."""
    dim: int = 128
    """Width of the model."""
    seq_len: int = 128
    """Tokens after which the state is counted, and filters' length."""
    check_iso: int | None = None
    """Floats of state that the whole stack should have."""
    tol: float = 0.1
    """Share by which the state may differ from `check_iso`."""
    fit_state: int | None = None
    """Find options that give each layer with a state this many floats of it."""
    fit_params: int | None = None
    """Find options that give each layer this many parameters."""
    run: RunField = RunOptions()
    """Where and how."""

    def __post_init__(self) -> None:
        require_least(self, 1, "dim", "seq_len", "check_iso", "fit_state", "fit_params")
        if not 0 <= self.tol < 1:
            raise ConfigError(f"tol={self.tol} lies outside [0, 1); it is a share, e.g. 0.1")
        if not self.layers:
            raise ConfigError("no layers given; name at least one, e.g. --layers mamba swiglu")
        for layer in self.layers:
            parse_layer(layer)


EXPERIMENT = Experiment()  # edit me


# ---------------------------------------------------------------- options for a budget


@dataclass(frozen=True)
class Fit:
    """A layer whose options were chosen to meet a budget."""

    text: str
    """The layer as `--layers` takes it."""
    state: int
    """Its floats of state by the iso-state rule."""
    params: int
    """Its parameters."""
    deviation: float
    """Largest relative deviation from what was asked for."""


FIXED = ("short_filter", "conv", "taps", "chunk", "multiple_of", "layer_id", "n_layers", "rotary")
"""Options with one of these in their names are left alone: they are no measure of size."""


def fit_to_budget(
    layer: str,
    state: int | None = None,
    params: int | None = None,
    *,
    width: int = 128,
    length: int = 128,
) -> Fit:
    """The options, changed in one or two integers, that come nearest to a state and a size.

    Tried are powers of two and, for a hidden width, multiples of 16; nearest by the largest
    relative deviation, then by the fewest changes.

    Raises:
        ConfigError: nothing was asked for, or the layer has no option that changes its size.
    """
    if state is None and params is None:
        raise ConfigError("fit_to_budget: give a state, a number of parameters, or both")
    base, best = parse_layer(layer), None
    for changes in variants(base, width):
        try:
            cost = counts(base, changes, width, length)
        except (ConfigError, ValueError, RuntimeError, ZeroDivisionError):
            continue  # options that do not go together
        wanted = ((cost.matrix_state_floats, state), (cost.params, params))
        off = max(abs(found / aim - 1) for found, aim in wanted if aim is not None)
        rank = (round(off, 6), len(changes), sum(abs(math.log2(v)) for v in changes.values()))
        if best is None or rank < best[0]:
            best = (rank, changes, cost)
    if best is None:
        raise ConfigError(f"layer {layer!r} cannot be made at width {width}")
    (off, *_), changes, cost = best
    text = ",".join([layer, *(f"{key}={value}" for key, value in changes.items())])
    return Fit(text, cost.matrix_state_floats, cost.params, off)


def variants(base: LayerChoice, width: int) -> Iterator[dict[str, int]]:
    """No change, every single one, every pair."""
    named = {part.partition("=")[0].strip() for part in base.text.split(",")[1:]}
    choices: dict[str, list[int]] = {}
    for name, value in base.options.items():
        if name in named or any(word in name for word in FIXED):
            continue  # what the user wrote stays
        if name == "hidden":
            choices[name] = list(range(16, 8 * width + 1, 16))
        elif type(value) is int and value > 0:
            choices[name] = [2**i for i in range(10) if 2**i != value]
    yield {}
    for name, values in choices.items():
        yield from ({name: value} for value in values)
    for one, other in itertools.combinations(choices, 2):
        for pair in itertools.product(choices[one], choices[other]):
            yield dict(zip((one, other), pair, strict=True))


def counts(base: LayerChoice, changes: dict[str, int], width: int, length: int) -> Any:
    """Accounting of the layer with some options changed; its weights never exist."""
    import torch

    from mad.model import account_layer

    choice = LayerChoice(base.text, base.short, base.build, base.options | changes)
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return account_layer(choice.make(width, length), length)
        except (NotImplementedError, RuntimeError):  # a layer that computes while it is made
            return account_layer(choice.make(width, length), length)


# ---------------------------------------------------------------- the script


def main(experiment: Experiment) -> dict[str, Any]:
    """Count, fit if asked to; returns the totals."""
    with Run.open("mad.account", experiment) as run:
        if not run.finished:
            count(run, experiment)
        found, aim = run.results["matrix_state_floats"], experiment.check_iso
        if aim is not None and abs(found - aim) > experiment.tol * aim:
            raise GateFailed(
                f"{run.results['stack']} carries {found} floats of state, outside of {aim} "
                f"± {experiment.tol:.0%}; `--fit-state` finds options that meet a budget"
            )
        return run.results


def count(run: Run, experiment: Experiment) -> None:
    """One row per layer, the sum, and the fitted options."""
    rows = []
    for layer in experiment.layers:
        cost = counts(parse_layer(layer), {}, experiment.dim, experiment.seq_len)
        rows.append({"layer": layer, **asdict(cost)})
    names = [name for name in rows[0] if name != "layer"]
    total = {name: sum(row[name] for row in rows) for name in names}
    run.table(
        "accounting",
        [*rows, {"layer": "all", **total}],
        caption=f"Cost per layer at width {experiment.dim} after {experiment.seq_len} tokens.",
    )
    for row in [*rows, {"layer": "all", **total}]:
        run.note(
            f"{row['layer']:<34} {row['params']:>9} parameters ({row['params_active']} active)  "
            f"{row['state_floats']:>7} floats of state ({row['matrix_state_floats']} iso)  "
            f"{row['flops_per_token']:>9} flops per token  {row['kv_bytes']} bytes of cache"
        )
    fits = fitted(run, experiment, rows)
    stack = stack_name(experiment.layers)
    run.finish(
        {"stack": stack, "width": experiment.dim, "seq_len": experiment.seq_len, **total} | fits,
        title=f"What {stack} costs",
        question="How many parameters, how much state, how many operations?",
        summary=f"{stack} at width {experiment.dim}: {total['params']} parameters, "
        f"{total['state_floats']} floats of state after {experiment.seq_len} tokens "
        f"({total['matrix_state_floats']} by the iso-state rule), "
        f"{total['flops_per_token']} operations per token.",
    )


def fitted(run: Run, experiment: Experiment, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The options that meet the budgets, one per different layer."""
    if experiment.fit_state is None and experiment.fit_params is None:
        return {}
    found = {}
    for row in {row["layer"]: row for row in rows}.values():
        state = experiment.fit_state if row["state_floats"] else None
        if state is None and experiment.fit_params is None:
            continue
        fit = fit_to_budget(
            row["layer"],
            state,
            experiment.fit_params,
            width=experiment.dim,
            length=experiment.seq_len,
        )
        found[row["layer"]] = fit
        run.note(f"{row['layer']}: {fit.text} has state {fit.state}, {fit.params} parameters")
    run.table(
        "fitted",
        [{"layer": layer, **asdict(fit)} for layer, fit in found.items()],
        caption="Options that come nearest to the budget.",
    )
    return {"fitted": " ".join(fit.text for fit in found.values())}


if __name__ == "__main__":
    cli(main, EXPERIMENT)
