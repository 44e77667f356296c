"""Checks that every layer's tests share: its forms are one function, its state is what it says."""

import pytest
import torch
from torch.func import functional_call, grad_and_value, stack_module_state, vmap

from mad.registry import parse_layer


class Forms:
    """Layers by their text, numbers from seeds, and the four checks."""

    width, max_length = 16, 24

    def make(self, text: str, width: int = 16, seed: int = 0) -> torch.nn.Module:
        """A layer with its own seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return parse_layer(text).make(width, self.max_length)

    def noise(self, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """Standard normal numbers from their own seed."""
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)

    def same(self, fast, slow, wrt, rtol: float = 1e-9, atol: float = 1e-11) -> None:
        """Values and gradients of two results agree."""
        torch.testing.assert_close(fast, slow, rtol=rtol, atol=atol)
        weight = self.noise(*fast.shape, seed=77, dtype=fast.dtype)
        pairs = [
            torch.autograd.grad((y * weight).sum(), wrt, retain_graph=True) for y in (fast, slow)
        ]
        for a, b in zip(*pairs, strict=True):
            torch.testing.assert_close(a, b, rtol=rtol, atol=max(atol, rtol * float(b.abs().max())))

    def parallel_is_recurrent(self, text: str, lengths: tuple[int, ...] = (1, 2, 13)) -> None:
        """`forward` equals the unrolled `step`, gradients too, in double and single precision."""
        for length in lengths:
            layer = self.make(text).double()
            x = self.noise(2, length, self.width, seed=length).requires_grad_()
            self.same(layer(x), layer.recurrent(x), [x, *layer.parameters()])
        layer, x = self.make(text), self.noise(2, 9, self.width, dtype=torch.float32)
        torch.testing.assert_close(layer(x), layer.recurrent(x), rtol=1e-4, atol=1e-5)

    def state_is_as_stated(self, text: str, steps: int = 7) -> None:
        """Floats carried equal `state_floats`; a step leaves the state it was given alone."""
        layer = self.make(text)
        state = layer.initial_state(3)
        for t in range(1, steps + 1):
            kept = {name: part.clone() for name, part in state.items()}
            x = self.noise(3, self.width, seed=t, dtype=torch.float32)
            _, new = layer.step(x, state)
            assert all(torch.equal(state[name], kept[name]) for name in kept)
            assert all(len(part) == 3 for part in new.values()), "the batch stands in front"
            state = new
            floats = sum(part.numel() for part in state.values() if part.is_floating_point())
            assert floats == 3 * layer.state_floats(t)
            assert layer.matrix_state_floats(t) >= 0

    def half_precision(self, text: str) -> None:
        """Under bfloat16 autocast, and with bfloat16 weights, both forms stay near float32."""
        layer, x = self.make(text), self.noise(2, 9, self.width, dtype=torch.float32)
        expected = layer(x)
        half = self.make(text).bfloat16()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = [layer(x), layer.recurrent(x)]
        found += [half(x.bfloat16()), half.recurrent(x.bfloat16())]
        for y in found:
            assert y.dtype == torch.bfloat16
            assert (y - expected).norm() <= 0.1 * expected.norm()

    def causal(self, text: str) -> None:
        """No output has a gradient with respect to a later input."""
        layer, x = self.make(text).double(), self.noise(1, 9, self.width).requires_grad_()
        for t in (0, 4, 8):
            (gradient,) = torch.autograd.grad(layer(x)[:, t].square().sum(), x)
            # an FFT spreads rounding over all positions
            assert gradient[:, t + 1 :].abs().sum() <= 1e-12 * gradient.abs().max()
            assert gradient[:, t].any()

    def replicas(self, text: str) -> None:
        """Two stacked replicas under vmap have the values and gradients of their own runs."""
        layers = [self.make(text, seed=seed) for seed in (0, 1)]
        x = self.noise(2, 7, self.width, dtype=torch.float32)
        parameters, buffers = stack_module_state(layers)

        def loss(p, b, x):
            return functional_call(layers[0], (p, b), (x,)).square().mean()

        gradients, values = vmap(grad_and_value(loss), (0, 0, None))(parameters, buffers, x)
        for r, layer in enumerate(layers):
            own = layer(x).square().mean()
            torch.testing.assert_close(values[r], own, rtol=1e-5, atol=1e-6)
            names = dict(layer.named_parameters())
            for name, g in zip(names, torch.autograd.grad(own, list(names.values())), strict=True):
                torch.testing.assert_close(gradients[name][r], g, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="session")
def forms() -> Forms:
    """The shared checks."""
    return Forms()
