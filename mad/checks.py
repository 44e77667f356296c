"""What every layer must hold to, as checks that a layer passes, fails or has nothing to do with.

    outcomes = check_layer("my_package.mixer:Mine")
    print([one for one in outcomes if one.status == "failed"])

A layer is tried at the smallest width of 32, 64 and 128 that its options allow, in random states
drawn from fixed seeds. Checks of the step form and of the accounting need the methods of
`mad.layers.layer.Layer`; a plain module skips them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from mad.model import LanguageModel
from mad.registry import parse_layer
from workbench.errors import ConfigError, unknown_name

WIDTHS = (32, 64, 128)
"""Widths that are tried in this order."""
LENGTH = 20
"""Tokens of the longest input."""
MAX_LENGTH = 24
"""Length that filters are made for."""

Values = Float[Tensor, "batch time width"]


class Failed(Exception):
    """The layer does not hold to what was checked."""


class Skipped(Exception):
    """The layer does not offer what was to be checked."""


@dataclass(frozen=True)
class Outcome:
    """What one check found for one layer."""

    layer: str
    """The layer as it was written."""
    check: str
    """Name of the check."""
    status: Literal["ok", "failed", "skipped"]
    """Did it hold?"""
    detail: str
    """The largest deviation, or what is wrong, or why nothing was checked."""


class Subject:
    """A layer under test: made anew from its text with one seed, with inputs of its width."""

    def __init__(self, text: str, width: int | None = None) -> None:
        self.text = text
        self.choice = parse_layer(text)
        self.width = width or self.smallest_width()

    def smallest_width(self) -> int:
        """The first of `WIDTHS` at which the layer can be made."""
        for width in WIDTHS[:-1]:
            try:
                self.build(width)
            except ConfigError:
                continue
            return width
        return WIDTHS[-1]

    def build(self, width: int, seed: int = 0) -> nn.Module:
        """A fresh layer of that width."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.choice.make(width, MAX_LENGTH, n_layers=2)

    def layer(self, seed: int = 0) -> nn.Module:
        """A fresh layer, as initialised."""
        return self.build(self.width, seed)

    def stirred(self) -> nn.Module:
        """A fresh layer with noise on all parameters: no zero of the initialisation stays one."""
        layer, generator = self.layer(), torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        return layer

    def inputs(self, batch: int = 3, length: int = LENGTH, seed: int = 0) -> Values:
        """Standard normal inputs."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(batch, length, self.width, generator=generator)

    @cached_property
    def output(self) -> Values:
        """The layer's output for `inputs()`."""
        with torch.no_grad():
            return self.stirred()(self.inputs())


def close(found: Tensor, expected: Tensor, rtol: float, atol: float, what: str) -> float:
    """The largest deviation; `Failed` where it exceeds atol + rtol · the largest expected value."""
    if found.shape != expected.shape:
        raise Failed(f"{what}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}")
    deviation = (found.double() - expected.double()).abs().max().item() if found.numel() else 0.0
    limit = atol + rtol * expected.double().abs().max().item() if found.numel() else 0.0
    if not deviation <= limit:
        raise Failed(f"{what}: deviates by {deviation:.2g}, at most {limit:.2g} is allowed")
    return deviation


# ---------------------------------------------------------------- what is checked


def check_shape(subject: Subject) -> str:
    """The output has the shape and the number format of the input, and finite values."""
    x, y = subject.inputs(), subject.output
    if y.shape != x.shape or y.dtype != x.dtype:
        raise Failed(
            f"{tuple(x.shape)} {x.dtype} in, {tuple(y.shape)} {y.dtype} out; expected the same"
        )
    if not bool(y.isfinite().all()):
        raise Failed("the output is not finite")
    return f"{tuple(y.shape)}"


def check_causality(subject: Subject) -> str:
    """A change at token t changes the output at t or later and nowhere before."""
    layer, x, y = subject.stirred(), subject.inputs(), subject.output
    worst, moved = 0.0, False
    for t in (1, 7, LENGTH - 1):
        changed = x.clone()
        changed[:, t] += 1.0
        with torch.no_grad():
            z = layer(changed)
        worst = max(worst, close(z[:, :t], y[:, :t], 1e-5, 1e-6, f"before a change at token {t}"))
        moved = moved or not torch.allclose(z[:, t:], y[:, t:], rtol=1e-4, atol=1e-5)
    if not moved:
        raise Failed("the output does not depend on the input")
    return f"largest change before t: {worst:.1g}"


