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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from mad.plot import scaling_rows
from mad.stats import Interval, percentile_interval
from workbench.cli import RunField, RunOptions, cli
from workbench.errors import ConfigError, DataError
from workbench.run import Run
from workbench.tables import read_csv

NUMBERS = ("flops", "parameters", "tokens", "state_floats", "mad_score", "perplexity")
"""Columns that hold numbers; all but `perplexity` may be missing."""
POSITIVE = tuple(name for name in NUMBERS if name != "mad_score")
TOLERANCE = 0.1
"""Runs whose FLOPs differ by less than this share belong to one IsoFLOP group."""
Vector = Float[np.ndarray, " n"]
Row = Mapping[str, Any]


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


# ---------------------------------------------------------------- reading


def read_runs(path: Path, token_scale: float = 6.0) -> list[dict[str, Any]]:
    """The runs of a CSV, checked; `flops` is filled in from parameters and tokens where it lacks.

    Raises:
        DataError: a column is missing, or a cell is no usable number (file:line:column).
    """
    rows = read_csv(path)
    if not rows:
        raise DataError(f"{path}: no runs; expected a header line and at least one row below it")
    for name in ("architecture", "perplexity"):
        if name not in rows[0]:
            found = ", ".join(rows[0])
            raise DataError(f"{path}:1: no column {name!r}; found {found}. Add it to the header")
    usable = [name for name in NUMBERS[:-1] if name in rows[0]]
    if not usable:
        raise DataError(
            f"{path}:1: nothing to fit perplexity against; add a column "
            "flops, parameters with tokens, state_floats or mad_score"
        )
    for line, row in enumerate(rows, 2):
        if row["architecture"] is None:
            raise DataError(f"{path}:{line}:architecture: empty; expected a name")
        row["architecture"] = str(row["architecture"])
        for name in NUMBERS:
            value = row.get(name)
            if value is None and name != "perplexity":
                continue
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is None or not number or not math.isfinite(value):
                raise DataError(f"{path}:{line}:{name}: found {value!r}, expected a finite number")
            if name in POSITIVE and value <= 0:
                raise DataError(f"{path}:{line}:{name}: found {value}, expected more than 0")
            if name == "mad_score" and not 0 <= value <= 1:
                raise DataError(
                    f"{path}:{line}:{name}: found {value}, expected a fraction between 0 and 1"
                )
        if row.get("flops") is None and row.get("parameters") and row.get("tokens"):
            row["flops"] = token_scale * row["parameters"] * row["tokens"]
    return rows


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


# ---------------------------------------------------------------- fits


class Line(NamedTuple):
    """y = offset + slope · x with percentile intervals of a bootstrap over the points."""

    offset: float
    slope: float
    offset_interval: Interval
    slope_interval: Interval
    n: int


def least_squares(x: Vector, y: Vector) -> tuple[float, float]:
    """Offset and slope of y = offset + slope · x.

    >>> least_squares(np.array([0.0, 1.0]), np.array([1.0, 3.0]))
    (1.0, 2.0)
    """
    centre = x - x.mean()
    slope = float(centre @ (y - y.mean()) / (centre @ centre))
    return float(y.mean() - slope * x.mean()), slope


def resamples(n: int, draws: int, rng: np.random.Generator, x: Vector) -> list[np.ndarray]:
    """Indices drawn again with replacement; draws with a single x define no line and are left out.

    [Efron & Tibshirani 1993, ch. 9.5: the pairs are resampled]
    """
    indices = rng.integers(n, size=(draws, n))
    return [index for index in indices if np.ptp(x[index]) > 0]


def fit_line(
    x: Vector, y: Vector, rng: np.random.Generator, draws: int = 2000, level: float = 0.95
) -> Line | None:
    """Least squares with intervals; None for fewer than three different x."""
    if len(np.unique(x)) < 3:
        return None
    offset, slope = least_squares(x, y)
    fits = np.array([least_squares(x[i], y[i]) for i in resamples(len(x), draws, rng, x)])
    return Line(
        offset,
        slope,
        percentile_interval(fits[:, 0], level),
        percentile_interval(fits[:, 1], level),
        len(x),
    )


class Optimum(NamedTuple):
    """Minimum of an IsoFLOP parabola."""

    flops: float
    parameters: float
    perplexity: float
    n: int


