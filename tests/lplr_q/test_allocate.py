import itertools
import math
from statistics import median

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lplr_q.activation_aware.decompose import decompose, prepare_hessian
from lplr_q.allocate import (
    Allocation,
    Item,
    allocate,
    build_item,
    read_allocation,
    uniform_settings,
)
from lplr_q.bits import layer_bits
from lplr_q.linalg.regression import cholesky_whitening, rank_constrained_regression
from lplr_q.prediction import (
    Choice,
    Fit,
    Survey,
    available_widths,
    choices_for,
    distortion,
    fit_probes,
    predict,
    probes,
    spectrum,
    survey,
)
from lplr_q.sensitivity import output_sensitivity
from workbench.errors import ConfigError, DataError
from workbench.storage import load_tree, save_tree, write_json
from workbench.tiny import tiny_model


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def problem(m=48, n=64, seed=0, decay=0.6, spike=1.0):
    g = generator(seed)
    weight = torch.randn(m, n, generator=g)
    weight = weight + spike * torch.randn(m, 3, generator=g) @ torch.randn(3, n, generator=g)
    mixing = torch.randn(n, n, generator=g) * (1 + torch.arange(n)) ** -decay
    return weight, mixing @ mixing.T


def prepared_for(hessian, n, rotated=True):
    return prepare_hessian(hessian, n, generator=generator(7) if rotated else None)


def measured(weight, prepared, choice, seed=11):
    return decompose(
        weight,
        prepared,
        codebook=choice.codebook,
        q_bits=choice.q_bits,
        rank=choice.rank,
        factor_bits=choice.factor_bits,
        rounds=1,
        sweeps=0,
        generator=generator(seed),
    ).error


# ---------------------------------------------------------------- the spectrum


def test_spectrum_with_the_identity_is_the_plain_svd():
    weight, _ = problem()
    known = spectrum(weight, prepare_hessian(None, 64, generator=None))
    values = torch.linalg.svdvals(weight.double()).square()
    assert known.energy == pytest.approx(float(values.sum()))
    torch.testing.assert_close(known.power[0], values.sum())
    torch.testing.assert_close(known.tail[5], values[5:].sum() / values.sum())
    assert float(known.tail[-1]) == 0
    assert known.noise == {b: pytest.approx(1 / known.energy) for b in (1, 8, 16)}


@pytest.mark.parametrize("rotated", [True, False])
def test_tail_and_power_are_those_of_the_rank_constrained_regression(rotated):
    weight, hessian = problem()
    plain = prepare_hessian(hessian, 64, generator=None)
    known = spectrum(weight, prepared_for(hessian, 64, rotated))
    for rank in (0, 1, 4, 40):
        left, right, _ = rank_constrained_regression(
            weight.double(), cholesky_whitening(plain.factor), rank
        )
        rest = weight.double() - left @ right
        lost = float(((rest @ plain.matrix) * rest).sum()) / known.energy
        assert float(known.tail[rank]) == pytest.approx(lost, rel=1e-6, abs=1e-9)
        assert float(known.power[rank]) == pytest.approx(float(rest.square().sum()), rel=1e-6)


def test_prediction_for_gaussian_weights_needs_no_fit():
    """Loss identity of LDLQ: sum_k tr(eta_k D_k eta_k^T) with Gaussian local errors."""
    g = generator(3)
    weight = torch.randn(256, 64, generator=g)
    # a mild spectrum: strong feedback widens what is rounded, which the fit is there for
    prepared = prepared_for(torch.diag((1 + torch.arange(64.0)) ** -0.4), 64)
    known = spectrum(weight, prepared)
    for codebook, bits in (("e8p", 2), ("lloyd-max", 3)):
        choice = Choice(codebook, bits, 0, 4)
        truth = measured(weight, prepared, choice) ** 2
        assert predict(known, choice) == pytest.approx(truth, rel=0.06)


def test_distortion_of_the_scalar_codebook_is_the_published_one():
    assert distortion("lloyd-max", 2) == pytest.approx(0.1175, rel=0.06)
    assert distortion("e8p", 2) == pytest.approx(0.0913, rel=0.03)


