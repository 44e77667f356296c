"""AdamW for several processes, as the training loop drives it: rank 0 leads, the others help.

Every process holds all parameters: what trains is small beside the codes, and these are few bits.
:class:`JoinedAdamW` adds gradients up everywhere and steps on rank 0. :class:`ShardedAdamW` is
stage 2 of ZeRO [Rajbhandari et al. 2020], which FSDP calls SHARD_GRAD_OP: of the summed gradient
and of both moments a process keeps one part in N, steps on it, and all exchange the new
parameters. Their states are the same tree, that of AdamW itself: a checkpoint does not know how
many processes wrote it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lplr_q import distributed
from workbench.optim import clip

STEP, SAVE, LOAD = -1, -2, -3
"""What rank 0 says when the others have to help; numbers of training steps are positive."""
MOMENTS = ("exp_avg", "exp_avg_sq")


class JoinedAdamW:
    """Gradients are added up on all processes; rank 0 steps and gives its parameters to all."""

    kept = "optimiser state in the first"
    """Where it is, for the log."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        self.inner = torch.optim.AdamW(groups)
        self.parameters: list[nn.Parameter] = [p for g in groups for p in g["params"]]
        self.device = self.parameters[0].device

    def prepare(self) -> None:
        """Before a step, on all: the parameters of rank 0, and no gradients."""
        self.share()
        for parameter in self.parameters:
            parameter.grad = None

    def share(self) -> None:
        """Give all processes the parameters of rank 0."""
        if distributed.world() == 1:
            return
        flat = torch.cat([p.detach().flatten() for p in self.parameters])
        _put(distributed.broadcast(flat), self.parameters)

    def reduce(self, loss: Tensor, max_norm: float) -> tuple[Tensor, Tensor]:
        """On all: sums of the loss and of the gradients, these scaled to a joint norm of at most
        ``max_norm``; (loss, norm before)."""
        if distributed.world() > 1:
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
            flat = torch.cat([loss.view(1), *(g.flatten() for g in grads)])
            loss, at = distributed.all_reduce_sum(flat)[0], 1
            for parameter in self.parameters:
                parameter.grad = flat[at : at + parameter.numel()].view_as(parameter)
                at += parameter.numel()
        return loss, clip(self.parameters, max_norm)

    def step(self) -> None:
        """On rank 0: the step of AdamW."""
        self.inner.step()

    def help(self, said: int) -> None:
        """On the others: their part of what rank 0 announced; nothing is announced here."""

    def state_dict(self) -> dict[str, Any]:
        """That of AdamW; on rank 0."""
        return self.inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what ``state_dict`` gave; on rank 0."""
        self.inner.load_state_dict(state)


class ShardedAdamW(JoinedAdamW):
    """One part in N of the gradients and moments on each process; parameters on all."""

    kept = "a part of gradients and optimiser state in each"

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups)
        self.members: list[list[nn.Parameter]] = [list(g["params"]) for g in groups]
        self.own = [nn.Parameter(self._part(_flat(m))) for m in self.members]
        own = [{**g, "params": [p]} for g, p in zip(groups, self.own, strict=True)]
        self.inner = torch.optim.AdamW(own)
        self._ready = False

    def prepare(self) -> None:
        """Before a step, on all: no gradients; first of all the parameters of rank 0."""
        if not self._ready:
            self.share()
            for own, members in zip(self.own, self.members, strict=True):
                own.data = self._part(_flat(members))
            self._ready = True
        for parameter in self.parameters:
            parameter.grad = None

    def reduce(self, loss: Tensor, max_norm: float) -> tuple[Tensor, Tensor]:
        """As of :class:`JoinedAdamW`; of the sum each process keeps its part alone."""
        square = torch.zeros_like(loss)
        for own, members in zip(self.own, self.members, strict=True):
            parts = list(self._padded(_flat(members, gradients=True)).chunk(distributed.world()))
            own.grad = torch.empty_like(own)
            dist.reduce_scatter(own.grad, parts)
            square += own.grad.square().sum()
        loss, square = distributed.all_reduce_sum(torch.stack([loss, square]))
        norm = square.sqrt()
        if max_norm > 0:
            for own in self.own:
                assert own.grad is not None
                own.grad *= (max_norm / (norm + 1e-6)).clamp(max=1.0)
        return loss, norm

    def step(self) -> None:
        """Rank 0 announces the step and its learning rates; every process steps on its part."""
        distributed.announce(STEP, self.device)
        self._step()

    def help(self, said: int) -> None:
        """On the others: their part of a step, of saving or of loading."""
        parts: dict[int, Callable[[], Any]] = {
            STEP: self._step,
            SAVE: self._gather,
            LOAD: lambda: self._scatter(None),
        }
        parts[said]()

    def state_dict(self) -> dict[str, Any]:
        """The state an AdamW of all parameters would have; on rank 0."""
        distributed.announce(SAVE, self.device)
        state, at = self._gather(), 0
        groups = self.inner.state_dict()["param_groups"]
        for group, members in zip(groups, self.members, strict=True):
            group["params"] = list(range(at, at + len(members)))
            at += len(members)
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Spread the state of an AdamW of all parameters; on rank 0."""
        distributed.announce(LOAD, self.device)
        for group, stored in zip(self.inner.param_groups, state["param_groups"], strict=True):
            group.update({k: v for k, v in stored.items() if k != "params"})
        self._scatter(state["state"])

    # ------------------------------------------------------------ what all do together

    def _padded(self, flat: Tensor) -> Tensor:
        return nn.functional.pad(flat, (0, -len(flat) % distributed.world()))

    def _part(self, flat: Tensor) -> Tensor:
        """This process's part of a whole vector; a copy."""
        return self._padded(flat).chunk(distributed.world())[distributed.rank()].clone()

    def _step(self) -> None:
        rates = torch.tensor([g["lr"] for g in self.inner.param_groups], dtype=torch.float64)
        rates = distributed.broadcast(rates.to(self.device)).tolist()
        for group, rate in zip(self.inner.param_groups, rates, strict=True):
            group["lr"] = rate
        self.inner.step()
        for own, members in zip(self.own, self.members, strict=True):
            own.grad = None
            parts = [torch.empty_like(own.data) for _ in range(distributed.world())]
            dist.all_gather(parts, own.data)
            _put(torch.cat(parts), members)

    def _gather(self) -> dict[int, dict[str, Any]]:
        """Steps and moments by the number of the parameter, on rank 0; {} before the first step."""
        leading, at = distributed.rank() == 0, 0
        state: dict[int, dict[str, Any]] = {}
        for own, members in zip(self.own, self.members, strict=True):
            kept = self.inner.state.get(own)
            if not kept:
                continue
            for index in range(at, at + len(members)):
                state[index] = {"step": kept["step"].clone()}
            for name in MOMENTS:
                if not leading:
                    dist.gather(kept[name])
                    continue
                parts = [torch.empty_like(kept[name]) for _ in range(distributed.world())]
                dist.gather(kept[name], parts)
                for index, value in enumerate(_cut(torch.cat(parts), members), at):
                    state[index][name] = value.clone()
            at += len(members)
        return state

    def _scatter(self, state: Mapping[int, Mapping[str, Any]] | None) -> None:
        """Each process's part of the moments in ``state``, which rank 0 alone has."""
        self._ready, at = False, 0
        steps = float(state[0]["step"]) if state else 0.0
        steps = float(distributed.broadcast(torch.tensor(steps, device=self.device)))
        self.inner.state.clear()
        for own, members in zip(self.own, self.members, strict=True):
            if not steps:
                continue
            kept: dict[str, Any] = {"step": torch.tensor(steps)}
            for name in MOMENTS:
                parts = None
                if state is not None:
                    whole = [state[i][name].flatten() for i in range(at, at + len(members))]
                    whole = self._padded(torch.cat(whole).to(own))
                    parts = [part.contiguous() for part in whole.chunk(distributed.world())]
                kept[name] = torch.empty_like(own.data)
                dist.scatter(kept[name], parts)
            self.inner.state[own] = kept
            at += len(members)


def _flat(parameters: list[nn.Parameter], *, gradients: bool = False) -> Tensor:
    """All values, or all gradients, one after the other; gradients are given up here."""
    if not gradients:
        return torch.cat([p.detach().flatten() for p in parameters])
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten()
                      for p in parameters])  # fmt: skip
    for parameter in parameters:
        parameter.grad = None
    return flat


def _cut(flat: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    """Pieces of a long vector in the parameters' shapes."""
    sizes = [p.numel() for p in parameters]
    pieces = flat[: sum(sizes)].split(sizes)
    return [piece.view_as(p) for piece, p in zip(pieces, parameters, strict=True)]


def _put(flat: Tensor, parameters: list[nn.Parameter]) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, _cut(flat, parameters), strict=True):
            parameter.copy_(value)
