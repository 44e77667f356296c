import json

import pytest
import torch

from lplr_q.activation_aware.quantized_layer import LPLRQuantizedLinear, quantised_layers
from lplr_q.throughput import (
    Experiment,
    Steps,
    held_bytes,
    main,
    put_random_codes,
    variant_of,
)
from workbench.cli import RunOptions
from workbench.errors import ConfigError
from workbench.tables import read_csv
from workbench.tiny import tiny_model

TOKENS = torch.tensor([[5, 9, 7]])


def coded(codebook="e8p", family="mistral", **form):
    model = tiny_model(family, **{"n_layer" if family == "gpt2" else "num_hidden_layers": 1})
    form = {"q_bits": 2, "rank": 2, "factor_bits": 4, **form}
    count = put_random_codes(model, codebook, **form, generator=torch.Generator().manual_seed(0))
    assert count == len(list(quantised_layers(model)))
    return model.requires_grad_(False)


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"codebook": "tcq"},
        {"codebook": "lloyd-max", "q_bits": 3},
        {"factor_bits": 16},
        {"factor_bits": (16, 4)},
    ],
    ids=str,
)
def test_random_codes_make_matrices_of_the_right_size(form):
    plain, model = tiny_model("mistral", num_hidden_layers=1), coded(**form)
    for name, layer in quantised_layers(model):
        own = plain.get_submodule(name).weight.detach()
        ratio = float(layer.dequantize().square().mean() / own.square().mean())
        assert 0.3 < ratio < 3, (name, ratio)


def test_variants_compute_the_same():
    model = coded()
    expected = model(input_ids=TOKENS).logits
    for variant in ("dense", "dequant", "kernel", "cached"):
        made = variant_of(model, variant, factors=True)
        with torch.no_grad():
            found = made(input_ids=TOKENS).logits
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
        kinds = {type(m) for m in made.modules()}
        assert (LPLRQuantizedLinear in kinds) == (variant != "dense")
        if variant == "kernel":
            bare = variant_of(model, variant, factors=False)
            assert all(layer.rank == 0 for _, layer in quantised_layers(bare))
            assert not torch.allclose(bare(input_ids=TOKENS).logits, expected, rtol=1e-3)


def test_what_is_kept_is_counted():
    model = coded()
    stored = held_bytes(model)
    made = variant_of(model, "cached", factors=True)
    assert held_bytes(made) == stored
    made(input_ids=TOKENS)
    weights = sum(layer.in_features * layer.out_features for _, layer in quantised_layers(made))
    assert held_bytes(made) == stored + 4 * weights


@pytest.mark.parametrize("family", ["mistral", "gpt2", "mamba", "mamba2"])
def test_steps_with_a_cache_are_those_of_the_whole_sequence(family):
    model = coded(family=family)
    steps = Steps(model, "no", torch.device("cpu"), 5)
    seen = [5]
    with torch.inference_mode():
        for _ in range(4):
            steps.one()
            seen.append(int(steps.token))
        whole = model(input_ids=torch.tensor([seen[:-1]]), use_cache=False).logits[0].argmax(-1)
    assert whole.tolist() == seen[1:]


@pytest.mark.slow
def test_compiled_steps_are_the_same_steps(monkeypatch):
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda m, mode: compiled(m, backend="aot_eager"))
    model = variant_of(coded(), "kernel", factors=True)
    plain = Steps(model, "no", torch.device("cpu"), 5)
    steps = Steps(model, "default", torch.device("cpu"), 5)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch.inference_mode():
        for _ in range(5):
            plain.one()
            steps.one()
            assert int(steps.token) == int(plain.token)
    counted = torch._dynamo.utils.counters
    assert counted["stats"]["unique_graphs"] <= 2  # the first step, and all others
    assert not counted["graph_break"]


def test_a_full_context_starts_anew():
    model = coded()
    model.config.max_position_embeddings = 3
    steps = Steps(model, "no", torch.device("cpu"), 5)
    assert steps.many(7) > 0
    assert steps.position == 1


def test_the_table_has_every_variant_and_the_cost_of_the_factors(tmp_path):
    experiment = Experiment(
        model="tiny:mistral",
        tokens=2,
        warmup=0,
        repeats=1,
        rank=2,
        variants=("dense", "kernel"),
        run=RunOptions(root=tmp_path, threads=1),
    )
    result = main(experiment)
    folder = next(tmp_path.rglob("results.json")).parent
    rows = read_csv(folder / "tables" / "throughput.csv")
    assert [(r["variant"], r["factors"]) for r in rows] == [
        ("dense", True),
        ("kernel", True),
        ("kernel", False),
    ]
    assert all(r["tokens_per_second"] > 0 for r in rows)
    assert rows[0]["speed_over_dense"] == 1
    assert rows[1]["factor_cost"] is not None
    assert 2 < result["bits_per_weight"] < 4
    assert (folder / "figures" / "throughput.png").is_file()
    assert json.loads((folder / "results.json").read_text(encoding="utf-8"))


def test_nonsense_is_refused(tmp_path):
    for bad in ({"variants": ("fast",)}, {"variants": ()}, {"tokens": 0}, {"rank": -1}):
        with pytest.raises(ConfigError):
            Experiment(**bad)
    graphs = Experiment(
        model="tiny:mistral",
        compile="reduce-overhead",
        run=RunOptions(root=tmp_path, device="cpu"),
    )
    with pytest.raises(ConfigError, match="CUDA graphs"):
        main(graphs)
