"""Mixtures of experts: each token is computed by the few experts that a router picks for it.

    s = R x,  T = the k largest of s,  p = softmax over T (0 elsewhere),  y = Σ_{e ∈ T} p_e f_e(x)

The published code differs (`legacy`): it sets the scores outside T to 0 instead of −∞ before the
softmax over all E, so that every expert keeps a weight of at least 1/Z, and none can be skipped.

Glossary: E experts, k active ones, m hidden width of an expert, d width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mad.layers.hyena import ChannelConvolution, GatedProjection, build_filter
from mad.layers.layer import Layer, State
from workbench.errors import ConfigError

DENSE_UP_TO = 256
"""Hidden units of all experts up to which computing them all is faster than sorting tokens."""


def route(
    scores: Float[Tensor, "*tokens experts"], active: int, *, legacy: bool = False
) -> tuple[Float[Tensor, "*tokens experts"], Int[Tensor, "*tokens active"]]:
    """Weights of all experts, and which were picked; 0 for the others unless `legacy`.

    >>> route(torch.tensor([1.0, 3.0, 3.0, -1.0]), 2)[0].tolist()
    [0.0, 0.5, 0.5, 0.0]
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    values, picked = scores.topk(active, dim=-1)
    if legacy:
        return torch.zeros_like(scores).scatter(-1, picked, values).softmax(dim=-1), picked
    return torch.zeros_like(scores).scatter(-1, picked, values.softmax(dim=-1)), picked


class Routing(NamedTuple):
    """How a batch of tokens was spread over the experts."""

    balance_loss: Tensor
    """E Σ_e f_e P_e, 1 when all are used alike; f_e share of picks, P_e mean softmax of scores.
    [Switch Transformer, arXiv 2101.03961, eq. 4]"""
    usage: Tensor
    """f_e, (experts,)."""
    usage_entropy: Tensor
    """−Σ f_e ln f_e / ln E: 1 when all are used alike, 0 when one expert gets every token."""


def spread(scores: Float[Tensor, "*tokens experts"], active: int) -> Routing:
    """Balance loss (with gradient) and usage of a router's scores."""
    experts = scores.shape[-1]
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).reshape(-1, experts)
    picked = scores.topk(active, dim=-1).indices
    chosen = torch.zeros_like(scores).scatter(
        -1, picked, torch.ones_like(picked, dtype=scores.dtype)
    )
    usage = chosen.mean(dim=0) / active
    loss = experts * (usage * scores.softmax(dim=-1).mean(dim=0)).sum()
    entropy = -torch.xlogy(usage, usage).sum() / torch.log(torch.tensor(float(experts)))
    return Routing(loss, usage, entropy)


class Routed(Layer):
    """Base of the layers with a router over E experts, k of them active."""

    def __init__(self, name: str, width: int, experts: int, active: int) -> None:
        super().__init__()
        if not 1 <= active <= experts:
            raise ConfigError(
                f"{name}: active={active} of num_experts={experts}; choose 1 to {experts}"
            )
        self.num_experts, self.active = experts, active
        self.router = nn.Linear(width, experts)

    def routing(self, x: Float[Tensor, "batch time width"]) -> Routing:
        """Balance loss and usage for these inputs of the layer."""
        return spread(self.router(x), self.active)