def isoflop_groups(rows: Sequence[Row]) -> list[list[Row]]:
    """Runs of about equal FLOPs, rising: a group ends `TOLERANCE` above its smallest member."""
    groups: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: row["flops"]):
        if groups and row["flops"] <= groups[-1][0]["flops"] * (1 + TOLERANCE):
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def parabola_minimum(group: Sequence[Row]) -> Optimum | None:
    """The minimum of log P over log N; None where there is none among the runs' sizes."""
    sized = [row for row in group if row.get("parameters")]
    x = np.log([row["parameters"] for row in sized])
    if len(np.unique(x)) < 3:
        return None
    y = np.log([row["perplexity"] for row in sized])
    centre = x.mean()
    curvature, slope, offset = np.polyfit(x - centre, y, 2)
    if curvature <= 0:
        return None
    best = -slope / (2 * curvature)
    if not x.min() <= best + centre <= x.max():
        return None
    flops = math.exp(np.mean(np.log([row["flops"] for row in sized])))
    lowest = float(offset - slope**2 / (4 * curvature))
    return Optimum(flops, math.exp(best + centre), math.exp(lowest), len(sized))


def frontier(rows: Sequence[Row]) -> tuple[list[Optimum], bool]:
    """Perplexity by FLOPs of one architecture, and whether parabolas gave it.

    Either every point is the minimum of a parabola, or every point is the best run of its group.
    """
    groups = isoflop_groups([row for row in rows if row.get("flops")])
    minima = [found for group in groups if (found := parabola_minimum(group))]
    if len(minima) >= 3:
        return minima, True
    best = [min(group, key=lambda row: row["perplexity"]) for group in groups]
    return [
        Optimum(row["flops"], row.get("parameters") or math.nan, row["perplexity"], len(group))
        for row, group in zip(best, groups, strict=True)
    ], False


def correlations(
    x: Vector, y: Vector, rng: np.random.Generator, draws: int = 2000, level: float = 0.95
) -> list[dict[str, Any]]:
    """Spearman, Kendall (τ_b), Pearson: value, bootstrap interval, range with one point left out.

    Where the correlation of all points is ±1 every resample has it too and the interval has no
    width: five points cannot tell how far below the truth may lie, so p of the permutation test
    (2/n! for a perfect order) stands beside it.
    """
    from scipy.stats import kendalltau, pearsonr, spearmanr

    kinds = {"Spearman": spearmanr, "Kendall": kendalltau, "Pearson": pearsonr}
    drawn = [i for i in resamples(len(x), draws, rng, x) if np.ptp(y[i]) > 0]
    rows = []
    for name, function in kinds.items():
        values = np.array([function(x[i], y[i])[0] for i in drawn])
        left_out = [
            float(function(np.delete(x, i), np.delete(y, i))[0])
            for i in range(len(x))
            if np.ptp(np.delete(x, i)) > 0 and np.ptp(np.delete(y, i)) > 0
        ]
        low, high = percentile_interval(np.clip(values, -1, 1), level)
        rows.append(
            {
                "coefficient": name,
                "value": float(function(x, y)[0]),
                "low": low,
                "high": high,
                "left_out_lowest": min(left_out),
                "left_out_highest": max(left_out),
                "p_permutation": permutation_p(x, y, function, rng),
                "n": len(x),
            }
        )
    return rows


def permutation_p(x: Vector, y: Vector, function: Any, rng: np.random.Generator) -> float:
    """Two-sided p: share of orders of y with at least this correlation, all of them up to n = 6."""
    from itertools import permutations

    seen = abs(function(x, y)[0]) - 1e-12
    if len(y) <= 6:
        orders = [list(order) for order in permutations(range(len(y)))]
        return sum(abs(function(x, y[order])[0]) >= seen for order in orders) / len(orders)
    draws = 1000
    more = sum(abs(function(x, rng.permutation(y))[0]) >= seen for _ in range(draws))
    return (more + 1) / (draws + 1)


class Prediction(NamedTuple):
    """A foretold perplexity with its prediction interval."""

    score: float
    perplexity: float
    low: float
    high: float
    extrapolated: bool


def predict(x: Vector, y: Vector, score: float, level: float = 0.95) -> Prediction:
    """Perplexity of one more model at `score`, by the straight line through the others.

    The interval is Student's for a new observation, n − 2 degrees of freedom:
    ŷ ± t s √(1 + 1/n + (score − x̄)²/Σ(x − x̄)²)    [Draper & Smith 1998, ch. 3.1]
    """
    from scipy.stats import t

    n = len(x)
    offset, slope = least_squares(x, y)
    residual = y - offset - slope * x
    spread = math.sqrt(float(residual @ residual) / (n - 2))
    centre = x - x.mean()
    lever = math.sqrt(1 + 1 / n + (score - x.mean()) ** 2 / float(centre @ centre))
    half = float(t.ppf((1 + level) / 2, n - 2)) * spread * lever
    value = offset + slope * score
    outside = not x.min() <= score <= x.max()
    return Prediction(score, value, value - half, value + half, outside)


# ---------------------------------------------------------------- the run


def column_pairs(rows: Sequence[Row], name: str) -> tuple[Vector, Vector]:
    """A column and the perplexity, where the column is filled."""
    kept = [row for row in rows if row.get(name) is not None]
    return (
        np.array([row[name] for row in kept], float),
        np.array([row["perplexity"] for row in kept], float),
    )


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
    draw_scores(run, experiment, rows, x, y, line)
    return results