def test_fitted_prediction_hits_the_probes_and_comes_close_elsewhere():
    weight, hessian = problem(96, 96, seed=5, spike=0.3)
    prepared = prepared_for(hessian, 96)
    known = spectrum(weight, prepared)
    options = choices_for(96, 96, ranks=(0, 2, 4, 8, 16))
    chosen = probes(options)
    assert [(c.q_bits, c.rank > 0) for c in chosen] == [(2, False), (2, True), (4, False)]
    truth = {c: measured(weight, prepared, c) ** 2 for c in chosen}
    fit = fit_probes(known, truth)
    for choice in chosen:
        assert predict(known, choice, fit) == pytest.approx(truth[choice], rel=1e-6)
    ratios = [math.sqrt(predict(known, c, fit)) / measured(weight, prepared, c) for c in options]
    assert abs(median(ratios) - 1) < 0.05
    assert 0.75 < min(ratios) <= max(ratios) < 1.25


def test_prediction_falls_with_rank_and_bits_and_never_exceeds_one():
    weight, hessian = problem()
    known = spectrum(weight, prepared_for(hessian, 64))
    by_rank = [predict(known, Choice("e8p", 2, r, 4)) for r in (0, 1, 4, 16, 48)]
    assert by_rank == sorted(by_rank, reverse=True)
    by_bits = [predict(known, Choice("e8p", b, 2, 4)) for b in (2, 3, 4)]
    assert by_bits == sorted(by_bits, reverse=True)
    assert predict(known, Choice("lloyd-max", 1, 0, 4), Fit({("lloyd-max", 1): 1e9})) == 1.0
    without = [predict(known, Choice("e8p", 0, r, 16)) for r in (1, 4, 48)]
    assert without == [pytest.approx(float(known.tail[r])) for r in (1, 4, 48)]


def test_rounded_factors_are_never_free():
    g = generator(2)
    weight = torch.randn(32, 4, generator=g) @ torch.randn(4, 48, generator=g)
    known = spectrum(weight, prepared_for(problem(32, 48)[1], 48))
    plain = predict(known, Choice("e8p", 2, 0, 4))
    fit = fit_probes(known, {Choice("e8p", 2, 0, 4): plain, Choice("e8p", 2, 2, 4): 1e-9})
    assert fit.gamma > 0
    ranked = predict(known, Choice("e8p", 2, 4, 4), Fit())
    assert 1e-3 * plain < predict(known, Choice("e8p", 2, 4, 4), Fit(kappa=0.0)) < ranked < plain
    assert predict(known, Choice("e8p", 2, 4, 16), Fit()) < 1e-9 * plain


def test_interpolation_of_the_fit():
    fit = Fit({("e8p", 2): 1.0, ("e8p", 4): 4.0})
    assert [fit.of("e8p", b) for b in (2, 3, 4, 1)] == [1.0, pytest.approx(2.0), 4.0, 1.0]
    assert fit.of("lloyd-max", 3) == pytest.approx(2.0)  # another codebook borrows
    assert Fit().of("e8p", 2) == 1.0


# ---------------------------------------------------------------- the knapsack


def random_items(seed, sublayers=4):
    g = generator(seed)
    items = []
    for index in range(sublayers):
        m, n = (16, 32) if index % 2 else (32, 32)
        scale = float(torch.rand(1, generator=g)) * 0.5 + 0.05
        importance = float(10 ** (2 * torch.rand(1, generator=g) - 1))
        choices = tuple(
            Choice(c.codebook, c.q_bits, c.rank, 4, c.bits, scale * 4.0 ** (2 - c.q_bits) * f)
            for c in choices_for(m, n, ranks=(0, 1, 2, 4), target=2.5)
            for f in [float(0.5 + 0.5 * torch.rand(1, generator=g)) / (1 + c.rank)]
        )
        items.append(Item(f"layer{index}", m * n, importance, choices))
    return items


@given(st.integers(0, 10_000), st.sampled_from([2.4, 2.6, 3.0, 3.5, 4.2]))
@settings(max_examples=25, deadline=None)
def test_within_the_budget_and_never_worse_than_any_uniform_setting(seed, target):
    items = random_items(seed, 8)
    found = allocate(items, target)
    assert found.bits_per_weight <= target + 1e-9
    for uniform in uniform_settings(items, target):
        cost = sum(item.cost(uniform[item.name]) for item in items)
        assert sum(c.bits for c in uniform.values()) <= target * sum(i.weights for i in items)
        assert found.cost <= cost * (1 + 1e-12)
        assert found.uniform_cost <= cost * (1 + 1e-12)


