"""Decoding with exits, one text at a time, with the state of skipped blocks kept right.

A token runs segment by segment (a segment ends at an exit). When the exit fires, the token is
emitted there and the blocks above get their state by the policy:

    propagate   from norm_j(h_e): keys, values, or the recurrent update                [CALM §3]
    defer       exactly: the token waits in the queue of the next segment and passes through it
                together with the next token that goes that deep, in one multi-token call
    copy_token, copy_layer, skip    cheaper, and wrong by a measurable amount

`defer` needs one idea: queue s holds, in text order, the streams of all tokens that have passed
segments 0..s-1 and not s. Running segment s empties queue s before the present token. So every
block sees every token once, in order, and its state is the full model's on the same text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from early_exit.accounting import Tally, dynamax_speedup
from early_exit.adapters.base import Adapter
from early_exit.criteria import get_criterion, thresholds_for
from early_exit.heads import Exits, check_exits
from workbench.errors import ConfigError, DataError

POLICIES = ("auto", "propagate", "defer", "copy_token", "copy_layer", "skip")
"""State policies; `auto` is `defer`."""

Choose = Callable[[Tensor, list[int]], int]
"""(logits of one position, ids so far) → token."""


def greedy(logits: Tensor, ids: list[int]) -> int:
    """The most probable token."""
    del ids
    return int(logits.argmax())


@dataclass
class Decoded:
    """What one call of `Engine.decode` produced."""

    tokens: list[int] = field(default_factory=list)
    """Tokens emitted (with `forced`: what would have been emitted at each position)."""
    exit_layers: list[int] = field(default_factory=list)
    """Block after which each token left; L-1 for the full depth."""
    scores: list[list[float]] = field(default_factory=list)
    """Score at every exit that was asked."""
    tally: Tally = field(default_factory=Tally)
    """What was executed, prefill apart."""
    prefill_tokens: int = 0
    """Tokens of the prompt that ran through all blocks before the first decoding step."""
    seconds: float = 0.0
    """Wall time of the decoding steps."""
    cpu_seconds: float = 0.0
    """Processor time of the decoding steps (steadier where other programs run)."""
    prefill_seconds: float = 0.0
    """Wall time of the prefill."""
    pending: int = 0
    """Tokens still waiting in the queues at the end (`defer`)."""

    def dynamax(self, layers: int, family: str, recompute: bool) -> float:
        """The published speed-up formula on the same trace (see `accounting`)."""
        left = [e for e in self.exit_layers if e < layers - 1]
        return dynamax_speedup(left, len(self.exit_layers), layers, family, recompute)


class Engine:
    """Exit decoding for one backbone with one set of exits, criterion, thresholds and policy."""

    def __init__(
        self,
        adapter: Adapter,
        exits: Exits,
        *,
        criterion: str = "gate",
        threshold: float | Sequence[float] = 0.9,
        policy: str = "auto",
        max_pending: int = 8,
    ):
        if policy == "auto":
            policy = "defer"
        if policy not in adapter.policies():
            raise ConfigError(
                f"state policy {policy!r} is not available for {adapter.family} backbones; "
                f"use one of {', '.join(adapter.policies())}"
            )
        if get_criterion(criterion).looks_at == "answer":
            raise ConfigError(
                "criterion oracle needs the full model's answer; it exists in the simulated sweep "
                "only (python -m early_exit.sweep_thresholds)"
            )
        if max_pending < 1:
            raise ConfigError(f"max_pending={max_pending}: expected at least 1")
        self.adapter, self.exits = adapter, exits
        self.layers = check_exits(exits.exits, adapter.n_layers)
        self.criterion_name, self.criterion = criterion, get_criterion(criterion)
        self.thresholds = thresholds_for(threshold, len(self.layers))
        self.policy, self.max_pending = policy, max_pending
        self.last_block = exits.emission == "last_block"
        self.bounds = [0, *(e + 1 for e in self.layers), adapter.n_layers]
        gates = exits.gates
        with torch.no_grad():  # softmax over two classes = sigmoid of the difference
            self.gate_weight = (gates.weight[:, 1] - gates.weight[:, 0]).clone()
            self.gate_bias = (gates.bias[:, 1] - gates.bias[:, 0]).clone()
        self.split_stream = adapter.gate_width != adapter.width

    # ------------------------------------------------------------ one text

    @torch.no_grad()
    def decode(
        self,
        prompt: Int[Tensor, " time"],
        max_new_tokens: int,
        *,
        eos: int | None = None,
        choose: Choose = greedy,
        forced: Sequence[int] | None = None,
        on_state: Callable[[Any], None] | None = None,
    ) -> Decoded:
        """Decode up to `max_new_tokens` tokens after `prompt`.

        The prompt without its last token is prefilled through all blocks. With `forced` the given
        tokens follow the prompt whatever is emitted, so that several settings can be compared on
        the same text. `on_state` receives the state at the end, queues flushed.

        Raises:
            DataError: the prompt is empty.
            ConfigError: prompt and new tokens exceed the model's positions.
        """
        if prompt.numel() == 0:
            raise DataError("the prompt is empty; give at least one token (the <s> token will do)")
        if forced is not None:
            max_new_tokens = min(max_new_tokens, len(forced) + 1)
        adapter, result = self.adapter, Decoded()
        ids = prompt.reshape(-1).to(adapter.device)
        state = adapter.new_cache(1, ids.numel() + max_new_tokens)
        begin = time.perf_counter()
        result.prefill_tokens = ids.numel() - 1
        if result.prefill_tokens:
            adapter.run(adapter.embed(ids[None, :-1]), 0, adapter.n_layers, state, 0)
        result.prefill_seconds = time.perf_counter() - begin
        self.queues: list[list[Tensor]] = [[] for _ in self.bounds]
        begin, cpu = time.perf_counter(), time.process_time()
        known = ids.tolist()
        for index in range(max_new_tokens):
            position = len(known) - 1
            logits = self._step(known[-1], position, state, result)
            token = choose(logits, known)
            result.tokens.append(token)
            if forced is None:
                known.append(token)
                if token == eos:
                    break
            elif index < len(forced):
                known.append(int(forced[index]))
        result.seconds = time.perf_counter() - begin
        result.cpu_seconds = time.process_time() - cpu
        self._count_pending(state, result)
        if on_state is not None:
            self._flush(state)
            on_state(state)
        return result

    def _step(self, token: int, position: int, state: Any, result: Decoded) -> Tensor:
        """Logits of one position; appends the exit layer and scores to `result`."""
        adapter, tally = self.adapter, result.tally
        ids = torch.tensor([[token]], device=adapter.device)
        hidden = previous = adapter.embed(ids)
        asked: list[float] = []
        tally.tokens += 1
        tally.full_context += position + 1
        may_leave = self._may_leave(state, position)
        for segment, layer in enumerate(self.layers):
            before, hidden = self._run_segment(segment, hidden, position, state, tally)
            if not may_leave or self.thresholds[segment] >= 1:
                previous = hidden
                continue
            score, logits = self._score(segment, before, hidden, previous, tally)
            asked.append(score)
            previous = hidden
            if score > self.thresholds[segment]:
                logits = self._leave(segment, hidden, position, state, logits, tally)
                result.exit_layers.append(layer)
                result.scores.append(asked)
                tally.latency_blocks += layer + 1 + int(self.last_block)
                return logits
        _, hidden = self._run_segment(len(self.layers), hidden, position, state, tally)
        tally.latency_blocks += adapter.n_layers
        tally.vocabularies += 1
        result.exit_layers.append(adapter.n_layers - 1)
        result.scores.append(asked)
        return adapter.logits(hidden)[0, -1]

    def _may_leave(self, state: Any, position: int) -> bool:
        """A full queue must be worked off first: the token that does it goes to full depth."""
        if self.policy != "defer":
            return True
        return position - state.lengths[-1] < self.max_pending

    def _run_segment(
        self, segment: int, hidden: Tensor, position: int, state: Any, tally: Tally
    ) -> tuple[Tensor, Tensor]:
        """The stream before and after the segment's last block, for the present token."""
        low, high = self.bounds[segment], self.bounds[segment + 1]
        waiting = self.queues[segment]
        if waiting:
            hidden = torch.cat([*waiting, hidden], dim=1)
            waiting.clear()
        count = hidden.shape[1]
        start = position + 1 - count
        tally.blocks += count * (high - low)
        tally.context += (high - low) * sum(range(start + 1, position + 2))
        before = hidden
        if self.split_stream and segment < len(self.layers):
            before = self.adapter.run(hidden, low, high - 1, state, start)
            hidden = self.adapter.run(before, high - 1, high, state, start)
        else:
            hidden = self.adapter.run(hidden, low, high, state, start)
        if count > 1:
            if segment < len(self.layers):
                self.queues[segment + 1].append(hidden[:, :-1])
            before, hidden = before[:, -1:], hidden[:, -1:]
        return before, hidden

    def _score(
        self, segment: int, before: Tensor, hidden: Tensor, previous: Tensor, tally: Tally
    ) -> tuple[float, Tensor | None]:
        """The criterion's score at an exit, and the exit's logits if they were needed for it."""
        looks_at = self.criterion.looks_at
        if looks_at == "gate":
            tally.gates += 1
            x = self.adapter.streams(before, hidden)[0, 0]
            z = torch.dot(x, self.gate_weight[segment].to(x)) + self.gate_bias[segment].to(x)
            return float(torch.sigmoid(z)), None
        if looks_at == "nothing":
            return 1.0, None
        assert self.criterion.score is not None
        if looks_at == "hidden":
            return float(self.criterion.score(hidden[0, 0], previous[0, 0])), None
        if self.last_block:
            raise ConfigError(
                f"criterion {self.criterion_name} looks at the exit's distribution, which emission "
                "last_block only has after leaving; use emission lens or affine, or criterion gate"
            )
        logits = self._lens(segment, hidden, tally)
        return float(self.criterion.score(logits)), logits

    def _lens(self, segment: int, hidden: Tensor, tally: Tally) -> Tensor:
        tally.vocabularies += 1
        if self.exits.translators is not None:
            tally.translations += 1
            hidden = self.exits.translators.one(segment, hidden)
        return self.adapter.logits(hidden)[0, -1]

    def _leave(
        self,
        segment: int,
        hidden: Tensor,
        position: int,
        state: Any,
        logits: Tensor | None,
        tally: Tally,
    ) -> Tensor:
        """Emit at an exit and give the skipped blocks their state."""
        adapter, top = self.adapter, self.adapter.n_layers
        low = self.bounds[segment + 1]
        last = top - 1 if self.last_block else top
        if self.policy == "defer":
            self.queues[segment + 1].append(hidden)
        else:
            adapter.fill(hidden, low, last, state, position, self.policy)  # type: ignore[arg-type]
            if self.policy == "propagate":
                tally.fills += last - low
        if not self.last_block:
            return logits if logits is not None else self._lens(segment, hidden, tally)
        snapshot = state.snapshot() if self.policy == "defer" else None
        out = adapter.run(hidden, top - 1, top, state, position)
        if snapshot is not None:
            state.rollback(snapshot)  # the real entry comes when the queue is worked off
        tally.blocks += 1
        tally.context += position + 1
        tally.vocabularies += 1
        return adapter.logits(out)[0, -1]

    def _count_pending(self, state: Any, result: Decoded) -> None:
        """Tokens still waiting are counted as if they had been worked off."""
        for segment in range(1, len(self.bounds) - 1):
            waiting = sum(part.shape[1] for part in self.queues[segment])
            rest = self.adapter.n_layers - self.bounds[segment]
            end = state.lengths[self.bounds[segment] - 1]  # text position after the newest of them
            result.pending += waiting
            result.tally.blocks += waiting * rest
            result.tally.context += rest * sum(range(end - waiting + 1, end + 1))

    def _flush(self, state: Any) -> None:
        """Run everything that waits through the rest of the blocks."""
        for segment in range(1, len(self.bounds) - 1):
            waiting = self.queues[segment]
            if not waiting:
                continue
            hidden = torch.cat(waiting, dim=1)
            waiting.clear()
            low, high = self.bounds[segment], self.bounds[segment + 1]
            out = self.adapter.run(hidden, low, high, state, state.lengths[low])
            if segment < len(self.layers):
                self.queues[segment + 1].append(out)
