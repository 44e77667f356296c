"""Selective scans: closed forms, fast form = reference, and the hook into transformers."""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench import mamba
from workbench.errors import ConfigError
from workbench.mamba import chunked_scan, fast_mamba, linear_scan, selective_scan

FORMS = ("unbind", "fused")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def noise(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed + 31 * sum(shape))
    return torch.randn(*shape, generator=generator, dtype=dtype)


def scan_inputs(batch, time, width, state, dtype=torch.float32, seed=0):
    return [
        noise(batch, time, width, seed=seed, dtype=dtype),
        noise(batch, time, width, seed=seed + 1, dtype=dtype).exp() * 0.3,
        -noise(width, state, seed=seed + 2, dtype=dtype).exp(),
        noise(batch, time, state, seed=seed + 3, dtype=dtype),
        noise(batch, time, state, seed=seed + 4, dtype=dtype),
        noise(batch, width, state, seed=seed + 5, dtype=dtype),
    ]


def chunk_inputs(batch, time, heads, channels, groups, state, dtype=torch.float32, seed=0):
    return [
        noise(batch, time, heads, channels, seed=seed, dtype=dtype),
        noise(batch, time, heads, seed=seed + 1, dtype=dtype).exp() * 0.3,
        -noise(heads, seed=seed + 2, dtype=dtype).exp(),
        noise(batch, time, groups, state, seed=seed + 3, dtype=dtype),
        noise(batch, time, groups, state, seed=seed + 4, dtype=dtype),
        noise(batch, heads, channels, state, seed=seed + 5, dtype=dtype),
    ]


def outputs_and_gradients(function, inputs, **options):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = function(*leaves, **options)
    weighted = sum((noise(*y.shape, seed=9, dtype=y.dtype) * y).sum() for y in outputs)
    return [y.detach() for y in outputs] + list(torch.autograd.grad(weighted, leaves))


def worst_relative_error(found, expected):
    return max(
        float((a - b).abs().max() / b.abs().max().clamp_min(1e-6))
        for a, b in zip(found, expected, strict=True)
    )


# ── closed forms ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kernel", ["reference", "unbind"])
def test_decay_one_is_a_running_sum_and_decay_zero_forgets(kernel):
    x = noise(2, 9, 3, 4)
    start = noise(2, 3, 4)
    summed = linear_scan(torch.ones_like(x), x, start, kernel)
    torch.testing.assert_close(summed, start[:, None] + x.cumsum(1))
    assert torch.equal(linear_scan(torch.zeros_like(x), x, start, kernel), x)


@pytest.mark.parametrize("kernel", ["reference", "unbind", "fused"])
def test_constant_decay_of_an_impulse_is_a_power(kernel):
    time, rate = 12, 0.25
    u = torch.zeros(1, time, 1)
    u[0, 0, 0] = 1.0
    ones = torch.ones(1, time, 1)
    y, last = selective_scan(u, ones, torch.tensor([[-rate]]), ones, ones, kernel=kernel)
    expected = torch.exp(-rate * torch.arange(time))
    torch.testing.assert_close(y[0, :, 0], expected)
    torch.testing.assert_close(last[0, 0, 0], expected[-1])


@pytest.mark.parametrize("kernel", ["reference", "chunked"])
def test_chunked_scan_without_decay_is_linear_attention(kernel):
    u, _, _, B, C, _ = chunk_inputs(2, 11, 4, 3, 2, 5)
    y, _ = chunked_scan(u, torch.ones(2, 11, 4), torch.zeros(4), B, C, kernel=kernel, chunk=4)
    scores = torch.einsum("bign,bjgn->bgij", C, B).tril().repeat_interleave(2, dim=1)
    torch.testing.assert_close(y, torch.einsum("bhij,bjhp->bihp", scores, u), rtol=1e-5, atol=1e-5)


# ── fast = reference ─────────────────────────────────────────────────────────────────────────────