def test_a_uniform_setting_that_no_price_finds_is_not_missed():
    """3 bits everywhere lie above the line from 2 to 3.5 bits: no price of a bit picks them, and
    the best upgrade of one layer leaves too little for the other."""
    choices = tuple(
        Choice("e8p", q_bits, 0, 4, bits, error2)
        for q_bits, bits, error2 in ((2, 20, 1.0), (3, 30, 0.4), (4, 35, 0.0))
    )
    items = [Item(name, 10, 1.0, choices) for name in ("a", "b")]
    found = allocate(items, 3.0)
    assert found.cost == found.uniform_cost == pytest.approx(0.8)
    assert [c.q_bits for c in found.modules.values()] == [3, 3]


@pytest.mark.parametrize("seed", range(6))
def test_close_to_the_best_of_all_combinations(seed):
    items = [
        Item(i.name, i.weights, i.importance, i.choices[:: max(1, len(i.choices) // 9)])
        for i in random_items(seed)
    ]
    target = 3.2
    budget = target * sum(item.weights for item in items)
    best = min(
        sum(i.cost(c) for i, c in zip(items, combination, strict=True))
        for combination in itertools.product(*(i.choices for i in items))
        if sum(c.bits for c in combination) <= budget
    )
    found = allocate(items, target)
    assert best * (1 - 1e-9) <= found.cost <= best * 1.25


def test_the_budget_is_used_to_within_one_percent():
    items = []
    for index in range(12):
        weight, hessian = problem(64, 64, seed=index, decay=0.3 + 0.05 * index)
        items.append((f"l{index}", survey(weight, prepared_for(hessian, 64))))
    for target in (2.3, 2.5, 3.1, 4.0):
        found = [build_item(name, known, target=target) for name, known in items]
        spent = allocate(found, target).bits_per_weight
        assert 0.99 * target <= spent <= target + 1e-9


def test_the_important_layer_gets_the_bits():
    weight, hessian = problem(64, 64)
    known = survey(weight, prepared_for(hessian, 64))
    items = [
        build_item(name, known, target=3.0, sensitivity=s)
        for name, s in (("dull", 1e-6), ("sharp", 1.0))
    ]
    found = allocate(items, 3.0)
    assert found.modules["sharp"].bits > found.modules["dull"].bits
    assert found.cost < found.uniform_cost


def test_a_survey_survives_storage(tmp_path):
    weight, hessian = problem(32, 48)
    prepared = prepared_for(hessian, 48)
    asked = []

    def measure(choice):
        asked.append(choice)
        return 0.1 * (5 - choice.q_bits)

    found = survey(weight, prepared, measure)
    assert len(asked) == 3
    save_tree(tmp_path / "unit", found.to_tree())
    again = Survey.from_tree(load_tree(tmp_path / "unit"))
    first, second = (build_item("x", s, target=3.0, sensitivity=2.0) for s in (found, again))
    assert [(c.entry(), c.bits, c.error2) for c in first.choices] == [
        (c.entry(), c.bits, c.error2) for c in second.choices
    ]
    assert first.importance == second.importance == 2 * found.spectrum.energy
    by_kind = {(c.q_bits, c.rank): c.error2 for c in first.choices}
    assert by_kind[2, 0] == pytest.approx(0.09)  # what was measured is not predicted


def test_nothing_and_too_little():
    with pytest.raises(ConfigError, match="no sublayer"):
        allocate([], 3.0)
    with pytest.raises(ConfigError, match=r"smallest choices of all sublayers take 2\.\d+"):
        allocate(random_items(0), 1.9)
    with pytest.raises(ConfigError, match="nope"):
        available_widths("nope")


def test_choices_count_their_bits_exactly():
    for choice in choices_for(24, 40, codebooks=("e8p", "lloyd-max"), target=2.8):
        bits = layer_bits(
            24, 40, codebook=choice.codebook, q_bits=choice.q_bits, rank=choice.rank, factor_bits=4
        )
        assert choice.bits == bits.total


# ---------------------------------------------------------------- the file


def test_allocation_file_round_trip_and_damage(tmp_path):
    found = allocate(random_items(1), 3.0)
    assert isinstance(found, Allocation)
    path = tmp_path / "allocation.json"
    write_json(path, found.to_tree())
    modules = read_allocation(path)
    assert modules == {name: choice.entry() for name, choice in found.modules.items()}
    good = {"codebook": "e8p", "q_bits": 2, "rank": 0, "factor_bits": 4}
    apart = Choice("e8p", 2, 3, (3, 5)).entry()
    write_json(path, {"modules": {"a": apart}})
    assert read_allocation(path) == {"a": {**good, "rank": 3, "factor_bits": [3, 5]}}
    assert Choice(**read_allocation(path)["a"]) == Choice("e8p", 2, 3, (3, 5))
    assert Choice("e8p", 2, 3, [4, 4]) == Choice("e8p", 2, 3, 4)
    for tree, message in (
        ([], "no 'modules' table"),
        ({"modules": {}}, "no 'modules' table"),
        ({"modules": {"a": {"codebook": "e8p"}}}, "a holds"),
        ({"modules": {"a": {**good, "rank": 1.5}}}, "a.rank is 1.5, no int"),
        ({"modules": {"a": {**good, "rank": True}}}, "a.rank is True"),
        ({"modules": {"a": {**good, "rank": -1}}}, "negative rank"),
        ({"modules": {"a": {**good, "factor_bits": [4]}}}, r"factor_bits is \[4\], no int"),
        ({"modules": {"a": {**good, "factor_bits": [4, "5"]}}}, r"factor_bits is .*, no int"),
    ):
        write_json(path, tree)
        with pytest.raises(DataError, match=message):
            read_allocation(path)
    with pytest.raises(DataError):
        read_allocation(tmp_path / "none.json")


# ---------------------------------------------------------------- sensitivity


def test_sensitivity_foretells_the_loss_of_a_disturbed_layer():
    """KL(model || disturbed) = s tr(E H E^T) to second order, for errors spread over outputs."""
    model = tiny_model("mistral", seed=0)
    tokens = torch.randint(3, 259, (16, 16), generator=generator(1))
    name = "model.layers.2.mlp.down_proj"
    foretold = output_sensitivity(model, tokens, [name], kind="kl", generator=generator(2))[name]
    layer = model.get_submodule(name)
    inputs = []
    handle = layer.register_forward_pre_hook(lambda _m, a: inputs.append(a[0].detach()))
    with torch.no_grad():
        before = model(input_ids=tokens).logits[:, :-1].double().log_softmax(-1)
        handle.remove()
        x = inputs[0].flatten(0, 1).double()
        hessian = x.T @ x / len(x)
        gaps = []
        for seed in range(3):
            noise = 0.05 * torch.randn(layer.weight.shape, generator=generator(seed))
            noise = noise * float(layer.weight.std())
            layer.weight += noise
            after = model(input_ids=tokens).logits[:, :-1].double().log_softmax(-1)
            layer.weight -= noise
            nats = float((before.exp() * (before - after)).sum(-1).mean())
            gaps.append(nats / float(((noise.double() @ hessian) * noise.double()).sum()))
    assert sum(gaps) / len(gaps) == pytest.approx(foretold, rel=0.25)


def test_sensitivity_leaves_the_model_as_it_was_and_ignores_padding():
    model = tiny_model("mistral", seed=0)
    wanted = [p.requires_grad for p in model.parameters()]
    name = "model.layers.0.self_attn.q_proj"
    tokens = torch.randint(3, 259, (4, 12), generator=generator(1))
    own = output_sensitivity(model, tokens, [name])[name]
    assert own > 0
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert all(p.grad is None for p in model.parameters())
    padded = torch.cat([tokens, torch.zeros(4, 5, dtype=torch.long)], 1)
    mask = padded != 0
    assert output_sensitivity(model, padded, [name], mask=mask)[name] == pytest.approx(
        own, rel=1e-4
    )
    parts = output_sensitivity(model, tokens, [name], batch_size=1)[name]
    assert parts == pytest.approx(own, rel=1e-4)


def test_sensitivity_of_nonsense():
    model = tiny_model("mistral", seed=0)
    tokens = torch.ones(2, 4, dtype=torch.long)
    with pytest.raises(ConfigError, match="choose from fisher, kl"):
        output_sensitivity(model, tokens, [], kind="taste")
    with pytest.raises(ConfigError, match="give a generator"):
        output_sensitivity(model, tokens, [], kind="kl")
    with pytest.raises(DataError, match="every target is padding"):
        output_sensitivity(model, tokens, [], mask=tokens < 0)
