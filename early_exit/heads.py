"""Exit gates and emissions: when to leave, and which token an exited position gets.

Gate of exit e:  z = softmax(W_e x + b_e)[1],  W_e ∈ R^{2×m},  fires when z > λ   [DYNAMAX §3]

Emission of exit e:
    lens        p = softmax(U N(h_e))                        no parameters
    affine      p = softmax(U N(h_e + A_e h_e + c_e))        "tuned lens", A_e starts at 0
    last_block  p = softmax(U N(block_{L-1}(h_e)))           the published one

Labels and losses always use the chosen emission.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.errors import ConfigError, DataError

EMISSIONS = ("lens", "affine", "last_block")
"""How the token of an exited position is made."""


def default_exits(layers: int, count: int = 4) -> tuple[int, ...]:
    """`count` exits evenly in the second half: first at L/2 - 1, step L/(2·count)   [DYNAMAX §3]

    >>> default_exits(32), default_exits(64), default_exits(8)
    ((15, 19, 23, 27), (31, 39, 47, 55), (3, 4, 5, 6))
    """
    step = max(1, layers // (2 * count))
    return tuple(e for e in range(layers // 2 - 1, layers - 1, step))[:count]


def check_exits(exits: Sequence[int], layers: int) -> tuple[int, ...]:
    """The exits as a tuple.

    Raises:
        ConfigError: none, a repeated one, unsorted, or outside of 0..L-2.
    """
    wrong = [e for e in exits if not 0 <= e <= layers - 2]
    if not exits or wrong or list(exits) != sorted(set(exits)):
        raise ConfigError(
            f"exits {list(exits)}: expected ascending, distinct block numbers from 0 to "
            f"{layers - 2} (the model has {layers} blocks)" + (f"; wrong: {wrong}" if wrong else "")
        )
    return tuple(int(e) for e in exits)


class Gates(nn.Module):
    """One linear two-way gate per exit, evaluated for all exits at once."""

    def __init__(self, n_exits: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n_exits, 2, width))
        self.bias = nn.Parameter(torch.zeros(n_exits, 2))

    def forward(self, x: Float[Tensor, "tokens exits m"]) -> Float[Tensor, "tokens exits 2"]:
        """Logits of "stay" and "exit" of every exit."""
        return torch.einsum("tem,ecm->tec", x, self.weight) + self.bias

    def scores(self, x: Float[Tensor, "tokens exits m"]) -> Float[Tensor, "tokens exits"]:
        """z: the probability of "exit"."""
        return self(x).softmax(-1)[..., 1]

    def folded(self, mean: Float[Tensor, "exits m"], scale: Float[Tensor, "exits m"]) -> Gates:
        """The same gates for inputs that are not standardised: W' = W/σ, b' = b - W' μ."""
        gates = Gates(*self.weight.shape[::2]).to(self.weight)
        with torch.no_grad():
            weight = self.weight / scale[:, None]
            gates.weight.copy_(weight)
            gates.bias.copy_(self.bias - torch.einsum("ecm,em->ec", weight, mean))
        return gates


class Translators(nn.Module):
    """Per exit h ↦ h + A h + c, started at the identity."""

    def __init__(self, n_exits: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n_exits, width, width))
        self.bias = nn.Parameter(torch.zeros(n_exits, width))

    def forward(
        self, h: Float[Tensor, "tokens exits width"]
    ) -> Float[Tensor, "tokens exits width"]:
        """All exits at once."""
        return h + torch.einsum("ted,efd->tef", h, self.weight) + self.bias

    def one(self, index: int, h: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """The translator of one exit."""
        return h + h @ self.weight[index].T + self.bias[index]


class Exits(nn.Module):
    """Everything trained on top of a frozen backbone: gates, and translators if affine."""

    def __init__(self, exits: Sequence[int], gate_width: int, width: int, emission: str = "lens"):
        super().__init__()
        if emission not in EMISSIONS:
            raise ConfigError(f"emission {emission!r}: expected one of {', '.join(EMISSIONS)}")
        self.exits = tuple(exits)
        self.emission = emission
        self.gates = Gates(len(self.exits), gate_width)
        self.translators = Translators(len(self.exits), width) if emission == "affine" else None

    def tensors(self) -> dict[str, Tensor]:
        """One entry per exit and tensor, named by the exit's block: `exit_3.gate.weight`."""
        named = {}
        for index, layer in enumerate(self.exits):
            named[f"exit_{layer}.gate.weight"] = self.gates.weight[index].detach()
            named[f"exit_{layer}.gate.bias"] = self.gates.bias[index].detach()
            if self.translators is not None:
                named[f"exit_{layer}.affine.weight"] = self.translators.weight[index].detach()
                named[f"exit_{layer}.affine.bias"] = self.translators.bias[index].detach()
        return named

    def load(self, tensors: dict[str, Tensor], where: str = "exits") -> None:
        """Take the tensors written by `tensors`.

        Raises:
            ConfigError: missing, unexpected or misshapen names (the first five).
            DataError: a tensor of whole numbers, or with a value that is not finite.
        """
        own = self.tensors()
        missing = [n for n in own if n not in tensors]
        extra = [n for n in tensors if n not in own]
        wrong = [n for n in own if n in tensors and own[n].shape != tensors[n].shape]
        if missing or extra or wrong:
            raise ConfigError(
                f"{where}: does not fit exits {list(self.exits)} with emission {self.emission}: "
                f"missing {missing[:5]}, unexpected {extra[:5]}, other shape {wrong[:5]}"
            )
        for name in own:
            given = tensors[name]
            if not given.is_floating_point() or not bool(torch.isfinite(given).all()):
                raise DataError(
                    f"{where}: {name} is {given.dtype}, expected finite floating-point numbers; "
                    "restore a copy or train the exits anew"
                )
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(tensors[name])  # `value` shares memory with the parameter
