"""Exact where it says exact: neutral, fixed, deferred; and the published closed form."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from early_exit.adapters.base import Adapter, adapt
from early_exit.engine import Engine
from early_exit.heads import Exits
from workbench.errors import ConfigError, DataError
from workbench.tiny import tiny_model

LAYERS = 6
_CACHE: dict[tuple[str, bool], Adapter] = {}


@pytest.fixture(autouse=True, scope="module")
def _no_gradients():
    with torch.no_grad():
        yield


def backbone(family: str, double: bool = True) -> Adapter:
    """A tiny model of six blocks, made once."""
    if (family, double) not in _CACHE:
        model = tiny_model(family, num_hidden_layers=LAYERS)
        _CACHE[family, double] = adapt(model.double() if double else model)
    return _CACHE[family, double]


def random_exits(adapter: Adapter, at: tuple[int, ...], emission: str = "lens", seed: int = 0):
    exits = Exits(at, adapter.gate_width, adapter.width, emission).to(adapter.dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in exits.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.8)
        if exits.translators is not None:
            exits.translators.weight.mul_(0.02)
    return exits.requires_grad_(False)


def text(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 250, (length,), generator=torch.Generator().manual_seed(seed))


def plain_greedy(model, prompt: torch.Tensor, new: int) -> list[int]:
    out = model.generate(
        prompt[None],
        attention_mask=torch.ones_like(prompt)[None],
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", ["mistral", "mamba", "mamba2"])
@pytest.mark.parametrize("policy", ["defer", "propagate"])
def test_a_threshold_of_one_is_plain_greedy_decoding(family: str, policy: str):
    adapter = backbone(family, double=False)
    engine = Engine(adapter, random_exits(adapter, (1, 3)), threshold=1.0, policy=policy)
    done = engine.decode(text(9), 24)
    assert done.tokens == plain_greedy(adapter.model, text(9), 24)
    assert done.exit_layers == [LAYERS - 1] * 24
    speed = done.tally.speedups(adapter.costs(), adapter.width)
    assert {speed[k] for k in speed if k.startswith("speedup")} == {1.0}


@pytest.mark.parametrize("depth", [2, 3, 8])
def test_every_block_runs_once_at_any_depth(depth: int):
    """A model of another depth than expected must not run its last block twice."""
    model = tiny_model("mistral", num_hidden_layers=depth)
    adapter = adapt(model)
    calls = [0] * depth
    for index, block in enumerate(model.model.layers):
        block.mlp.register_forward_hook(
            lambda *_, index=index: calls.__setitem__(index, calls[index] + 1)
        )
    engine = Engine(adapter, random_exits(adapter, (0,)), threshold=1.0)
    engine.decode(text(5), 7)
    assert calls == [8] * depth  # one prefill, seven steps


@pytest.mark.parametrize("family", ["mistral", "mamba", "mamba2"])
@pytest.mark.parametrize("policy", ["defer", "propagate", "skip", "copy_token"])
def test_leaving_always_at_e_is_the_model_cut_to_e_plus_one_blocks(family: str, policy: str):
    adapter = backbone(family, double=False)
    cut = copy.deepcopy(adapter.model)
    stack = cut.model if hasattr(cut, "model") else cut.backbone
    stack.layers = stack.layers[:3]
    cut.config.num_hidden_layers = 3
    engine = Engine(
        adapter,
        random_exits(adapter, (2,)),
        criterion="fixed",
        threshold=0.5,
        policy=policy,
        max_pending=1000,
    )
    done = engine.decode(text(7, seed=3), 20)
    assert done.exit_layers == [2] * 20
    assert done.tokens == plain_greedy(cut, text(7, seed=3), 20)
    assert done.tally.latency_blocks == 60


@settings(max_examples=15, deadline=None)
@given(
    family=st.sampled_from(["mistral", "mamba2", "mamba"]),
    at=st.sets(st.integers(0, LAYERS - 2), min_size=1, max_size=4),
    threshold=st.floats(0.05, 0.95),
    max_pending=st.integers(1, 12),
    emission=st.sampled_from(["lens", "affine", "last_block"]),
    prompt=st.integers(1, 9),
    seed=st.integers(0, 999),
)
def test_deferred_state_is_the_full_models_for_any_pattern(
    family, at, threshold, max_pending, emission, prompt, seed
):
    adapter = backbone(family)
    exits = random_exits(adapter, tuple(sorted(at)), emission, seed)
    engine = Engine(adapter, exits, threshold=threshold, policy="defer", max_pending=max_pending)
    ids, forced = text(prompt, seed), text(26, seed + 1).tolist()
    states = []
    done = engine.decode(ids, 27, forced=forced, on_state=states.append)
    whole = torch.cat([ids, torch.tensor(forced)])[None]
    reference = adapter.new_cache(1, whole.shape[1])
    with torch.no_grad():
        adapter.run(adapter.embed(whole), 0, LAYERS, reference, 0)
    for j in range(LAYERS):
        for name, value in reference.entries(j).items():
            assert float((states[0].entries(j)[name] - value).abs().max()) <= 1e-10
    full = adapter.full(whole)[0, prompt - 1 :].argmax(-1).tolist()
    deep = [i for i, e in enumerate(done.exit_layers) if e == LAYERS - 1]
    assert [done.tokens[i] for i in deep] == [full[i] for i in deep]


def test_the_longest_queue_is_respected_and_all_work_is_counted():
    adapter = backbone("mistral")
    engine = Engine(
        adapter, random_exits(adapter, (1,)), criterion="fixed", threshold=0.0, max_pending=3
    )
    done = engine.decode(text(4), 13)
    assert done.exit_layers == [1, 1, 1, 5] * 3 + [1]
    assert done.pending == 1
    assert done.tally.blocks == 13 * LAYERS  # nothing is saved by deferring, and that is said
    assert done.tally.context == done.tally.full_context * LAYERS


@pytest.mark.parametrize("family", ["mistral", "mamba2"])
def test_approximate_policies_are_not_exact_and_blocks_below_the_exit_are(family: str):
    """A guard against mislabelled policies, and against advancing block e twice."""
    adapter = backbone(family)
    forced = text(15, 4).tolist()
    whole = torch.cat([text(5), torch.tensor(forced)])[None]
    reference = adapter.new_cache(1, 20)
    with torch.no_grad():
        adapter.run(adapter.embed(whole), 0, LAYERS, reference, 0)
    for policy in ("propagate", "copy_token", "skip"):
        engine = Engine(
            adapter, random_exits(adapter, (2,)), criterion="fixed", threshold=0.0, policy=policy
        )
        states = []
        engine.decode(text(5), 16, forced=forced, on_state=states.append)
        for j in range(3):
            for name, value in reference.entries(j).items():
                assert float((states[0].entries(j)[name] - value).abs().max()) <= 1e-10
        last = states[0].entries(5)
        for name, value in reference.entries(5).items():
            differs = last[name].shape != value.shape or not torch.allclose(last[name], value)
            assert differs


def test_a_model_whose_upper_blocks_do_nothing():
    """Zero tail: exits at e agree with the full model and propagating equals deferring."""
    model = tiny_model("mistral", num_hidden_layers=LAYERS).double()
    with torch.no_grad():
        for block in model.model.layers[3:]:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    adapter = adapt(model)
    forced = text(12, 8).tolist()
    states, tokens = {}, {}
    for policy in ("propagate", "defer"):
        engine = Engine(
            adapter, random_exits(adapter, (2,)), criterion="fixed", threshold=0.0, policy=policy
        )
        done = engine.decode(
            text(6), 13, forced=forced, on_state=lambda s, policy=policy: states.update({policy: s})
        )
        tokens[policy] = done.tokens
    whole = torch.cat([text(6), torch.tensor(forced)])[None]
    full = adapter.full(whole)[0, 5:].argmax(-1).tolist()
    assert tokens["propagate"] == tokens["defer"] == full
    for j in range(LAYERS):
        for name, value in states["defer"].entries(j).items():
            assert torch.allclose(states["propagate"].entries(j)[name], value, atol=1e-12)


@pytest.mark.parametrize("family", ["mistral", "mamba2"])
def test_the_published_decoding_rule(family: str):
    """emit = last block, state = propagate: run 0..e, fill e+1..L-2, run block L-1 on h_e."""
    adapter = backbone(family)
    exits = random_exits(adapter, (1,), "last_block")
    engine = Engine(adapter, exits, criterion="fixed", threshold=0.0, policy="propagate")
    prompt, new = text(8, 6), 10
    done = engine.decode(prompt, new)
    ids = prompt[None, :-1]
    with torch.no_grad():
        below = adapter.run(adapter.embed(ids), 0, LAYERS - 1)  # prefill: what block L-1 saw
        known = prompt.tolist()
        for _ in range(new):
            whole = torch.tensor(known)[None]
            early = adapter.run(adapter.embed(whole), 0, 2)[:, 7:]
            out = adapter.run(torch.cat([below, early], dim=1), LAYERS - 1, LAYERS)
            known.append(int(adapter.logits(out)[0, -1].argmax()))
    assert done.tokens == known[8:]
    assert done.tally.latency_blocks == new * 3
    assert done.tally.fills == new * (LAYERS - 3)


def test_a_prompt_of_one_token_and_an_early_end():
    adapter = backbone("mistral", double=False)
    engine = Engine(adapter, random_exits(adapter, (1,)), threshold=0.3)
    first = engine.decode(torch.tensor([5]), 6).tokens
    assert len(first) == 6
    stopped = engine.decode(torch.tensor([5]), 6, eos=first[0])
    assert stopped.tokens == first[:1]


def test_criteria_are_the_same_as_on_cached_states():
    """What decoding decides under `defer` is what the simulation says, token by token."""
    from early_exit.data import Documents
    from early_exit.features import collect, measure
    from early_exit.simulate import Evidence

    for family in ("mistral", "mamba2"):
        adapter = backbone(family)
        exits = random_exits(adapter, (1, 3), "affine")
        ids = text(30, 11).tolist()
        documents = Documents(("a",), [ids], [0])
        features = collect(adapter, (1, 3), documents)
        measures = measure(adapter, exits, features)
        for criterion in ("gate", "maxprob", "margin", "entropy", "saturation"):
            evidence = Evidence.of(measures, features, (1, 3), LAYERS, criterion, "affine")
            threshold = float(evidence.scores.mean())
            index = evidence.leave(threshold)
            engine = Engine(
                adapter, exits, criterion=criterion, threshold=threshold, max_pending=1000
            )
            done = engine.decode(torch.tensor(ids[:1]), 29, forced=ids[1:29])
            assert done.exit_layers == [(1, 3, 5)[i] for i in index]
            agree = evidence.correct(index)
            answers = measures["answer"].tolist()
            assert [a == b for a, b in zip(done.tokens, answers, strict=True)] == agree.tolist()
            counted = done.tally.speedups(adapter.costs(), adapter.width)
            simulated = evidence.tally(index, "defer").speedups(adapter.costs(), adapter.width)
            assert counted == pytest.approx(simulated)


def test_what_cannot_be_decoded_is_refused():
    attention, mamba = backbone("mistral"), backbone("mamba2")
    exits = random_exits(attention, (1, 3))
    with pytest.raises(ConfigError, match="copy_layer"):
        Engine(mamba, random_exits(mamba, (1,)), policy="copy_layer")
    with pytest.raises(ConfigError, match="3 thresholds for 2 exits"):
        Engine(attention, exits, threshold=(0.1, 0.2, 0.3))
    with pytest.raises(ConfigError, match="unknown criterion 'gaet'; nearest: gate"):
        Engine(attention, exits, criterion="gaet")
    with pytest.raises(ConfigError, match="simulated sweep"):
        Engine(attention, exits, criterion="oracle")
    with pytest.raises(ConfigError, match="from 0 to 4 .the model has 6 blocks.; wrong: .5."):
        Engine(attention, random_exits(attention, (1, 5)))
    with pytest.raises(DataError, match="prompt is empty"):
        Engine(attention, exits).decode(torch.tensor([], dtype=torch.long), 4)
    with pytest.raises(ConfigError, match="the model has 512"):
        Engine(attention, exits).decode(text(500), 20)
    last = random_exits(attention, (1,), "last_block")
    with pytest.raises(ConfigError, match="only has after leaving"):
        Engine(attention, last, criterion="maxprob", threshold=0.0).decode(text(3), 2)
