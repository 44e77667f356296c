"""Compiled products with codes against the plain decoding."""

import importlib.util
import os

import pytest
import torch

from lplr_q import native
from lplr_q.activation_aware.layer_state import code_layout, decode_rows
from lplr_q.codebooks.base import make_codebook
from lplr_q.kernels import cpu, dispatch, triton_e8p
from lplr_q.kernels.product import coded_factor, product, product_back, theta, tile_of

needs_compiler = pytest.mark.skipif(
    native.library(cpu.SOURCE) is None, reason=f"no compiled kernels: {native.load(cpu.SOURCE)[1]}"
)
BOOKS = [
    ("e8p", 2),
    ("e8p", 3),
    ("e8p", 4),
    ("tcq", 2),
    ("tcq", 3),
    ("tcq-12", 1),
    ("tcq-12", 4),
    ("tcq-8-16x16", 2),
]
SCALE = torch.tensor([0.7]).view(torch.int32)


def random_codes(name, bits, m, n, seed=0):
    """Every bit pattern is a valid code."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for key, (shape, kind) in code_layout("q", m, n, make_codebook(name, bits)).items():
        low, high = (-(2**15), 2**15) if kind == torch.int16 else (0, 256)
        found[key] = torch.randint(low, high, shape, generator=generator).to(kind)
    tail = found.pop("q_tail", None)
    return list(found.values()), tail


@needs_compiler
@pytest.mark.parametrize("shape", [(130, 40), (64, 16), (7, 48), (1, 16)])
@pytest.mark.parametrize(("name", "bits"), BOOKS)
def test_rows_and_products_are_those_of_the_plain_form(name, bits, shape):
    m, n = shape
    n = n // make_codebook(name, bits).dim * make_codebook(name, bits).dim
    codes, tail = random_codes(name, bits, m, n)
    plain = decode_rows(codes, tail, name, bits, n, 0, m)
    assert cpu.usable(codes, make_codebook(name, bits))
    assert torch.equal(dispatch.rows(codes, tail, name, bits, (m, n), 0, m), plain)
    if m > 64:
        assert torch.equal(dispatch.rows(codes, tail, name, bits, (m, n), 64, m), plain[64:])
    x = torch.randn(3, n)
    found = dispatch.gemv(x, codes, tail, SCALE, name, bits, m)
    torch.testing.assert_close(found, x @ (0.7 * plain).T, rtol=1e-4, atol=1e-4)
    half = dispatch.gemv(x.bfloat16(), codes, tail, SCALE, name, bits, m)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), found, rtol=5e-2, atol=5e-2)


@needs_compiler
@pytest.mark.parametrize(("name", "bits"), [("e8p", 2), ("e8p", 4), ("tcq", 2)])
def test_columns_beyond_the_last_block_are_part_of_the_product(name, bits):
    codes, tail = random_codes(name, bits, 9, 43)
    assert tail is not None
    plain = decode_rows(codes, tail, name, bits, 43, 0, 9)
    x = torch.randn(2, 43)
    found = dispatch.gemv(x, codes, tail, SCALE, name, bits, 9)
    torch.testing.assert_close(found, x @ (0.7 * plain).T, rtol=1e-4, atol=1e-4)


@needs_compiler
def test_threads_share_the_rows(monkeypatch):
    codes, _ = random_codes("tcq", 2, 200, 32)
    x = torch.randn(2, 32)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    alone = cpu.multiply(x, codes, make_codebook("tcq", 2), 1.0, 8, 200)
    rows = cpu.decode(codes, make_codebook("tcq", 2), 1.0, 8, (200, 64, 200))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(cpu.multiply(x, codes, make_codebook("tcq", 2), 1.0, 8, 200), alone)
    assert torch.equal(cpu.decode(codes, make_codebook("tcq", 2), 1.0, 8, (200, 64, 200)), rows)


def test_without_kernels_torch_does_the_work(monkeypatch):
    codes, tail = random_codes("e8p", 2, 20, 16)
    monkeypatch.setenv("FIVEFOLD_NATIVE", "0")
    x = torch.randn(2, 16)
    assert dispatch.gemv(x, codes, tail, SCALE, "e8p", 2, 20) is None
    plain = decode_rows(codes, tail, "e8p", 2, 16, 0, 20)
    assert torch.equal(dispatch.rows(codes, tail, "e8p", 2, (20, 16), 0, 20), plain)
    found = product(x, codes, tail, SCALE, "e8p", 2, 20, 0, True, 0)
    torch.testing.assert_close(found, x @ (0.7 * plain).T, rtol=1e-5, atol=1e-5)


def test_many_activations_are_not_sent_to_the_kernel():
    codes, tail = random_codes("e8p", 2, 20, 16)
    many = torch.randn(dispatch.MAX_BATCH + 1, 16)
    assert dispatch.gemv(many, codes, tail, SCALE, "e8p", 2, 20) is None


@pytest.mark.parametrize("name", ["lloyd-max", "e8p", "tcq"])
def test_tiles_do_not_change_the_product(name):
    codes, tail = random_codes(name, 2, 150, 24)
    x = torch.randn(4, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = product(x, codes, tail, SCALE, name, 2, 150, 1000, False, 0)
    tiled = product(x, codes, tail, SCALE, name, 2, 150, 1, False, 0)
    torch.testing.assert_close(tiled, whole, rtol=1e-12, atol=1e-12)
    back = product_back(whole, codes, tail, SCALE, name, 2, 24, 1, 0)
    plain = 0.7 * decode_rows(codes, tail, name, 2, 24, 0, 150).double()
    torch.testing.assert_close(back, whole @ plain, rtol=1e-6, atol=1e-5)


def test_tiles_hold_whole_trellises():
    assert tile_of(1, 8, torch.device("cpu")) == 64
    assert tile_of(65, 8, torch.device("cpu")) == 128
    assert tile_of(0, 4096, torch.device("cpu")) * 4096 <= 1 << 18
    assert tile_of(0, 1 << 22, torch.device("cpu")) == 64


def test_the_operators_keep_their_contract():
    """Shapes without data, no hidden aliasing, gradients registered: torch's own check."""
    codes, tail = random_codes("e8p", 2, 12, 19)
    x = torch.randn(3, 19, requires_grad=True)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        product.operator, (x, codes, tail, SCALE, "e8p", 2, 12, 0, False, 0), test_utils=checks
    )
    several = torch.ones(12, 3, dtype=torch.bfloat16).view(torch.int16)
    torch.library.opcheck(
        product.operator, (x, codes, tail, several, "e8p", 2, 12, 0, False, 8), test_utils=checks
    )
    grad = torch.randn(3, 12)
    torch.library.opcheck(
        product_back, (grad, codes, tail, SCALE, "e8p", 2, 19, 0, 0), test_utils=checks
    )
    factor, _ = random_codes("lloyd-max", 4, 2, 10)
    scales = torch.ones(2, dtype=torch.bfloat16).view(torch.int16)
    torch.library.opcheck(
        coded_factor.operator, (factor, None, scales, "lloyd-max", 4, 2, 10), test_utils=checks
    )
    for width in (1, 12, 13, 16):
        rows = torch.randn(2, 3, width, requires_grad=True)
        for rotation in ("had", "kron"):
            torch.library.opcheck(theta.operator, (rows, False, rotation), test_utils=checks)
        assert torch.autograd.gradcheck(
            lambda t: theta(t, True, "had"), rows.detach().double().requires_grad_()
        )


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or not (INTERPRETED or torch.cuda.is_available()),
    reason="Triton with a CUDA device (or TRITON_INTERPRET=1) is not there",
)


@needs_triton
@pytest.mark.gpu
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("shape", [(40, 48), (16, 128), (3, 8)])
def test_the_cuda_kernel_agrees(bits, shape):
    m, n = shape
    device = "cpu" if INTERPRETED else "cuda"
    codes, _ = random_codes("e8p", bits, m, n)
    book = make_codebook("e8p", bits)
    plain = decode_rows(codes, None, "e8p", bits, n, 0, m)
    scale = dispatch._blocks("e8p", bits, n).scale
    x = torch.randn(2, n)
    found = triton_e8p.multiply(
        x.to(device), [c.to(device) for c in codes], book, scale, n // 8, m
    ).cpu()
    torch.testing.assert_close(found, x @ plain.T, rtol=1e-4, atol=1e-4)


def test_the_log_says_what_multiplies(monkeypatch):
    assert "E8P" in dispatch.status(torch.device("cuda"))
    assert "no kernel for meta" in dispatch.status(torch.device("meta"))
    monkeypatch.setenv("FIVEFOLD_NATIVE", "0")
    assert "torch decodes" in dispatch.status(torch.device("cpu"))
