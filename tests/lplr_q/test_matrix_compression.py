"""The demonstrations: their inputs, their measures, the script from Python."""

from __future__ import annotations

import csv
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from lplr_q.data_agnostic import inputs, tasks
from lplr_q.matrix_compression import EXPERIMENT, Experiment, main
from workbench.cli import RunOptions
from workbench.errors import ConfigError, DataError


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def streams(name: str) -> torch.Generator:
    return stream(sum(name.encode()))


SETTINGS = {"bits": 4, "bits_right": 4, "ratio": 1.0, "sketch": "gaussian", "affine": True}


# --- inputs -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "y", "value"),
    [
        (0.0, 0.0, 0.2), (0.0, 0.9, 1.0), (0.0, 0.35, 0.3), (0.0, 0.075, 0.3), (0.0, -0.1, 0.3),
        (0.22, 0.0, 0.0), (-0.22, 0.0, 0.0), (0.95, 0.95, 0.0), (0.0, -0.606, 0.3),
    ],
)  # fmt: skip
def test_the_phantom_has_its_published_values(x, y, value):
    size = 401
    image = inputs.shepp_logan(size)
    row, column = round((1 - y) / 2 * (size - 1)), round((1 + x) / 2 * (size - 1))
    assert float(image[row, column]) == pytest.approx(value, abs=1e-6)


def test_the_ventricles_lean_outwards_at_the_top():
    image = inputs.shepp_logan(201)
    dark = image == 0
    dark[:, :30] = dark[:, -30:] = False
    dark[:20] = dark[-20:] = False
    upper = dark[70:95].nonzero()[:, 1]
    lower = dark[105:130].nonzero()[:, 1]
    right_up, right_down = upper[upper > 100].float().mean(), lower[lower > 100].float().mean()
    assert right_up > right_down + 2