@settings(max_examples=12, deadline=None)
@given(
    batch=st.integers(1, 3),
    time=st.integers(1, 40),
    width=st.integers(1, 5),
    state=st.integers(1, 6),
    block=st.integers(1, 200),
    kernel=st.sampled_from(FORMS),
)
def test_selective_scan_equals_the_reference(batch, time, width, state, block, kernel):
    inputs = scan_inputs(batch, time, width, state, dtype=torch.float64)
    kept, mamba.BLOCK_NUMBERS = mamba.BLOCK_NUMBERS, block
    try:
        found = outputs_and_gradients(selective_scan, inputs, kernel=kernel)
    finally:
        mamba.BLOCK_NUMBERS = kept
    expected = outputs_and_gradients(selective_scan, inputs, kernel="reference")
    assert worst_relative_error(found, expected) < 1e-10


@settings(max_examples=12, deadline=None)
@given(
    batch=st.integers(1, 2),
    time=st.integers(1, 40),
    groups=st.integers(1, 2),
    per_group=st.integers(1, 3),
    chunk=st.integers(1, 50),
)
def test_chunked_scan_equals_the_reference(batch, time, groups, per_group, chunk):
    shape = (batch, time, groups * per_group, 3, groups, 4)
    # single precision: the rounding of a chunk's running sum of Δ·A shows in gradients that cancel
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        inputs = chunk_inputs(*shape, dtype=dtype)
        found = outputs_and_gradients(chunked_scan, inputs, chunk=chunk)
        expected = outputs_and_gradients(chunked_scan, inputs, kernel="reference")
        assert worst_relative_error(found, expected) < tolerance


@pytest.mark.parametrize("kernel", FORMS)
def test_gradients_in_single_precision_are_the_reference_s_to_1e_5(kernel):
    inputs = scan_inputs(2, 50, 6, 4)
    found = outputs_and_gradients(selective_scan, inputs, kernel=kernel)
    expected = outputs_and_gradients(selective_scan, inputs, kernel="reference")
    assert worst_relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("kernel", FORMS)
