"""The bitshift trellis and its Viterbi decoder, plain and batched.   [QTIP §3]

A path through the trellis (L, k) is a sequence of k-bit symbols b_t; its states are the last L bits
read,

    s_t = (s_{t-1} 2^k + b_t) mod 2^L,        x^_t = table[s_t],

and tail-biting means that the sequence is a circle: s_0 continues s_{T-1}. A circle of T symbols
costs k T bits and nothing else. The encoder looks for the path with the least sum of squares by the
Viterbi recursion

    metric_t(s') = min_a metric_{t-1}(a 2^(L-k) + (s' >> k)) + (x_t - table[s'])^2,

because the predecessors of s' are the 2^k states whose low L - k bits are s' >> k. A circle is
closed in two passes: the sequence turned by T / 2 is decoded with free ends, the L - k bits its
path has where the original sequence begins are taken as that path's beginning and end.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lplr_q import native

_CACHED_STATES = 1 << 17  # states of all tiles worked on at once: metric and costs stay in cache


def windows(symbols: Int64[Tensor, "*batch T"], bits: int, window: int) -> Tensor:
    """States s_t of circles of symbols: the last ``window`` bits up to and with symbol t."""
    have, state = 1, symbols.to(torch.int32)
    while have * bits < window:
        state = state | (state.roll(have, -1) << (bits * have))
        have *= 2
    return state & ((1 << window) - 1)


def reference_path(
    x: Float[Tensor, " T"], table: Float[Tensor, " states"], bits: int, overlap: int | None = None
) -> list[int]:
    """States of the best path by the recursion as written, state by state, in float64.

    ``overlap``: the low L - k bits before the first and after the last symbol; None leaves both
    ends free.
    """
    states, branches = len(table), 2**bits
    low = states // branches
    values = table.double().tolist()
    infinite = float("inf")
    metric = [0.0 if overlap is None or s % low == overlap else infinite for s in range(states)]
    choices: list[list[int]] = []
    for sample in x.double().tolist():
        chosen, updated = [], []
        for state in range(states):
            before = [a * low + (state >> bits) for a in range(branches)]
            best = min(before, key=lambda s: metric[s])
            chosen.append(best)
            updated.append(metric[best] + (sample - values[state]) ** 2)
        metric = updated
        choices.append(chosen)
    ends = [s for s in range(states) if overlap is None or s % low == overlap]
    path = [min(ends, key=lambda s: metric[s])]
    for chosen in reversed(choices[1:]):
        path.append(chosen[path[-1]])
    return path[::-1]


def reference_circle(
    x: Float[Tensor, " T"], table: Float[Tensor, " states"], bits: int
) -> list[int]:
    """Symbols of a tail-biting path, by two passes of :func:`reference_path`."""
    half = len(x) // 2
    low = len(table) >> bits
    turned = reference_path(x.roll(-half, 0), table, bits)
    overlap = turned[len(x) - half - 1] % low
    return [s % 2**bits for s in reference_path(x, table, bits, overlap)]


class _Survivors:
    """The recursion over a batch of sequences; metrics as (batch, b, a, rest) of state bits.

    A state s' = p 2^k + b is stored at (b, p), p = (a, rest): the costs are then added along
    contiguous memory, the minimum over a leaves (b, rest), and p' = rest 2^k + b is the order of
    the next step.
    """

    def __init__(self, table: Float[Tensor, " states"], bits: int) -> None:
        self.branches = 1 << bits
        self.low = table.numel() >> bits
        self.rest = self.low >> bits
        self.bits = bits
        self.table = table.reshape(self.low, self.branches).T.contiguous()  # (b, p)

    def _least(self, metric: Tensor) -> tuple[Tensor, Tensor]:
        """Minimum and first index of it over a; (batch, b, rest)."""
        values = metric.view(len(metric), self.branches, self.branches, self.rest)
        index: Tensor | None = None
        width = 1
        while values.shape[2] > 1:
            even, odd = values[:, :, 0::2], values[:, :, 1::2]
            later = odd < even
            if index is None:
                index = later.to(torch.uint8)
            else:
                index = torch.where(later, index[:, :, 1::2] + width, index[:, :, 0::2])
            values = torch.minimum(even, odd)
            width *= 2
        assert index is not None
        return values[:, :, 0], index[:, :, 0]

    def run(
        self, x: Float[Tensor, "batch T"], overlap: Int64[Tensor, " batch"] | None, stop: int = 0
    ) -> Int64[Tensor, "batch steps"]:
        """States of the best paths from position ``stop`` on."""
        batch, length = x.shape
        columns = x.T.contiguous()
        if overlap is None:
            best = x.new_zeros(batch, 1, self.low)
        else:
            best = x.new_full((batch, 1, self.low), torch.inf)
            best.scatter_(2, overlap[:, None, None], 0.0)
        metric = x.new_empty(batch, self.branches, self.low)
        chosen: list[Tensor] = []
        for t in range(length):
            if t:
                least, index = self._least(metric)
                best = least.transpose(1, 2).reshape(batch, 1, self.low)
                chosen.append(index.reshape(batch, -1))
            torch.sub(columns[t][:, None, None], self.table, out=metric)
            metric.square_().add_(best)
        if overlap is None:
            state = metric.transpose(1, 2).reshape(batch, -1).argmin(1)
        else:
            ends = torch.arange(self.branches, device=x.device) * self.low + overlap[:, None]
            stored = (ends % self.branches) * self.low + ends // self.branches
            first = metric.view(batch, -1).gather(1, stored).argmin(1, keepdim=True)
            state = ends.gather(1, first)[:, 0]
        path = [state]
        for t in range(length - 1, stop, -1):
            p = state >> self.bits  # = low bits of the state before: (rest, b)
            stored = (p % self.branches) * self.rest + p // self.branches
            a = chosen[t - 1].gather(1, stored[:, None])[:, 0].long()
            state = a * self.low + p
            path.append(state)
        return torch.stack(path[::-1], dim=1)


def circles(
    x: Float[Tensor, "batch T"], table: Float[Tensor, " states"], bits: int
) -> Int64[Tensor, "batch T"]:
    """Symbols of tail-biting paths near each row of ``x``: :func:`reference_circle`, batched.

    The C kernel does it where there is one; its symbols are those of :func:`torch_circles`. Circles
    shorter than a state are few enough to try them all.
    """
    if x.shape[1] * bits <= table.numel().bit_length() - 1:
        return _short_circles(x, table, bits)
    found = native.trellis_circles(x, table, bits)
    return torch_circles(x, table, bits) if found is None else found


def _short_circles(
    x: Float[Tensor, "batch T"], table: Float[Tensor, " states"], bits: int
) -> Int64[Tensor, "batch T"]:
    """The best of all 2^(k T) circles."""
    length = x.shape[1]
    every = torch.arange(1 << (bits * length), device=x.device)
    places = bits * torch.arange(length, device=x.device)
    symbols = (every[:, None] >> places) & ((1 << bits) - 1)
    points = table.to(x.device)[windows(symbols, bits, table.numel().bit_length() - 1)]
    # |x - p|^2 without |x|^2, row by row of x
    score = points.square().sum(1) - 2 * x.float() @ points.T
    return symbols[score.argmin(1)]


def torch_circles(
    x: Float[Tensor, "batch T"], table: Float[Tensor, " states"], bits: int
) -> Int64[Tensor, "batch T"]:
    """:func:`circles` in torch, on any device."""
    survivors = _Survivors(table.to(device=x.device, dtype=torch.float32), bits)
    x = x.float()
    half = x.shape[1] // 2
    step = max(1, _CACHED_STATES // table.numel())
    parts = []
    for chunk in x.split(step):
        middle = x.shape[1] - half - 1
        turned = survivors.run(chunk.roll(-half, 1), None, stop=middle)
        parts.append(survivors.run(chunk, turned[:, 0] % survivors.low))
    return torch.cat(parts) & ((1 << bits) - 1)