@contextmanager
def collect_routing(model: nn.Module) -> Iterator[list[Routing]]:
    """A list that gets a `Routing` for each call of a routed layer of `model` in the block.

    with collect_routing(model) as routings:
        logits = model(ids)
    loss = cross_entropy(logits, targets) + 0.01 * sum(r.balance_loss for r in routings)
    """
    found: list[Routing] = []

    def keep(layer: nn.Module, inputs: tuple) -> None:
        assert isinstance(layer, Routed)
        found.append(layer.routing(inputs[0]))

    handles = [m.register_forward_pre_hook(keep) for m in model.modules() if isinstance(m, Routed)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


class MoEMLP(Routed):
    """k of E small gated perceptrons, f_e(x) = W_e (A_e x ⊙ gelu(B_e x)); par 3·d·E·m + (d + 1)·E.

    50 184 parameters at d = 128 with the default 8 experts of 16 units, 13 320 of them active.

    `legacy` is the published layer: W is one dense map from all hidden units to all experts'
    outputs, no weight is 0, and 128 trainable numbers (`gates`) are used nowhere; par 165 000.

    Two exact forms: `dense` computes every expert and weighs, one product for all; `dispatch` sorts
    tokens by expert and computes only what was picked, but its sizes depend on the data, so it does
    not run under `torch.func.vmap`.
    """

    def __init__(
        self,
        width: int,
        *,
        hidden: int = 16,
        num_experts: int = 8,
        active: int = 2,
        bias: bool = False,
        legacy: bool = False,
        kernel: Literal["auto", "dense", "dispatch"] = "auto",
    ) -> None:
        super().__init__("moe-mlp", width, num_experts, active)
        if hidden < 1:
            raise ConfigError(f"moe-mlp: hidden={hidden} must be at least 1")
        if kernel not in ("auto", "dense", "dispatch") or (legacy and kernel == "dispatch"):
            expected = "auto or dense, for all experts weigh" if legacy else "auto, dense, dispatch"
            raise ConfigError(
                f"moe-mlp: kernel={kernel!r} with legacy={legacy}; expected {expected}"
            )
        self.width, self.hidden, self.legacy = width, hidden, legacy
        units = num_experts * hidden
        self.dispatches = kernel == "dispatch" or (
            kernel == "auto" and not legacy and units > DENSE_UP_TO
        )
        self.up = nn.Linear(width, 2 * units, bias=bias)
        if legacy:
            self.mix = nn.Linear(units, width * num_experts, bias=bias)
            self.gates = nn.Parameter(torch.ones(width))
        else:
            bound = hidden**-0.5
            self.down = nn.Parameter(
                torch.empty(num_experts, hidden, width).uniform_(-bound, bound)
            )
            self.down_bias = nn.Parameter(torch.zeros(num_experts, width)) if bias else None

    def forward(self, x: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch time width"]:
        """The picked experts of every position, weighed by the router."""
        weights, picked = route(self.router(x), self.active, legacy=self.legacy)
        if self.dispatches:
            return self._dispatch(x, weights, picked)
        a, b = self.up(x).chunk(2, dim=-1)
        hidden = a * F.gelu(b)  # (B, L, E·m)
        weights = weights.to(hidden.dtype)
        if self.legacy:
            outputs = self.mix(hidden).unflatten(-1, (self.width, self.num_experts))
            return (outputs @ weights[..., None]).squeeze(-1)
        weighed = hidden.unflatten(-1, (self.num_experts, self.hidden)) * weights[..., None]
        y = weighed.flatten(-2) @ self.down.flatten(0, 1).to(hidden.dtype)
        return y if self.down_bias is None else y + weights @ self.down_bias.to(hidden.dtype)

    def _dispatch(self, x: Tensor, weights: Tensor, picked: Tensor) -> Tensor:
        """Tokens sorted by expert, each expert on its own tokens, results added up in place."""
        tokens = x.flatten(0, -2)  # (N, d)
        expert = picked.flatten()  # (N·k,)
        order = expert.argsort(stable=True)
        token = order // self.active
        counts = torch.bincount(expert, minlength=self.num_experts).tolist()
        up = self.up.weight.unflatten(0, (2, self.num_experts, self.hidden))
        shift = self.up.bias
        if shift is not None:
            shift = shift.unflatten(0, (2, self.num_experts, self.hidden))
        outputs = []
        for e, mine in enumerate(tokens[token].split(counts)):
            a, b = (
                F.linear(mine, up[part, e], None if shift is None else shift[part, e])
                for part in (0, 1)
            )
            y = (a * F.gelu(b)) @ self.down[e].to(a.dtype)
            outputs.append(y if self.down_bias is None else y + self.down_bias[e].to(a.dtype))
        computed = torch.cat(outputs)
        weight = weights.flatten(0, -2).gather(-1, picked.flatten(0, -2)).flatten()[order]
        total = torch.zeros(len(tokens), self.width, device=x.device, dtype=computed.dtype)
        total = total.index_add(0, token, computed * weight[:, None].to(computed.dtype))
        return total.view(*x.shape[:-1], self.width)

    def _picked_share(self) -> float:
        return 1.0 if self.legacy else self.active / self.num_experts

    def active_parameters(self) -> int:
        """The router and the picked experts; all of them in the published form."""
        total = sum(p.numel() for p in self.parameters())
        router = sum(p.numel() for p in self.router.parameters())
        return router + round((total - router) * self._picked_share())

    def linear_flops_per_token(self) -> int:
        """Router and picked experts, as `dispatch` computes them; `dense` computes all E."""
        maps = self.up.weight.numel()
        maps += self.mix.weight.numel() if self.legacy else self.down.numel()
        return 2 * self.router.weight.numel() + round(2 * maps * self._picked_share())

    def mixing_flops_per_token(self, length: int) -> int:
        """The weighted sum of the experts' outputs."""
        del length
        return 2 * self.width * (self.num_experts if self.legacy else self.active)


class HyenaExperts(Routed):
    """Hyena whose E·m channels are E experts; the router picks which of them reach the output.

    y = x₁ ⊙ (h ∗ (x₂ ⊙ v)) on E·m channels, out = W_o Σ_{e ∈ T} p_e y_e; par 57 080 + 3·Lmax at
    d = 128. A convolution reads all of the past, so every channel is convolved whichever expert is
    picked: all parameters are active.
    """

    def __init__(
        self,
        width: int,
        max_length: int,
        *,
        expert_width: int = 16,
        num_experts: int = 8,
        active: int = 2,
        short_filter: int = 3,
        filter: Literal["implicit", "rtf"] = "implicit",
        filter_order: int = 16,
        rtf_init: Literal["zero", "xavier", "montel"] = "zero",
        legacy: bool = False,
        kernel: Literal["auto", "toeplitz", "fft"] = "auto",
    ) -> None:
        super().__init__("hyena-experts", width, num_experts, active)
        inner = expert_width * num_experts
        if expert_width < 1:
            raise ConfigError(f"hyena-experts: expert_width={expert_width} must be at least 1")
        self.expert_width, self.legacy = expert_width, legacy
        self.convolution = ChannelConvolution(
            GatedProjection(width, inner, 1, short_filter),
            build_filter(filter, inner, filter_order, max_length, rtf_init=rtf_init),
            kernel,
        )
        self.out = nn.Linear(expert_width, width)

    def _combine(self, x: Tensor, y: Float[Tensor, "*tokens inner"]) -> Tensor:
        weights, _ = route(self.router(x), self.active, legacy=self.legacy)
        outputs = y.unflatten(-1, (self.expert_width, self.num_experts))  # channel c is of c mod E
        return self.out((outputs @ weights.to(y.dtype)[..., None]).squeeze(-1))

    def forward(self, x: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch time width"]:
        """Convolve all channels, add up the picked experts, project."""
        return self._combine(x, self.convolution.mix(x))

    def initial_state(
        self,
        batch: int,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """That of the convolution."""
        return self.convolution.initial_state(batch, device=device, dtype=dtype)

    def step(
        self, x: Float[Tensor, "batch width"], state: State
    ) -> tuple[Float[Tensor, "batch width"], State]:
        """One token."""
        y, state = self.convolution.mix_step(x, state)
        return self._combine(x, y), state

    def state_floats(self, length: int) -> int:
        """That of the convolution: a history, or the modes of a rational filter."""
        return self.convolution.state_floats(length)

    def matrix_state_floats(self, length: int) -> int:
        """Channels times filter order."""
        return self.convolution.matrix_state_floats(length)

    def kv_bytes(self, length: int) -> int:
        """The history at two bytes per number; 0 with a rational filter."""
        return self.convolution.kv_bytes(length)

    def mixing_flops_per_token(self, length: int) -> int:
        """The convolution and the sum over experts."""
        inner = self.expert_width * self.num_experts
        return self.convolution.mixing_flops_per_token(length) + 2 * inner
