"""Second moments of the inputs of linear layers, streamed layer by layer.   [CALDERA §5; GPTQ §3]

    H = X X^T / N,   kept as mean mu and centred part: H = Hc + mu mu^T

Products are taken and added up in float64 (on accelerators in float32 over at most 4 096 rows,
added up in float64), so that a large mean drowns nothing, and that the result
does not depend on how the tokens were cut into batches, and two halves merge to the whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from workbench.errors import ConfigError, DataError

ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class SecondMoment:
    """Mean, centred second moment (float32) and number of tokens of one layer input."""

    mean: Float[Tensor, " n"]
    centred: Float[Tensor, "n n"]
    count: int

    def matrix(self) -> Float[Tensor, "n n"]:
        """H = Hc + mu mu^T in float64."""
        mean = self.mean.double()
        return self.centred.double() + mean[:, None] * mean[None, :]

    def to_tree(self) -> dict[str, Any]:
        """For storage: the lower triangle of Hc row by row, mu, and the count."""
        n = len(self.mean)
        rows, columns = torch.tril_indices(n, n)
        return {"flat": self.centred[rows, columns], "mean": self.mean, "count": self.count}

    @classmethod
    def from_tree(cls, tree: dict[str, Any], *, name: str = "Hessian") -> SecondMoment:
        """Inverse of :meth:`to_tree`.

        Raises:
            DataError: entries missing, or a triangle whose length does not fit the mean.
        """
        missing = {"flat", "mean", "count"} - set(tree)
        if missing:
            raise DataError(f"{name}: {', '.join(sorted(missing))} missing; collect it again")
        n = len(tree["mean"])
        if tree["flat"].numel() != n * (n + 1) // 2:
            raise DataError(
                f"{name}: {tree['flat'].numel()} entries, {n * (n + 1) // 2} expected for width {n}"
            )
        rows, columns = torch.tril_indices(n, n)
        centred = torch.zeros(n, n)
        centred[rows, columns] = tree["flat"].float()
        centred[columns, rows] = tree["flat"].float()
        return cls(tree["mean"].float(), centred, int(tree["count"]))


class SecondMomentAccumulator:
    """Running sums of x^T x, x and the token count."""

    def __init__(self, n: int) -> None:
        self.sum_squares = torch.zeros(n, n, dtype=torch.float64)
        self.sum = torch.zeros(n, dtype=torch.float64)
        self.count = 0

    def add(self, x: Float[Tensor, "*batch n"]) -> None:
        """Add every vector along the last axis.

        Raises:
            DataError: a value that is not finite.
        """
        rows = x.detach().reshape(-1, x.shape[-1])
        if not bool(torch.isfinite(rows).all()):
            bad = int((~torch.isfinite(rows)).sum())
            raise DataError(f"{bad} non-finite inputs after {self.count} tokens")
        for chunk in rows.split(ROWS_AT_ONCE):
            chunk = chunk.double() if chunk.device.type == "cpu" else chunk.float()
            self.sum_squares += (chunk.T @ chunk).to(self.sum_squares)
            self.sum += chunk.sum(0, dtype=torch.float64).to(self.sum.device)
        self.count += rows.shape[0]

    def merge(self, other: SecondMomentAccumulator) -> None:
        """Add another shard's sums; exact."""
        if other.sum.shape != self.sum.shape:
            raise DataError(f"widths {len(self.sum)} and {len(other.sum)} cannot be merged")
        self.sum_squares += other.sum_squares
        self.sum += other.sum
        self.count += other.count

    def finish(self) -> SecondMoment:
        """The second moment seen so far.

        Raises:
            DataError: no token was seen.
        """
        if not self.count:
            raise DataError("no calibration token reached this layer; use more or other text")
        mean = self.sum / self.count
        squares = (self.sum_squares + self.sum_squares.T) / (2 * self.count)
        centred = squares - mean[:, None] * mean[None, :]
        return SecondMoment(mean.float(), centred.float(), self.count)


# ---------------------------------------------------------------- where the linear layers are


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
            if not isinstance(module, nn.Linear) or not wanted.search(full):
                continue
            if unwanted is None or not unwanted.search(full):
                names.append(full)
        found[index] = names
    if not any(found.values()):
        raise ConfigError(f"no nn.Linear in {prefix} matches include={include!r}")
    return found


# ---------------------------------------------------------------- the calibration pass


@dataclass(frozen=True)
class Calibration:
    """Second moments by key, and which key every linear layer uses."""

    moments: dict[str, SecondMoment]
    key_of: dict[str, str]

    def of(self, name: str) -> SecondMoment:
        """The second moment of the input of the linear layer ``name``.

        Raises:
            DataError: it was not calibrated.
        """
        if name not in self.key_of:
            raise DataError(f"no Hessian for {name}; collect Hessians with this layer included")
        return self.moments[self.key_of[name]]

    def to_tree(self) -> dict[str, Any]:
        """For storage."""
        moments = {key: moment.to_tree() for key, moment in self.moments.items()}
        return {"moments": moments, "key_of": dict(self.key_of)}

    @classmethod
    def from_tree(cls, tree: dict[str, Any]) -> Calibration:
        """Inverse of :meth:`to_tree`."""
        moments = {
            key: SecondMoment.from_tree(moment, name=key) for key, moment in tree["moments"].items()
        }
        return cls(moments, dict(tree["key_of"]))