def test_gradients_of_selective_scan_against_finite_differences(kernel):
    inputs = [x.requires_grad_() for x in scan_inputs(2, 7, 3, 2, dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda *x: selective_scan(*x, kernel=kernel), inputs)


def test_gradients_of_chunked_scan_against_finite_differences():
    inputs = [x.requires_grad_() for x in chunk_inputs(1, 7, 2, 2, 1, 3, dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda *x: chunked_scan(*x, chunk=3), inputs)


@pytest.mark.parametrize("kernel", FORMS)
def test_a_scan_cut_in_two_is_the_whole_scan(kernel):
    u, delta, A, B, C, start = scan_inputs(2, 13, 4, 3)
    whole, last = selective_scan(u, delta, A, B, C, start, kernel)
    head, middle = selective_scan(u[:, :5], delta[:, :5], A, B[:, :5], C[:, :5], start, kernel)
    tail, end = selective_scan(u[:, 5:], delta[:, 5:], A, B[:, 5:], C[:, 5:], middle, kernel)
    torch.testing.assert_close(torch.cat([head, tail], dim=1), whole)
    torch.testing.assert_close(end, last)


@pytest.mark.parametrize("stacked", [range(6), (0, 1, 3, 4), (2,)])
@pytest.mark.parametrize("inner", [True, False])
def test_a_stack_of_scans_under_vmap_is_the_scans_one_by_one(monkeypatch, stacked, inner):
    """Gradients inside vmap and around it, with any part of the inputs shared by the stack."""
    monkeypatch.setattr(mamba, "BLOCK_NUMBERS", 96)
    shared = scan_inputs(2, 11, 4, 3, dtype=torch.float64)
    others = [scan_inputs(2, 11, 4, 3, dtype=torch.float64, seed=20 * r) for r in (1, 2, 3)]
    models = [[o[i] if i in stacked else shared[i] for i in range(6)] for o in others]
    stack = [torch.stack([m[i] for m in models]) if i in stacked else shared[i] for i in range(6)]
    weights = noise(2, 11, 4, dtype=torch.float64), noise(2, 4, 3, dtype=torch.float64)
    dims = tuple(0 if i in stacked else None for i in range(6))

    def loss(*inputs):
        return sum((w * o).sum() for w, o in zip(weights, selective_scan(*inputs), strict=True))

    alone = [torch.func.grad(loss, argnums=tuple(range(6)))(*m) for m in models]
    if inner:
        found = torch.func.vmap(torch.func.grad(loss, argnums=tuple(range(6))), dims)(*stack)
        expected = [torch.stack(parts) for parts in zip(*alone, strict=True)]
    else:
        total = lambda *inputs: torch.func.vmap(loss, dims)(*inputs).sum()  # noqa: E731
        found = torch.func.grad(total, argnums=tuple(range(6)))(*stack)
        parts = list(zip(*alone, strict=True))
        expected = [torch.stack(p) if i in stacked else sum(p) for i, p in enumerate(parts)]
    assert worst_relative_error(found, expected) < 1e-12


def test_the_fused_form_refuses_a_second_derivative():
    inputs = [x.requires_grad_() for x in scan_inputs(1, 3, 2, 2)]
    (first,) = torch.autograd.grad(selective_scan(*inputs)[0].sum(), inputs[:1], create_graph=True)
    with pytest.raises(ConfigError, match="no second derivative"):
        torch.autograd.grad(first.sum(), inputs[1:2])


@pytest.mark.parametrize("rate", [1e4, 80.0, 0.0])
def test_channels_that_forget_at_once_do_not_underflow_into_nan(rate):
    inputs = scan_inputs(1, 70, 2, 2)
    inputs[2] = torch.full((2, 2), -rate)
    found = outputs_and_gradients(selective_scan, inputs, kernel="fused")
    expected = outputs_and_gradients(selective_scan, inputs, kernel="reference")
    assert worst_relative_error(found, expected) < 1e-5
    inputs = chunk_inputs(1, 70, 2, 2, 1, 2)
    inputs[2] = torch.full((2,), -rate)
    found = outputs_and_gradients(chunked_scan, inputs)
    expected = outputs_and_gradients(chunked_scan, inputs, kernel="reference")
    # the running sum of Δ·A over a chunk reaches ~80 · 10, so its rounding is 1e-4 of a decay
    assert worst_relative_error(found, expected) < (1e-5 if rate == 0 else 1e-3)


# ── inside transformers ──────────────────────────────────────────────────────────────────────────


def tiny(family, **changes):
    from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

    sizes = {"vocab_size": 37, "hidden_size": 16, "num_hidden_layers": 3, "pad_token_id": 0}
    torch.manual_seed(5)
    if family == "mamba":
        model = MambaForCausalLM(MambaConfig(state_size=4, **(sizes | changes)))
    else:
        own = {"state_size": 8, "head_dim": 8, "num_heads": 4, "n_groups": 2, "chunk_size": 8}
        model = Mamba2ForCausalLM(Mamba2Config(**(sizes | own | changes)))
    with torch.no_grad():  # default steps of .001–.1 hardly use the state; here it must matter
        for name, parameter in model.named_parameters():
            if name.endswith(("dt_proj.bias", "dt_bias")):
                parameter.fill_(0.5)
            if name.endswith(("x_proj.weight", "in_proj.weight")):
                parameter.mul_(4.0)
    return model.eval()


def token_ids(batch=2, time=19):
    generator = torch.Generator().manual_seed(11)
    return torch.randint(3, 37, (batch, time), generator=generator)


def logits_of(model, ids, **options):
    with torch.no_grad():
        return model(input_ids=ids, **options).logits


def continued(model, ids, cuts):
    """Logits when `ids` are fed in pieces that end at `cuts`."""
    cache, start, pieces = None, 0, []
    with torch.no_grad():
        for end in (*cuts, ids.shape[1]):
            out = model(input_ids=ids[:, start:end], cache_params=cache, use_cache=True)
            cache, start = out.cache_params, end
            pieces.append(out.logits)
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_hooked_model_has_the_outputs_and_gradients_of_the_stock_model(family):
    model, ids = tiny(family).train(), token_ids()

    def run():
        model.zero_grad()
        out = model(input_ids=ids, labels=ids, use_cache=False)
        out.loss.backward()
        gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        return out.loss.detach(), out.logits.detach(), gradient

    loss, logits, gradient = run()
    with fast_mamba() as hook:
        assert hook.skipped == {}
        our_loss, our_logits, our_gradient = run()
    torch.testing.assert_close(our_loss, loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(our_logits, logits, rtol=1e-5, atol=1e-5)
    assert (our_gradient - gradient).norm() < 1e-5 * gradient.norm()


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
@pytest.mark.parametrize("cuts", [tuple(range(1, 19)), (1, 2, 7, 8), (10,)])
def test_feeding_in_pieces_is_the_full_forward(family, cuts):
    model, ids = tiny(family), token_ids()
    with fast_mamba():
        torch.testing.assert_close(
            continued(model, ids, cuts), logits_of(model, ids), rtol=1e-5, atol=1e-5
        )


def test_stock_mamba_drops_the_state_of_a_multi_token_continuation():
    """The upstream behaviour on which the test above fails without the hook."""
    model, ids = tiny("mamba"), token_ids()
    full = logits_of(model, ids)
    error = (continued(model, ids, (10,)) - full).abs().amax(dim=(0, 2))
    assert error[:10].max() < 1e-5
    assert error[10:].max() > 1e-2, "upstream is repaired: the continuation hook can go"


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_greedy_generation_is_the_same_with_and_without_the_hook(family):
    model, ids = tiny(family), token_ids(batch=1, time=6)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    stock = model.generate(ids, **options)
    with fast_mamba():
        assert torch.equal(model.generate(ids, **options), stock)


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_left_padding_changes_nothing(family):
    model, ids = tiny(family), token_ids(batch=1, time=9)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(13) >= 4).long()[None]
    with fast_mamba():
        torch.testing.assert_close(
            logits_of(model, padded, attention_mask=mask)[:, 4:],
            logits_of(model, ids),
            rtol=1e-5,
            atol=1e-5,
        )


def stock_functions():
    found = []
    for where, (name, _, mixer) in mamba.UPSTREAM.items():
        module = importlib.import_module(where)
        found += [getattr(module, name), getattr(module, mixer).forward]
    return found


def test_the_hook_nests_and_restores_even_after_an_error():
    before = stock_functions()
    seen = []

    def fail_inside():
        with fast_mamba():
            seen.append(stock_functions())
            with fast_mamba():
                seen.append(stock_functions())
            seen.append(stock_functions())
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    during = seen[0]
    assert seen[1] == during
    assert seen[2] == during, "the inner hook must not undo the outer one"
    assert stock_functions() == before
    assert during[0] is not before[0]
    assert during[2] is not before[2]

    hook = fast_mamba().install()
    hook.install()
    hook.remove()
    hook.remove()
    assert stock_functions() == before


@pytest.mark.parametrize("damage", ["function", "parameter", "call"])
def test_another_upstream_version_is_left_alone_with_a_warning(monkeypatch, damage):
    where, (name, _, mixer) = next(iter(mamba.UPSTREAM.items()))
    module = importlib.import_module(where)
    if damage == "function":
        monkeypatch.delattr(module, name)
    elif damage == "parameter":
        monkeypatch.setattr(module, name, lambda hidden_states, dt, A: None)
    else:
        monkeypatch.setattr(getattr(module, mixer), "forward", lambda self, hidden_states: None)
    kept = getattr(module, name, None)
    hook = fast_mamba()
    with pytest.warns(RuntimeWarning, match="keeps its stock scan"):
        hook.install()
    try:
        assert list(hook.skipped) == [where]
        assert getattr(module, name, None) is kept
        assert logits_of(tiny("mamba2"), token_ids()).isfinite().all()
    finally:
        hook.remove()


def test_continuation_does_not_leak_into_another_sequence():
    model, ids = tiny("mamba"), token_ids()
    with fast_mamba():
        fresh = logits_of(model, ids)
        continued(model, ids, (5, 9))
        assert torch.equal(logits_of(model, ids), fresh)


# ── bad input ────────────────────────────────────────────────────────────────────────────────────


def test_bad_shapes_are_named():
    u, delta, A, B, C, _ = scan_inputs(1, 4, 2, 3)
    with pytest.raises(ConfigError, match=r"\(1, 4, 2\)"):
        selective_scan(u, delta[:, :3], A, B, C)
    with pytest.raises(ConfigError, match="time ≥ 1"):
        selective_scan(u[:, :0], delta[:, :0], A, B[:, :0], C[:, :0])
    with pytest.raises(ConfigError, match="one shape"):
        linear_scan(noise(1, 2, 3, 4), noise(1, 2, 3, 5))
    u, delta, A, B, C, _ = chunk_inputs(1, 4, 3, 2, 1, 2)
    with pytest.raises(ConfigError, match="multiple of groups"):
        chunked_scan(u, delta, A, B.repeat(1, 1, 2, 1), C.repeat(1, 1, 2, 1))
