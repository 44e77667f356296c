from dataclasses import replace

import pytest
import torch

from lplr_q.linalg.ldl import cholesky, regularise
from lplr_q.linalg.regression import cholesky_whitening, rank_constrained_regression
from lplr_q.sv_profile import (
    EXPERIMENT,
    curve_rows,
    effective_rank,
    energy,
    main,
    spectra,
    summary_rows,
)
from workbench.errors import ConfigError, DataError
from workbench.run import RunOptions
from workbench.tables import read_csv

TINY = replace(
    EXPERIMENT,
    model="tiny:mistral",
    include=r"layers\.[01]\.mlp\.(up|down)",
    rank=3,
    calibration=("microworld:world",),
    calibration_tokens=128,
    length=32,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_effective_rank_and_energy_in_closed_form():
    assert effective_rank(torch.ones(7)) == pytest.approx(7)
    assert effective_rank(torch.tensor([3.0, 0, 0])) == pytest.approx(1)
    halves = torch.tensor([1.0, 1, 0, 0])
    assert effective_rank(halves) == pytest.approx(2)
    assert effective_rank(5 * halves) == pytest.approx(2)
    assert energy(torch.tensor([2.0, 1, 1]), 1) == pytest.approx(4 / 6)
    assert energy(torch.tensor([2.0, 1, 1]), 9) == pytest.approx(1)


def test_plain_spectrum_is_that_of_the_matrix_and_does_not_depend_on_its_scale():
    weight = normal(6, 9)
    found = spectra(weight, None)
    assert set(found) == {"plain"}
    expected = torch.linalg.svdvals(weight) / weight.norm()
    assert torch.allclose(found["plain"], expected)
    assert torch.allclose(spectra(3 * weight, None)["plain"], found["plain"])


def test_both_spectra_agree_when_the_inputs_are_white():
    found = spectra(normal(6, 9), 4 * torch.eye(9))
    assert torch.allclose(found["plain"], found["whitened"])


def test_the_tail_of_the_whitened_spectrum_is_the_loss_of_the_best_factors():
    weight, x = normal(10, 12), normal(12, 40, seed=1) * torch.linspace(3, 0.1, 12)[:, None]
    hessian = x @ x.T / 40
    found = spectra(weight, hessian)["whitened"]
    matrix = regularise(hessian)
    left, right, _ = rank_constrained_regression(weight, cholesky_whitening(cholesky(matrix)), 4)
    rest = weight - left @ right
    error = torch.trace(rest @ matrix @ rest.T) / torch.trace(weight @ matrix @ weight.T)
    assert float(error) == pytest.approx(1 - energy(found, 4), rel=1e-9)
    assert energy(found, 4) > energy(spectra(weight, None)["plain"], 4)


def test_a_damaged_weight_is_named():
    weight = normal(3, 3)
    weight[1, 2] = torch.inf
    with pytest.raises(DataError, match=r"\(1, 2\)"):
        spectra(weight, None)


def test_mean_and_deviation_over_the_layers():
    one, two = torch.tensor([0.8, 0.6]), torch.tensor([0.6, 0.8])
    rows = curve_rows(
        {"m.0.up": {"plain": one}, "m.1.up": {"plain": two}, "m.0.down": {"plain": one}}
    )
    up = [r for r in rows if r["sublayer"] == "up"]
    assert [r["mean"] for r in up] == pytest.approx([0.7, 0.7])
    assert [r["std"] for r in up] == pytest.approx([0.1, 0.1])
    assert [r["layers"] for r in rows] == [2, 2, 1, 1]
    layers = [
        {"sublayer": "up", "form": "plain", "energy": e, "effective_rank": 1.5} for e in (0.2, 0.4)
    ]
    (row,) = summary_rows(layers)
    assert row["energy"] == pytest.approx(0.3)
    assert row["energy_std"] == pytest.approx(0.1)
    assert row["effective_rank_std"] == pytest.approx(0, abs=1e-12)


def test_the_script_end_to_end(tmp_path):
    options = RunOptions(root=tmp_path, name="tiny", threads=1, device="cpu")
    results = main(replace(TINY, run=options))
    folder = tmp_path / "lplr_q" / "tiny"
    assert {r["sublayer"] for r in results["sublayers"]} == {"mlp.up_proj", "mlp.down_proj"}
    assert all(r["layers"] == 2 for r in results["sublayers"])
    assert 0 < results["energy"]["plain"] < results["energy"]["whitened"] < 1
    curves = read_csv(folder / "figures" / "spectra.csv")
    assert {r["form"] for r in curves} == {"plain", "whitened"}
    assert (folder / "figures" / "spectra.svg").is_file()
    assert len(read_csv(folder / "tables" / "layers.csv")) == 8


@pytest.mark.slow
def test_stored_hessians_give_the_same_spectra(tmp_path):
    options = RunOptions(root=tmp_path, name="one", threads=1, device="cpu")
    results = main(replace(TINY, run=options))
    hessians = str(tmp_path / "lplr_q" / "one" / "hessians")
    stored = replace(TINY, hessians=hessians, run=replace(options, name="stored"))
    assert main(stored)["energy"] == results["energy"]


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"calibration": ()}, {"calibration_tokens": 8}])
def test_settings_that_cannot_work(wrong):
    with pytest.raises(ConfigError):
        replace(TINY, **wrong)