class _Stop(Exception):
    """Raised by the hook once the first block's input is known."""


def _split_hidden(args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, tuple, dict[str, Any]]:
    """The hidden states and the other arguments of a decoder block call."""
    if args:
        return args[0], args[1:], kwargs
    others = dict(kwargs)
    return others.pop("hidden_states"), (), others


def _first_inputs(
    model: nn.Module, blocks: nn.ModuleList, batches: list[Tensor]
) -> tuple[list[Tensor], dict[int, list[tuple[tuple, dict]]]]:
    """Input of block 0 for every batch, and each block's other arguments per batch size."""
    inputs: list[Tensor] = []
    arguments: dict[int, list[tuple[tuple, dict]]] = {}

    def hook(index: int, full: bool) -> Callable:
        def record(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            hidden, rest, others = _split_hidden(args, kwargs)
            if index == 0:
                inputs.append(hidden.detach())
                if not full:
                    raise _Stop
            arguments.setdefault(hidden.shape[0], []).append((rest, others))

        return record

    for batch in batches:
        full = batch.shape[0] not in arguments
        handles = [
            block.register_forward_pre_hook(hook(i, full), with_kwargs=True)
            for i, block in enumerate(blocks)
        ]
        try:
            model(input_ids=batch, use_cache=False)
        except _Stop:
            pass
        finally:
            for handle in handles:
                handle.remove()
    return inputs, arguments


def _call_block(block: nn.Module, hidden: Tensor, extra: tuple[tuple, dict]) -> Tensor:
    out = block(hidden, *extra[0], **extra[1])
    return out[0] if isinstance(out, tuple) else out


def _groups(block: nn.Module, names: dict[str, nn.Module], call: Callable[[], Any]) -> list[list]:
    """Names of linear layers that receive the very same input tensor, found by object identity."""
    seen: list[tuple[Tensor, list[str]]] = []

    def hook(name: str) -> Callable:
        def record(_module: nn.Module, args: tuple) -> None:
            for tensor, members in seen:
                if tensor is args[0]:
                    members.append(name)
                    return
            seen.append((args[0], [name]))  # the reference keeps the object's identity alive

        return record

    handles = [m.register_forward_pre_hook(hook(n)) for n, m in names.items()]
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    return [members for _, members in seen]


def collect_hessians(
    model: nn.Module,
    tokens: Int64[Tensor, "rows length"],
    *,
    batch_size: int = 8,
    include: str = ".*",
    exclude: str | None = None,
    mask: Bool[Tensor, "rows length"] | None = None,
    progress: Callable[[Iterable], Iterator] = iter,
) -> Calibration:
    """Second moments of the inputs of all linear layers in the decoder blocks.

    The text goes through one block at a time, so only one block's sums and the hidden states are
    held. Layers with the same input share one Hessian. Tokens where ``mask`` is False (padding)
    are left out.

    Raises:
        DataError: no tokens, or non-finite activations (names the layer).
    """
    if tokens.ndim != 2 or tokens.numel() == 0:
        raise DataError(
            f"calibration tokens of shape {tuple(tokens.shape)}; expected rows x length"
        )
    prefix, blocks = decoder_blocks(model)
    names_of = linear_names(model, include=include, exclude=exclude)
    device = next(model.parameters()).device
    batches = [b.to(device) for b in tokens.split(batch_size)]
    masks = None if mask is None else [m.to(device) for m in mask.split(batch_size)]
    moments: dict[str, SecondMoment] = {}
    key_of: dict[str, str] = {}
    with torch.no_grad():
        hidden, arguments = _first_inputs(model, blocks, batches)
        for index, block in progress(list(enumerate(blocks))):
            modules = {n: model.get_submodule(n) for n in names_of[index]}
            first = arguments[hidden[0].shape[0]][index]
            groups = _groups(block, modules, lambda b=block, f=first: _call_block(b, hidden[0], f))
            sums = {g[0]: SecondMomentAccumulator(modules[g[0]].in_features) for g in groups}
            current: list[Tensor | None] = [None]
            handles = [
                modules[name].register_forward_pre_hook(_adder(name, sums[name], current))
                for name in sums
            ]
            try:
                for i, states in enumerate(hidden):
                    current[0] = None if masks is None else masks[i]
                    hidden[i] = _call_block(block, states, arguments[states.shape[0]][index])
            finally:
                for handle in handles:
                    handle.remove()
            for members in groups:
                key = members[0].removeprefix(f"{prefix}.")
                moments[key] = sums[members[0]].finish()
                key_of.update(dict.fromkeys(members, key))
    return Calibration(moments, key_of)


def _adder(name: str, sums: SecondMomentAccumulator, current: list) -> Callable:
    def add(_module: nn.Module, args: tuple) -> None:
        x, mask = args[0], current[0]
        if mask is not None and x.shape[:-1] == mask.shape:
            x = x[mask]
        try:
            sums.add(x)
        except DataError as error:
            raise DataError(f"{name}: {error}") from None

    return add
