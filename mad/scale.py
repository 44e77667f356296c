"""Fit scaling laws to runs, and foretell a perplexity from a score.   [arXiv 2403.17844]

    python -m mad.scale --score .75
    python -m mad.scale --runs my_runs.csv --token-scale 6

Without --runs the five published models are read: score on the synthetic tasks and perplexity.
A CSV of your own has the columns `architecture` and `perplexity` and any of `flops`, `parameters`,
`tokens`, `state_floats` and `mad_score`; each fit is made where its columns are there:

    log P = a + b log C     P: perplexity, C: training FLOPs, per architecture
    log P = α + β x + γ x²  x = log N, N: parameters, per group of equal C; its minimum is optimal
    P = A M^c               M: floats of state
    P = u + v s             s: mean score on the synthetic tasks, over architectures

Where groups of equal C hold a parabola with a minimum, the law in C is fitted to the minima
[Hoffmann et al. 2022, approach 2]; otherwise to the best run of each C. Without `flops`, C is
`--token-scale` times parameters times tokens.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mad.laws import (
    Line,
    Row,
    column_pairs,
    correlations,
    fit_line,
    frontier,
    predict,
    read_runs,
)
from mad.plot import scaling_rows
from mad.scale_figures import draw_laws, draw_scores
from workbench.cli import RunField, RunOptions, cli
from workbench.errors import ConfigError
from workbench.run import Run


@dataclass(frozen=True)
class Experiment:
    """Which runs are fitted, and which scores are foretold."""

    runs: Path | None = None
    """CSV of runs; none means the five published models."""
    score: tuple[float, ...] = ()
    """Mean scores on the synthetic tasks, as fractions, whose perplexity is to be foretold."""
    level: float = 0.95
    """Share of the intervals."""
    draws: int = 2000
    """Resamples of the bootstrap."""
    token_scale: float = 6.0
    """FLOPs per parameter and token, for runs without the column `flops`."""
    seed: int = 12345
    """Seed of the resamples."""
    state: str = ""
    """Filled in: digest of the CSV, so that other runs make a new folder."""
    run: RunField = RunOptions()
    """Where and how."""

    def __post_init__(self) -> None:
        if not 0 < self.level < 1:
            raise ConfigError(f"level={self.level}; expected a share between 0 and 1, e.g. 0.95")
        if self.draws < 100:
            raise ConfigError(f"draws={self.draws}; expected at least 100")
        if not self.token_scale > 0:
            raise ConfigError(f"token_scale={self.token_scale}; expected more than 0, e.g. 6")
        for score in self.score:
            if not 0 <= score <= 1:
                raise ConfigError(f"score={score}; expected a fraction between 0 and 1, e.g. 0.75")


EXPERIMENT = Experiment(score=(0.75,))  # edit me


def published_runs() -> list[dict[str, Any]]:
    """The five published models as runs."""
    return [
        {
            "architecture": row["model"],
            "mad_score": row["mad_score"],
            "perplexity": row["perplexity"],
        }
        for row in scaling_rows()
    ]


def law_row(law: str, architecture: str, line: Line, points: str) -> dict[str, Any]:
    """A fitted power law as a row: log P = log(factor) + exponent · log x."""
    return {
        "law": law,
        "architecture": architecture,
        "exponent": line.slope,
        "exponent_low": line.slope_interval.low,
        "exponent_high": line.slope_interval.high,
        "factor": math.exp(line.offset),
        "factor_low": math.exp(line.offset_interval.low),
        "factor_high": math.exp(line.offset_interval.high),
        "n": line.n,
        "points": points,
    }


def main(experiment: Experiment) -> dict[str, Any]:
    """Read, fit, draw; returns exponents, correlations and foretold perplexities."""
    if experiment.runs is None:
        rows = published_runs()
    else:
        rows = read_runs(experiment.runs, experiment.token_scale)
        digest = hashlib.sha256(experiment.runs.read_bytes()).hexdigest()[:8]
        experiment = replace(experiment, state=experiment.state or digest)
    scored, _ = column_pairs(rows, "mad_score")
    if experiment.score and len(np.unique(scored)) < 3:
        raise ConfigError(
            f"score={experiment.score[0]}: {len(np.unique(scored))} different values of mad_score "
            f"in {experiment.runs}; a line with an interval needs at least 3"
        )
    with Run.open("mad.scale", experiment) as run:
        if run.finished:
            return run.results
        run.table("runs", rows, caption="The runs that were fitted.")
        results: dict[str, Any] = {"runs": len(rows)}
        said = [f"{len(rows)} runs"]
        laws, optima = fit_laws(run, experiment, rows)
        if optima:
            run.table("frontier", optima, caption="Points that the law in FLOPs is fitted to.")
        if laws:
            run.table("laws", laws, caption="P = factor · x^exponent; bootstrap intervals.")
            draw_laws(run, rows, laws, optima)
        for law in laws:
            results[f"exponent_{law['law']}_{law['architecture']}"] = law["exponent"]
            said.append(
                f"{law['architecture']}: P ~ {law['law']}^{law['exponent']:.3f} "
                f"({law['exponent_low']:.3f} to {law['exponent_high']:.3f}, n = {law['n']})"
            )
        if len(np.unique(scored)) >= 3:
            results |= regress(run, experiment, rows, said)
        if len(said) == 1:
            run.note("nothing was fitted: every fit needs three different values of its column")
            said.append("too few different values for any fit")
        for sentence in said:
            run.note(sentence)
        return run.finish(
            results,
            title="Scaling laws and scores",
            question="How does perplexity fall with compute, state and score?",
            summary="; ".join(said) + ".",
        )


def fit_laws(
    run: Run, experiment: Experiment, rows: Sequence[Row]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The power laws in FLOPs, per architecture, and in state, over all runs; their points."""
    laws, optima = [], []
    for name in dict.fromkeys(row["architecture"] for row in rows):
        points, by_parabola = frontier([row for row in rows if row["architecture"] == name])
        optima += [{"architecture": name, **point._asdict()} for point in points]
        line = fit_line(
            np.log([point.flops for point in points]),
            np.log([point.perplexity for point in points]),
            run.streams(f"bootstrap/flops/{name}"),
            experiment.draws,
            experiment.level,
        )
        if line is not None:
            chosen = "parabola minima" if by_parabola else "best run of each C"
            laws.append(law_row("flops", name, line, chosen))
    m, p = column_pairs(rows, "state_floats")
    rng = run.streams("bootstrap/state")
    line = fit_line(np.log(m), np.log(p), rng, experiment.draws, experiment.level)
    if line is not None:
        laws.append(law_row("state_floats", "all", line, "all runs"))
    return laws, optima


