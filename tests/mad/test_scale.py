"""Scaling laws: exact laws are found again, the published order, predictions, bad tables."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from mad.laws import (
    correlations,
    fit_line,
    frontier,
    isoflop_groups,
    parabola_minimum,
    predict,
    read_runs,
)
from mad.scale import Experiment, main, published_runs
from workbench.cli import RunOptions
from workbench.errors import ConfigError, DataError
from workbench.tables import read_csv, write_csv


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def isoflop_rows(name: str, exponent: float) -> list[dict]:
    """log P = log 40 + b log C + 0.3 (log N − log N*)², N* = 0.1 √C: known minima."""
    rows = []
    for flops in (4e18, 8e18, 2e19, 4e19):
        best = 0.1 * math.sqrt(flops)
        for factor in (0.25, 0.5, 1.5, 3.0):
            perplexity = 40 * flops**exponent * math.exp(0.3 * math.log(factor) ** 2)
            rows.append(
                {
                    "architecture": name,
                    "flops": flops,
                    "parameters": factor * best,
                    "perplexity": perplexity,
                }
            )
    return rows


def test_an_exact_power_law_is_found_again_with_an_interval_of_no_width():
    x = np.log([1e17, 3e17, 1e18, 5e18])
    line = fit_line(x, math.log(70.0) - 0.05 * x, rng(), draws=300)
    assert line is not None
    assert line.slope == pytest.approx(-0.05, rel=1e-9)
    assert math.exp(line.offset) == pytest.approx(70.0, rel=1e-9)
    assert line.slope_interval == pytest.approx((-0.05, -0.05), rel=1e-6)
    assert fit_line(x[:2], x[:2], rng()) is None


def test_parabolas_give_the_closed_form_minimum_of_each_group():
    rows = isoflop_rows("a", -0.05)
    groups = isoflop_groups(rows)
    assert [len(group) for group in groups] == [4, 4, 4, 4]
    for group in groups:
        found = parabola_minimum(group)
        assert found is not None
        assert found.parameters == pytest.approx(0.1 * math.sqrt(group[0]["flops"]), rel=1e-6)
        assert found.perplexity == pytest.approx(40 * group[0]["flops"] ** -0.05, rel=1e-9)
    points, by_parabola = frontier(rows)
    assert by_parabola
    assert len(points) == 4
    assert min(row["perplexity"] for row in groups[0]) > points[0].perplexity


def test_a_parabola_without_a_minimum_among_the_sizes_is_none():
    def group(values: list[float]) -> list[dict]:
        return [
            {"flops": 1e18, "parameters": n, "perplexity": p}
            for n, p in zip((1e6, 1e7, 1e8), values, strict=True)
        ]

    assert parabola_minimum(group([9.0, 10.0, 9.0])) is None  # opens downwards
    assert parabola_minimum(group([30.0, 12.0, 10.0])) is not None
    assert parabola_minimum(group([30.0, 20.0, 15.0])) is None  # falls up to the largest
    points, by_parabola = frontier([{**row, "architecture": "a"} for row in group([9, 10, 9])])
    assert not by_parabola
    assert points[0].perplexity == 9


def test_the_five_published_points_are_in_perfect_order():
    rows = published_runs()
    x = np.array([row["mad_score"] for row in rows])
    y = np.array([row["perplexity"] for row in rows])
    found = {row["coefficient"]: row for row in correlations(x, y, rng(), draws=200)}
    assert found["Spearman"]["value"] == pytest.approx(-1.0)
    assert found["Kendall"]["value"] == pytest.approx(-1.0)
    assert found["Spearman"]["p_permutation"] == pytest.approx(2 / math.factorial(5))
    pearson = found["Pearson"]
    assert pearson["value"] == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert -1 <= pearson["low"] <= pearson["value"] <= pearson["high"] <= 0
    assert pearson["left_out_lowest"] < pearson["value"] < pearson["left_out_highest"]


def test_three_points_are_enough_and_a_flag_is_no_number(tmp_path):
    three = correlations(np.array([0.1, 0.2, 0.4]), np.array([9.0, 9.0, 7.0]), rng(), draws=200)
    assert three[2]["value"] == pytest.approx(np.corrcoef([0.1, 0.2, 0.4], [9, 9, 7])[0, 1])
    file = tmp_path / "runs.csv"
    file.write_text("architecture,flops,perplexity\na,1e18,true\n", encoding="utf-8")
    with pytest.raises(DataError, match="2:perplexity: found True"):
        read_runs(file)


def test_a_prediction_is_on_the_line_and_its_interval_covers_as_often_as_it_says():
    draw, inside = rng(), 0
    x = np.linspace(0.5, 0.8, 6)
    for _ in range(1000):
        y = 30 - 25 * x + draw.normal(size=6)
        told = predict(x, y, 0.7, level=0.8)
        inside += told.low <= 30 - 25 * 0.7 + draw.normal() <= told.high
    assert abs(inside / 1000 - 0.8) < 4 * math.sqrt(0.8 * 0.2 / 1000)
    exact = predict(x, 30 - 25 * x, 0.9)
    assert exact.perplexity == pytest.approx(7.5)
    assert exact.high - exact.low < 1e-6
    assert exact.extrapolated
    assert not told.extrapolated


def test_a_run_over_a_table_with_all_columns(tmp_path):
    rows = isoflop_rows("a", -0.05) + isoflop_rows("b", -0.07)
    for row in rows:
        row["state_floats"] = (row["perplexity"] / 90) ** (1 / -0.28)
        row["mad_score"] = 0.9 - row["perplexity"] / 100
    file = write_csv(tmp_path / "runs.csv", rows)
    options = RunOptions(root=tmp_path, threads=1)
    results = main(Experiment(runs=file, score=(0.85,), draws=100, run=options))
    assert results["exponent_flops_a"] == pytest.approx(-0.05, rel=1e-6)
    assert results["exponent_flops_b"] == pytest.approx(-0.07, rel=1e-6)
    assert results["exponent_state_floats_all"] == pytest.approx(-0.28, rel=1e-6)
    assert results["perplexity_at_0.85"] == pytest.approx(5.0, rel=1e-6)
    assert results["pearson"] == pytest.approx(-1.0)
    [laws] = tmp_path.rglob("laws.csv")
    assert {row["points"] for row in read_csv(laws)} == {"parabola minima", "all runs"}


def test_flops_are_filled_in_from_parameters_and_tokens(tmp_path):
    file = tmp_path / "runs.csv"
    file.write_text("architecture,parameters,tokens,perplexity\na,10,20,5\n", encoding="utf-8")
    assert read_runs(file)[0]["flops"] == 1200
    assert read_runs(file, token_scale=2.0)[0]["flops"] == 400


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("architecture,flops\na,1\n", ":1: no column 'perplexity'"),
        ("architecture,perplexity\na,9\n", ":1: nothing to fit"),
        ("architecture,flops,perplexity\n", "no runs"),
        ("architecture,flops,perplexity\na,1e18,9\na,1e18,wide\n", ":3:perplexity: found 'wide'"),
        ("architecture,flops,perplexity\na,-2,9\n", ":2:flops: found -2, expected more than 0"),
        ("architecture,flops,perplexity\na,2,\n", ":2:perplexity: found None"),
        ("architecture,flops,perplexity\n,2,9\n", ":2:architecture: empty"),
        ("architecture,mad_score,perplexity\na,75,9\n", ":2:mad_score: found 75"),
        ("architecture,flops,perplexity\na,2\n", ":2: 2 cells, expected 3"),
        ("architecture,flops,perplexity\na,inf,9\n", ":2:flops: found inf"),
    ],
)
def test_a_bad_table_is_named_with_its_line(tmp_path, text, said):
    file = tmp_path / "runs.csv"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_runs(file)
    assert f"{file}" in str(caught.value)
    assert said in str(caught.value)


def test_bad_settings_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"score=75.*fraction"):
        Experiment(score=(75.0,))
    with pytest.raises(ConfigError, match="level=2"):
        Experiment(level=2)
    with pytest.raises(ConfigError, match="draws=1"):
        Experiment(draws=1)
    with pytest.raises(DataError, match="no such file"):
        main(Experiment(runs=Path("absent.csv")))
    file = tmp_path / "runs.csv"
    file.write_text("architecture,flops,perplexity\na,2,9\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="needs at least 3"):
        main(Experiment(runs=file, score=(0.5,), run=RunOptions(root=tmp_path)))