def check_independence(subject: Subject) -> str:
    """A sequence's output does not depend on the others of its batch."""
    with torch.no_grad():
        alone = subject.stirred()(subject.inputs()[1:2])
    return f"{close(alone, subject.output[1:2], 1e-4, 1e-6, 'a sequence alone'):.1g}"


def check_determinism(subject: Subject) -> str:
    """The same layer gives the same output twice, bit for bit."""
    with torch.no_grad():
        again = subject.stirred()(subject.inputs())
    if not torch.equal(again, subject.output):
        raise Failed("two passes over the same input differ")
    return "bit-equal"


def check_lengths(subject: Subject) -> str:
    """A prefix, of length one and odd lengths too, has the outputs that it has in the whole."""
    layer, x, worst = subject.stirred(), subject.inputs(), 0.0
    for length in (1, 2, 3, 5, 7, 16, 19):
        with torch.no_grad():
            part = layer(x[:, :length])
        what = f"length {length}"
        worst = max(worst, close(part, subject.output[:, :length], 1e-4, 1e-5, what))
    return f"{worst:.1g}"


def check_gradient(subject: Subject) -> str:
    """The gradient is finite and reaches the input and every parameter."""
    layer, x = subject.stirred(), subject.inputs().requires_grad_()
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    names, parameters = ["the input"], [x]
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad:
            names, parameters = [*names, name], [*parameters, parameter]
    loss = (layer(x) * weight).sum()
    for name, gradient in zip(
        names, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True
    ):
        if gradient is None or not bool(gradient.any()):
            raise Failed(f"no gradient reaches {name}")
        if not bool(gradient.isfinite().all()):
            raise Failed(f"the gradient of {name} is not finite")
    return f"{len(names)} tensors"


def check_step(subject: Subject) -> str:
    """Token by token equals the parallel form in float64, gradients too; states stay as given."""
    layer = subject.stirred().double()
    if not hasattr(layer, "step"):
        raise Skipped("it has no step form")
    worst = 0.0
    for length in (1, 7, LENGTH):
        x = subject.inputs(2, length).double().requires_grad_()
        fast, state, outputs = layer(x), layer.initial_state(2, dtype=torch.float64), []
        for t in range(length):
            before = {name: value.clone() for name, value in state.items()}
            y, following = layer.step(x[:, t], state)
            for name, value in before.items():
                if not torch.equal(value, state[name]):
                    raise Failed(f"step changed the state it was given ({name})")
            outputs, state = [*outputs, y], following
        slow = torch.stack(outputs, dim=1)
        what = f"step against parallel form at length {length}"
        worst = max(worst, close(fast, slow, 1e-7, 1e-9, what))
        gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in (fast, slow)]
        close(*gradients, 1e-6, 1e-9, f"gradient of {what}")
    return f"{worst:.1g}"