# ---------------------------------------------------------------- drawing


def draw_laws(run: Run, rows: Sequence[Row], laws: Sequence[Row], optima: Sequence[Row]) -> None:
    """One panel per law: points and fitted lines, both axes logarithmic."""
    from workbench.plots import INK, MARKERS, PALETTE, TEXT_POINTS, new_figure

    names = list(dict.fromkeys(row["architecture"] for row in rows))
    for kind in dict.fromkeys(law["law"] for law in laws):
        points = optima if kind == "flops" else [row for row in rows if row.get("state_floats")]
        figure, axes = new_figure(width=5.8, height=3.8)
        for i, name in enumerate(names):
            own = [point for point in points if point["architecture"] == name]
            color = PALETTE[i % len(PALETTE)]
            axes.plot(
                [point[kind] for point in own],
                [point["perplexity"] for point in own],
                marker=MARKERS[i % len(MARKERS)],
                color=color,
                linestyle="none",
                label=name,
            )
        for law in (law for law in laws if law["law"] == kind):
            name = law["architecture"]
            x = np.array([p[kind] for p in points if name in ("all", p["architecture"])], float)
            x.sort()
            color = PALETTE[names.index(name) % len(PALETTE)] if name in names else INK
            axes.plot(x, law["factor"] * x ** law["exponent"], color=color, linestyle=":")
        axes.set_xscale("log")
        axes.set_yscale("log")
        what = "training FLOPs" if kind == "flops" else "floats of state"
        axes.set_xlabel(what, fontsize=TEXT_POINTS, color=INK)
        axes.set_ylabel("perplexity", fontsize=TEXT_POINTS, color=INK)
        axes.legend(fontsize=TEXT_POINTS - 0.5, labelcolor=INK, frameon=False)
        numbers = "; ".join(
            f"{law['architecture']}: exponent {law['exponent']:.3f}, n = {law['n']}"
            for law in laws
            if law["law"] == kind
        )
        run.figure(
            f"law_{kind}",
            figure,
            list(points),
            caption=f"Perplexity by {what}; dotted: power laws. {numbers}.",
            alt=f"Power laws. {numbers}.",
        )


def draw_scores(
    run: Run, experiment: Experiment, rows: Sequence[Row], x: Vector, y: Vector, line: Line
) -> None:
    """Points, line and prediction band of score against perplexity."""
    from workbench.plots import INK, MARKERS, PALETTE, TEXT_POINTS, new_figure

    figure, axes = new_figure(width=5.8, height=3.8)
    ends = [x.min(), x.max(), *experiment.score]
    grid = np.linspace(min(ends) - 0.01, max(ends) + 0.01, 60)
    band = [predict(x, y, float(at), experiment.level) for at in grid]
    low, high = [one.low for one in band], [one.high for one in band]
    axes.fill_between(grid, low, high, color=PALETTE[0], alpha=0.15, linewidth=0)
    axes.plot(grid, line.offset + line.slope * grid, color=INK, linestyle=":")
    kept = [row for row in rows if row.get("mad_score") is not None]
    names = list(dict.fromkeys(row["architecture"] for row in kept))
    for i, name in enumerate(names):
        own = [row for row in kept if row["architecture"] == name]
        axes.plot(
            [row["mad_score"] for row in own],
            [row["perplexity"] for row in own],
            marker=MARKERS[i % len(MARKERS)],
            color=PALETTE[i % len(PALETTE)],
            linestyle="none",
            label=name,
        )
    told = [predict(x, y, score, experiment.level) for score in experiment.score]
    for i, one in enumerate(told):
        axes.errorbar(
            one.score,
            one.perplexity,
            yerr=[[one.perplexity - one.low], [one.high - one.perplexity]],
            marker="_",
            color=INK,
            label="foretold" if i == 0 else None,
        )
    axes.set_xlabel("mean score on the synthetic tasks", fontsize=TEXT_POINTS, color=INK)
    axes.set_ylabel("perplexity", fontsize=TEXT_POINTS, color=INK)
    axes.legend(fontsize=TEXT_POINTS - 0.5, labelcolor=INK, frameon=False)
    numbers = "; ".join(f"{r['architecture']}: {r['mad_score']}, {r['perplexity']}" for r in kept)
    source = "published, not measured here" if experiment.runs is None else str(experiment.runs)
    run.figure(
        "score",
        figure,
        [dict(row) for row in kept],
        caption=f"Score against perplexity ({source}); n = {len(kept)}. Band: "
        f"{experiment.level:.0%} interval of one more model, by a straight line.",
        alt=f"Score and perplexity. {numbers}.",
    )


if __name__ == "__main__":
    cli(main, EXPERIMENT)
