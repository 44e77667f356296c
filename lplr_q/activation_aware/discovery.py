"""Which matrices of a model are compressed, whatever its architecture.

Every ``nn.Linear`` and every Conv1D of transformers (GPT-2: the weight is stored transposed) inside
the decoder blocks, chosen by regular expressions. Output heads lie outside the blocks; routers and
one-column gates decide rather than compute and stay as they are. Experts that transformers keeps as
one 3-D parameter are first taken apart into one linear layer each (:func:`unfuse_experts`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.errors import ConfigError, DataError

ROUTERS = re.compile(r"(^|\.)(router|gate|shared_expert_gate)(\.|$)")
"""Names of linear layers that choose experts."""

EXPERT = re.compile(r"^(.*\bexperts)\.(\d+)\.(.+)$")
"""(experts module, number, sublayer) of one expert's linear layer."""


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D: y = x W + b with W of shape (inputs, outputs)."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def is_linear(module: nn.Module) -> bool:
    """Whether it multiplies by one dense matrix that can be compressed."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def linear_weight(module: nn.Module) -> Float[Tensor, "m n"]:
    """The matrix of y = W x, (outputs, inputs); a view for Conv1D too.

    Raises:
        DataError: neither nn.Linear nor Conv1D.
    """
    if not is_linear(module):
        raise DataError(f"{type(module).__name__} is no linear layer; nothing to compress")
    weight: Any = module.weight
    return weight.detach().T if is_conv1d(module) else weight.detach()


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(outputs, inputs)."""
    weight = linear_weight(module)
    return weight.shape[0], weight.shape[1]


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder blocks: the module list with the most parameters.

    Raises:
        ConfigError: the model has none.
    """
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    lists = [(name, m) for name, m in lists if len(m) and any(True for _ in m.parameters())]
    if not lists:
        raise ConfigError(f"{type(model).__name__} has no list of decoder blocks to compress")
    return max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))


def linear_names(
    model: nn.Module, *, include: str = ".*", exclude: str | None = None
) -> dict[int, list[str]]:
    """Full names of the linear layers of each decoder block that match ``include`` and not
    ``exclude``.

    Raises:
        ConfigError: a pattern that is no regular expression, or nothing matches.
    """
    try:
        wanted, unwanted = re.compile(include), re.compile(exclude) if exclude else None
    except re.error as error:
        raise ConfigError(f"include/exclude is no regular expression: {error}") from None
    prefix, blocks = decoder_blocks(model)
    found: dict[int, list[str]] = {}
    for index, block in enumerate(blocks):
        names = []
        for name, module in block.named_modules():
            full = f"{prefix}.{index}.{name}"
            if not is_linear(module) or not wanted.search(full) or ROUTERS.search(name):
                continue
            if min(linear_shape(module)) > 1 and (unwanted is None or not unwanted.search(full)):
                names.append(full)
        found[index] = names
    if not any(found.values()):
        raise ConfigError(f"no linear layer in {prefix} matches include={include!r}")
    return found


# ---------------------------------------------------------------- experts


class UnfusedExperts(nn.Module):
    """Experts as one pair of linear layers each: y = sum_e w_e down_e( act(gate_e x) * up_e x ).

    Same call as the fused module of transformers (hidden states, chosen experts, their weights);
    ``experts.<e>.gate_up_proj`` and ``experts.<e>.down_proj`` can be replaced one by one.
    """

    def __init__(self, count: int, hidden: int, inner: int, act_fn: Callable, **place: Any) -> None:
        super().__init__()
        self.count, self.act_fn = count, act_fn
        self.tokens: Tensor | None = None
        """Rows of the batch that the expert in work received."""
        for e in range(count):
            expert = nn.Module()
            expert.gate_up_proj = nn.Linear(hidden, 2 * inner, bias=False, **place)
            expert.down_proj = nn.Linear(inner, hidden, bias=False, **place)
            self.add_module(str(e), expert)

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Float[Tensor, "tokens n"]:
        """Weighted sum of the chosen experts' outputs."""
        out = torch.zeros_like(hidden_states)
        for e in range(self.count):
            self.tokens, slot = torch.where(top_k_index == e)
            if not len(self.tokens):
                continue
            expert: Any = self.get_submodule(str(e))
            gate, up = expert.gate_up_proj(hidden_states[self.tokens]).chunk(2, dim=-1)
            y = expert.down_proj(self.act_fn(gate) * up)
            y = y * top_k_weights[self.tokens, slot, None]
            out.index_add_(0, self.tokens, y.to(out.dtype))
        self.tokens = None
        return out


def fused_experts(model: nn.Module) -> dict[str, bool]:
    """Modules with 3-D expert parameters; True where :func:`unfuse_experts` can take them apart."""
    found = {}
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if not any(p.ndim == 3 and "conv" not in key for key, p in own.items()):
            continue
        fits = set(own) == {"gate_up_proj", "down_proj"} and hasattr(module, "act_fn")
        if fits:
            up, down = own["gate_up_proj"], own["down_proj"]
            fits = up.shape[0] == down.shape[0] and up.shape[1:] == (
                2 * down.shape[2],
                down.shape[1],
            )
        found[name] = fits
    return found


def unfuse_experts(model: nn.Module, names: list[str] | None = None) -> list[str]:
    """Replace fused experts by :class:`UnfusedExperts` with the same weights, in place.

    Returns the names replaced; ``names`` limits them. Works on the meta device too.
    """
    replaced = []
    for name, fits in fused_experts(model).items():
        if not fits or (names is not None and name not in names):
            continue
        old: Any = model.get_submodule(name)
        count, hidden, inner = old.down_proj.shape
        place = {"device": "meta", "dtype": old.down_proj.dtype}
        new = UnfusedExperts(count, hidden, inner, old.act_fn, **place)
        for e in range(count):
            expert: Any = new.get_submodule(str(e))
            for leaf in ("gate_up_proj", "down_proj"):
                weight = getattr(old, leaf)[e].detach()
                linear = getattr(expert, leaf)
                linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, new)
        replaced.append(name)
    return replaced


def unfused_names(modules: Any) -> list[str]:
    """The expert modules that layers of these names belong to (``...experts.3.down_proj``)."""
    matches = (EXPERT.match(name) for name in modules)
    return sorted({match[1] for match in matches if match})
