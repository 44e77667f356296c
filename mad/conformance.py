"""Check that a layer holds to what every layer must: causality, step = parallel form, accounting.

    python -m mad.conformance --layers my_package.mixer:Mine
    python -m mad.conformance --layers mh-attention,num_heads=4 mlp --checks causality step
    python -m mad.conformance                                         # every registered layer

Prints and records a table of checks; the exit status is 3 if one fails.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from mad.registry import LAYERS, parse_layer
from workbench.cli import RunField, RunOptions, cli
from workbench.errors import ConfigError, GateFailed
from workbench.run import Run


@dataclass(frozen=True)
class Experiment:
    """Which layers, which checks."""

    layers: tuple[str, ...] = ()
    """Layers with options if any, or module:Class of your own; none means every registered one."""
    checks: tuple[str, ...] = ()
    """Names of checks; none means all."""
    width: int | None = None
    """Width of the layers; none means the smallest of 32, 64, 128 that a layer allows."""
    run: RunField = RunOptions()
    """Where and how."""

    def __post_init__(self) -> None:
        for layer in self.layers:
            parse_layer(layer)
        if self.width is not None and self.width < 1:
            raise ConfigError(f"width={self.width}; expected at least 1")


EXPERIMENT = Experiment()  # edit me


def main(experiment: Experiment) -> dict[str, Any]:
    """Run the checks; returns how many held, failed and did not apply."""
    with Run.open("mad.conformance", experiment) as run:
        if not run.finished:
            check_all(run, experiment)
        if run.results["failed"]:
            first = run.results["first_failure"]
            raise GateFailed(
                f"{run.results['failed']} checks failed; first: {first}; "
                f"table: {run.directory / 'tables/checks.csv'}"
            )
        return run.results


def check_all(run: Run, experiment: Experiment) -> None:
    """The checks of every layer, as a table."""
    from mad.checks import CHECKS, check_layer

    layers = experiment.layers or tuple(LAYERS)
    names = experiment.checks or tuple(CHECKS)
    run.note(run.device.describe())
    outcomes = [
        one
        for layer in run.progress(layers, "layers")
        for one in check_layer(layer, names, experiment.width)
    ]
    for one in outcomes:
        run.note(f"{one.layer:<36} {one.check:<13} {one.status:<8} {one.detail}")
    run.table("checks", [asdict(one) for one in outcomes], caption="Every check of every layer.")
    failed = [one for one in outcomes if one.status == "failed"]
    counts = {
        status: sum(one.status == status for one in outcomes)
        for status in ("ok", "failed", "skipped")
    }
    first = f"{failed[0].layer}: {failed[0].check}: {failed[0].detail}" if failed else ""
    run.finish(
        counts | {"layers": len(layers), "first_failure": first},
        title="Conformance of layers",
        question="Do these layers hold to what every layer must?",
        summary=f"{counts['ok']} checks of {len(layers)} layers held, {counts['failed']} failed"
        + (f" ({', '.join(sorted({one.layer for one in failed}))})" if failed else "")
        + f", {counts['skipped']} did not apply.",
    )


if __name__ == "__main__":
    cli(main, EXPERIMENT)
