"""Nothing is left behind on the CPU when matrices and layers are on another device."""

import pytest
import torch

from lplr_q.activation_aware.decompose import decompose, prepare_hessian
from lplr_q.activation_aware.quantized_layer import LPLRQuantizedLinear
from tests.lplr_q.other_device import DEVICE, Elsewhere, Far


def test_the_device_refuses_to_mix():
    here = torch.randn(3, 4)
    with Elsewhere() as put:
        far = put(here)
        assert (far @ far.T).device == DEVICE
        assert torch.zeros(2, device=far.device).device == DEVICE
        assert torch.ones(4).to(far).add(far).device == DEVICE
        assert far.cpu().device.type == "cpu"
        assert float(far.square().sum()) == pytest.approx(float(here.square().sum()))
        assert far[torch.tensor([0, 2])].device == DEVICE
        for mixed in (lambda: far + here, lambda: here @ far.T, lambda: torch.cat([far, here])):
            with pytest.raises(RuntimeError, match="two devices"):
                mixed()


def decomposed(put, shape, **options):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(*shape, generator=generator)
    x = torch.randn(200, shape[1], generator=generator)
    hessian = x.T @ x
    prepared = prepare_hessian(put(hessian), shape[1], generator=generator)
    return decompose(put(weight), prepared, generator=generator, **options)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((24, 40), {"rank": 4, "rounds": 2}),
        ((20, 33), {"rank": 3, "q_bits": 3, "factor_bits": (16, 3)}),
        ((24, 40), {"rank": 3, "factor_codebook": "e8p", "init": "odlri", "q_hessian": "plain"}),
        ((24, 40), {"rank": 3, "init": "srr", "scale_search": True}),
        ((24, 40), {"rank": 3, "rescale": True, "codebook": "lloyd-max"}),
        ((24, 40), {"rank": 3, "activation_aware_lr": False, "feedback": False}),
        ((96, 104), {"rank": 2, "q_bits": 0, "randomised_svd": True}),
        pytest.param(
            (16, 24), {"rank": 0, "codebook": "tcq-8", "sweeps": 0}, marks=pytest.mark.slow
        ),
    ],
    ids=str,
)
def test_a_decomposition_stays_where_its_matrix_is(shape, options):
    options = {"rounds": 1, "inner_iterations": 1, **options}
    here = decomposed(lambda t: t, shape, **options)
    with Elsewhere() as put:
        there = decomposed(put, shape, **options)
        assert all(isinstance(codes, Far) for codes in there.q_codes)
        assert all(isinstance(f.codes, Far) for f in (there.left, there.right) if f is not None)
        layer = LPLRQuantizedLinear.from_decomposition(there)
        matrix = layer.dequantize()
    assert there.error == pytest.approx(here.error, rel=1e-5)
    assert matrix.device.type == "cpu"  # a layer begins on the CPU
    torch.testing.assert_close(matrix, here.dequantize(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["dequant", "kernel", "cached"])
@pytest.mark.parametrize(
    "form",
    [
        {"rank": 3},
        {"rank": 3, "factor_bits": (16, 3), "rescaled": True},
        {"codebook": "lloyd-max", "q_bits": 3, "rank": 2, "factor_codebook": "e8p", "ft_rank": 1},
        {"codebook": "tcq-8", "rotated": False, "bias": True},
    ],
    ids=str,
)
def test_a_layer_computes_where_it_is(form, mode):
    generator = torch.Generator().manual_seed(0)
    layer = LPLRQuantizedLinear(44, 24, **form)
    for name, buffer in layer.named_buffers():
        if name.endswith(("scale", "scales")):
            buffer.copy_(torch.ones(1, dtype=torch.float32 if buffer.itemsize == 4 else
                                    torch.bfloat16).view(buffer.dtype))  # fmt: skip
        elif buffer.dtype == torch.uint8 or name == "rescale":
            low, high = (0x3F80, 0x3F90) if name == "rescale" else (0, 256)
            buffer.random_(low, high, generator=generator)
        elif name in ("l_codes", "r_codes"):
            values = torch.randn(buffer.shape, generator=generator).bfloat16()
            buffer.copy_(values.view(torch.int16))
        else:
            buffer.random_(-(2**15), 2**15, generator=generator)
    x = torch.randn(2, 44, generator=generator)
    expected = layer(x).detach()
    with Elsewhere() as put, torch.no_grad():
        layer.to(DEVICE).set_mode(mode)
        assert all(isinstance(b, Far) for b in layer.buffers())
        found = layer(put(x))
        assert isinstance(found, Far)
    torch.testing.assert_close(found.inner, expected, rtol=1e-4, atol=1e-3)