def regress(
    run: Run, experiment: Experiment, rows: Sequence[Row], said: list[str]
) -> dict[str, Any]:
    """Score against perplexity: correlations, line, foretold values, figure."""
    x, y = column_pairs(rows, "mad_score")
    rng = run.streams("bootstrap/score")
    line = fit_line(x, y, rng, experiment.draws, experiment.level)
    assert line is not None
    if np.ptp(y) == 0:
        run.note("all perplexities are equal: no correlation")
        return {}
    coefficients = correlations(x, y, rng, experiment.draws, experiment.level)
    run.table(
        "correlations",
        coefficients,
        caption=f"Score against perplexity, n = {len(x)}; bootstrap intervals, and the range with "
        "one model left out. A coefficient of ±1 has an interval of no width: read p.",
    )
    predictions = [predict(x, y, score, experiment.level) for score in experiment.score]
    if predictions:
        run.table(
            "predictions",
            [one._asdict() for one in predictions],
            caption=f"Foretold perplexity, {experiment.level:.0%} interval of one more model.",
        )
    results: dict[str, Any] = {"slope": line.slope, "offset": line.offset}
    for row in coefficients:
        results[row["coefficient"].lower()] = row["value"]
    first = coefficients[0]
    said.append(
        f"Spearman {first['value']:.2f} (p = {first['p_permutation']:.3f}, n = {len(x)}), slope "
        f"{line.slope:.1f} ({line.slope_interval.low:.1f} to {line.slope_interval.high:.1f})"
    )
    for one in predictions:
        results[f"perplexity_at_{one.score:g}"] = one.perplexity
        results[f"perplexity_at_{one.score:g}_low"] = one.low
        results[f"perplexity_at_{one.score:g}_high"] = one.high
        said.append(
            f"score {one.score:g}: perplexity {one.perplexity:.2f} ({one.low:.2f} to {one.high:.2f}"
            f"{', outside of the scores seen' if one.extrapolated else ''})"
        )
    source = "published, not measured here" if experiment.runs is None else str(experiment.runs)
    draw_scores(run, rows, line, scores=experiment.score, level=experiment.level, source=source)
    return results


if __name__ == "__main__":
    cli(main, EXPERIMENT)