def check_accounting(subject: Subject) -> str:
    """Parameters and floats of state are those counted, at several lengths."""
    layer = subject.layer()
    if not hasattr(layer, "accounting"):
        raise Skipped("it has no accounting")
    for length in (1, 5, LENGTH):
        cost = layer.accounting(length)
        params = sum(p.numel() for p in layer.parameters())
        if cost.params != params:
            raise Failed(f"{cost.params} parameters are stated, {params} are there")
        if not 0 <= cost.params_active <= params:
            raise Failed(f"{cost.params_active} of {params} parameters are stated to be active")
        linear = sum(m.weight.numel() for m in layer.modules() if isinstance(m, nn.Linear))
        if cost.params_active == params and cost.flops_per_token < 2 * linear:
            raise Failed(f"{cost.flops_per_token} operations are less than the linear maps need")
        state = layer.initial_state(2)
        with torch.no_grad():
            for t in range(length):
                _, state = layer.step(subject.inputs(2)[:, t], state)
        floats = sum(v.numel() // 2 for v in state.values() if v.is_floating_point())
        if floats != cost.state_floats:
            raise Failed(
                f"after {length} tokens the state holds {floats} floats per sequence, "
                f"{cost.state_floats} are stated"
            )
    return f"{cost.params} parameters, {cost.state_floats} floats of state"


def check_dtypes(subject: Subject) -> str:
    """float64 stays float64 and agrees with float32; bfloat16 autocast is finite and near."""
    x, y = subject.inputs(), subject.output
    with torch.no_grad():
        double = subject.stirred().double()(x.double())
        with torch.autocast("cpu", torch.bfloat16):
            half = subject.stirred()(x)
    if double.dtype != torch.float64:
        raise Failed(f"float64 in, {double.dtype} out")
    worst = close(y, double, 1e-3, 1e-5, "float32 against float64")
    if not bool(half.isfinite().all()):
        raise Failed("under bfloat16 autocast the output is not finite")
    error = ((half.double() - double).norm() / double.norm()).item()
    if not error <= 0.1:
        raise Failed(f"under bfloat16 autocast the output is {error:.2g} off (relative norm)")
    return f"float32 {worst:.1g}, bfloat16 {error:.1g}"


def check_vmap(subject: Subject) -> str:
    """Several layers of one shape run as one with stacked weights, gradients too."""
    layers, x = [subject.layer(seed) for seed in (0, 1)], subject.inputs()
    parameters, buffers = stack_module_state(layers)
    blank = copy.deepcopy(layers[0]).to("meta")

    def call(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Values:
        return functional_call(blank, (parameters, buffers), (x,))

    if not parameters:
        raise Skipped("it has no parameters")
    together = vmap(call)(parameters, buffers)
    worst = 0.0
    for index, layer in enumerate(layers):
        alone = layer(x)
        worst = max(worst, close(together[index], alone, 1e-4, 1e-5, f"replica {index}"))
        names, wanted = zip(*layer.named_parameters(), strict=True)
        one = torch.autograd.grad(alone.square().sum(), wanted, allow_unused=True)
        loss = together[index].square().sum()
        many = torch.autograd.grad(
            loss, [parameters[n] for n in names], retain_graph=True, allow_unused=True
        )
        for name, a, b in zip(names, one, many, strict=True):
            if a is not None and b is not None:
                close(b[index], a, 1e-3, 1e-4, f"gradient of {name} in replica {index}")
    return f"{worst:.1g}"


def check_overfit(subject: Subject) -> str:
    """One batch is learned to a loss below 0.05 nats within 300 steps.

    A layer that sees the whole row learns random targets for rows that differ in their first
    token; any other learns a permutation of the tokens. A pointwise layer follows it in the model.
    """
    layer, x = subject.layer(), subject.inputs(2, 8)
    changed = x.clone()
    changed[:, 0] += 1.0
    with torch.no_grad():
        sees_all = not torch.equal(layer(x)[:, -1], layer(changed)[:, -1])
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 32, (8, 8), generator=generator)
    ids[:, 0] = torch.arange(8)
    targets = torch.randint(0, 32, (8, 8), generator=generator)
    if not sees_all:
        targets = torch.randperm(32, generator=generator)[ids]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mlp = parse_layer("mlp").make(subject.width, MAX_LENGTH)
        model = LanguageModel(32, subject.width, [layer, mlp])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    loss = math.inf
    for step in range(1, 301):
        value = nn.functional.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss = value.item()
        if loss < 0.05:
            return f"after {step} steps"
        if not math.isfinite(loss):
            raise Failed(f"the loss is {loss} at step {step}")
    raise Failed(f"the loss is {loss:.2f} nats after 300 steps, expected less than 0.05")


CHECKS: dict[str, Callable[[Subject], str]] = {
    "shape": check_shape,
    "causality": check_causality,
    "independence": check_independence,
    "determinism": check_determinism,
    "lengths": check_lengths,
    "gradient": check_gradient,
    "step": check_step,
    "accounting": check_accounting,
    "dtypes": check_dtypes,
    "vmap": check_vmap,
    "overfit": check_overfit,
}
"""Every check by name, in the order of reports."""


def check_layer(
    text: str, checks: Sequence[str] = tuple(CHECKS), width: int | None = None
) -> list[Outcome]:
    """The outcome of each check for a layer, by registered name or `module:Class`.

    Raises:
        ConfigError: the layer or a check does not exist, or the layer cannot be made.
    """
    for name in checks:
        if name not in CHECKS:
            raise unknown_name("check", name, CHECKS)
    subject = Subject(text, width)
    subject.layer()
    return [outcome(subject, name) for name in checks]


def outcome(subject: Subject, name: str) -> Outcome:
    """What one check says; an error inside the layer counts as failure."""
    try:
        return Outcome(subject.text, name, "ok", CHECKS[name](subject))
    except Skipped as reason:
        return Outcome(subject.text, name, "skipped", str(reason))
    except Failed as reason:
        return Outcome(subject.text, name, "failed", str(reason))
    except Exception as error:  # whatever a user's layer does wrong is a finding
        return Outcome(subject.text, name, "failed", f"{type(error).__name__}: {error}"[:300])