def test_a_picture_file_becomes_grey_values(tmp_path):
    from matplotlib.image import imsave

    colour = np.zeros((4, 6, 3))
    colour[..., 1] = 1.0
    imsave(tmp_path / "green.png", colour)
    grey = inputs.read_image(tmp_path / "green.png")
    assert grey.shape == (4, 6)
    assert torch.allclose(grey, torch.full((4, 6), 0.587), atol=1e-3)
    with pytest.raises(DataError, match="no such picture"):
        inputs.read_image(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("not a picture", encoding="utf-8")
    with pytest.raises(DataError, match="no picture that can be read"):
        inputs.read_image(tmp_path / "text.png")


def test_the_power_law_is_kept():
    values = torch.linalg.svdvals(inputs.power_law_matrix(20, 12, 0.8, stream()))
    assert torch.allclose(values, torch.arange(1, 13.0) ** -0.8, rtol=1e-4)


def test_linear_weights_are_outputs_by_inputs_without_the_head():
    from workbench.tiny import tiny_model

    for family in ("mistral", "gpt2"):
        model = tiny_model(family)
        found = inputs.linear_weights(model)
        assert not any("head" in name for name in found)
        name, weight = next((n, w) for n, w in found.items() if "down" in n or "c_fc" in n)
        module = dict(model.named_modules())[name]
        expected = module.weight if isinstance(module, torch.nn.Linear) else module.weight.T
        assert torch.equal(weight, expected.detach())
    with pytest.raises(ConfigError, match="matches no linear layer"):
        inputs.linear_weights(model, "nothing")


def test_hidden_states_carry_the_next_token():
    from workbench.models import load_model
    from workbench.text import load_texts, pack_blocks

    model, tokenizer = load_model("tiny:mistral")
    texts = load_texts("microworld:world", n=8, split="test")
    data = inputs.hidden_state_embeddings(model, tokenizer, texts, 20, 5, length=16)
    assert data.stored.shape[0] == 20
    assert data.queries.shape[0] == 5
    tokens = pack_blocks(tokenizer, texts, 16)[:2]
    assert torch.equal(data.labels[:15], tokens[0, 1:])
    assert torch.equal(data.labels[15:20], tokens[1, 1:6])
    with pytest.raises(DataError, match="give more text"):
        inputs.hidden_state_embeddings(model, tokenizer, texts, 10**6, 5, length=16)


# --- measures -----------------------------------------------------------------------------------


def test_psnr_by_hand():
    a = torch.tensor([[0.0, 2.0]])
    assert tasks.signal_to_noise(a, a + 0.2) == pytest.approx(20.0, abs=1e-5)
    assert tasks.signal_to_noise(a, a) == math.inf


def test_the_vote_takes_the_nearer_of_equal_counts():
    labels = np.array([[3, 1, 1, 2], [5, 4, 4, 5], [7, 8, 9, 6]])
    assert tasks.vote(labels).tolist() == [1, 5, 7]


def test_neighbours_are_those_of_a_plain_search():
    g = stream(1)
    stored, queries = torch.randn(50, 6, generator=g), torch.randn(7, 6, generator=g)
    expected = torch.cdist(queries, stored).topk(4, largest=False).indices
    assert np.array_equal(tasks.nearest(stored, queries, 4), expected.numpy())


def test_wilson_at_the_ends_and_in_the_middle():
    low, high = tasks.wilson(50, 100)
    assert (low, high) == (pytest.approx(0.4038, abs=1e-4), pytest.approx(0.5962, abs=1e-4))
    assert tasks.wilson(0, 10)[0] == 0.0
    assert tasks.wilson(10, 10)[1] == pytest.approx(1.0)


def test_sixteen_bits_find_the_same_neighbours_and_two_lose_some():
    data = inputs.mixture_embeddings(300, 60, stream(2), d=64, spread=1.0)
    rows = tasks.neighbour_rows(
        "mixture", data, ("naive",), naive_bits=16, k=5, settings=SETTINGS, stream=streams
    )
    exact, fine = rows
    assert exact["recall"] == 1.0
    assert fine["recall"] > 0.99
    assert fine["accuracy"] == exact["accuracy"] > 0.5
    rough = tasks.neighbour_rows(
        "mixture", data, ("naive",), naive_bits=2, k=5, settings=SETTINGS, stream=streams
    )[1]
    assert rough["recall"] < 0.9
    with pytest.raises(ConfigError, match="k=301"):
        tasks.neighbour_rows(
            "mixture", data, (), naive_bits=2, k=301, settings=SETTINGS, stream=streams
        )


def test_layer_rows_and_their_summary():
    weights = {str(i): inputs.power_law_matrix(24, 16, 1.0, stream(i)) for i in range(3)}
    rows = []
    for name, weight in weights.items():
        rows += tasks.layer_rows(
            name, weight, ("naive", "lplr", "lplr-q"), naive_bits=2,
            settings=SETTINGS, stream=streams,
        )  # fmt: skip
    assert [r["method"] for r in rows] == ["LPLR", "LPLR-Q"] * 3
    summary = {r["method"]: r for r in tasks.layer_summary(rows)}
    mine = [r for r in rows if r["method"] == "LPLR"]
    assert summary["LPLR"]["count"] == 3
    assert summary["LPLR"]["column_sketch_error"] == pytest.approx(
        np.mean([r["column_sketch_error"] for r in mine])
    )
    assert summary["LPLR"]["better"] == sum(
        r["column_sketch_error"] < r["naive_error"] for r in mine
    )
    assert summary["LPLR-Q"]["row_sketch_error"] is None
    assert all(r["row_sketch_error"] != r["column_sketch_error"] for r in mine)


# --- the script ---------------------------------------------------------------------------------


def small(tmp_path, **changes) -> Experiment:
    return replace(
        EXPERIMENT,
        naive_bits=(1,),
        size=24,
        width=24,
        ranks=(2, 4),
        repeats=1,
        run=RunOptions(root=tmp_path, threads=1),
        **changes,
    )


def test_curve_writes_its_table_and_figure(tmp_path):
    experiment = small(tmp_path, task="curve", methods=("dsvd", "lplr"))
    results = main(experiment)
    folder = next((tmp_path / "lplr_q").glob("matrix_compression-*"))
    with (folder / "tables" / "curve.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(r["method"], r["rank"]) for r in rows] == [
        ("direct SVD", "2"), ("LPLR", "2"), ("direct SVD", "4"), ("LPLR", "4"),
    ]  # fmt: skip
    assert float(rows[1]["relative_error"]) == pytest.approx(
        results["curve_relative_error_lplr_rank2"]
    )
    assert (folder / "figures" / "curve.png").is_file()
    assert main(experiment) == results


def test_measured_widths_are_never_worse():
    image = inputs.shepp_logan(24)
    fixed, searched = (
        tasks.image_rows(
            image, ("naive", "dsvd"), naive_bits=1,
            settings={**SETTINGS, "search": search}, stream=streams,
        )[0]
        for search in (False, True)
    )  # fmt: skip
    assert searched[0] == fixed[0]
    assert searched[1]["psnr_db"] >= fixed[1]["psnr_db"]


@pytest.mark.parametrize("search", [False, True])
def test_the_width_that_was_used_is_reported(search):
    settings = {**SETTINGS, "search": search}
    if search:
        settings |= {"bits": 0, "bits_right": 0}
    weight = inputs.power_law_matrix(64, 48, 0.3, stream())
    row = tasks.layer_rows("w", weight, ("dsvd",), naive_bits=4, settings=settings, stream=streams)[
        0
    ]
    assert row["chosen_bits"] in ((2, 3, 4, 6, 8) if search else (4,))
    assert row["bits"] == (0 if search else 4)


def test_a_picture_of_ones_own_makes_a_run_of_its_own(tmp_path):
    from matplotlib.image import imsave

    path = tmp_path / "own.png"
    imsave(path, inputs.shepp_logan(20).numpy(), cmap="gray")
    experiment = small(tmp_path / "runs", task="images", methods=("lplr",), image=path)
    first = main(experiment)
    imsave(path, inputs.shepp_logan(20).numpy().T, cmap="gray")
    second = main(experiment)
    assert set(first) == set(second) == {"psnr_db_naive_1bit", "psnr_db_lplr_1bit"}
    assert first != second
    reports = [p.read_text(encoding="utf-8") for p in (tmp_path / "runs").rglob("report.md")]
    assert len(reports) == 2
    assert all("own.png at 1 bit per pixel" in r and "1 bits" not in r for r in reports)
    with pytest.raises(DataError, match="no such picture"):
        main(small(tmp_path, task="images", image=tmp_path / "none.png"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"methods": ("lpl",)}, "lplr"),
        ({"sketch": "gausian"}, "gaussian"),
        ({"naive_bits": (0,)}, "naive_bits"),
        ({"bits": ()}, "bits"),
        ({"bits_right": 17}, "bits_right"),
        ({"k": 11, "stored": 10}, "k=11"),
        ({"ranks": (0,)}, "ranks"),
        ({"ranks": (701,)}, "width=700"),
        ({"ratio": 0.0}, "ratio=0"),
        ({"size": 0}, "size=0"),
        ({"power_iterations": -1}, "power_iterations"),
        ({"bits": (4, 8), "search": True}, "--search"),
    ],
)
def test_bad_settings_are_named(changes, words):
    with pytest.raises(ConfigError, match=words):
        replace(EXPERIMENT, **changes)
