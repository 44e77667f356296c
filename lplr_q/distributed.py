"""Several processes under ``torchrun``; nothing at all without it.

    torchrun --nproc-per-node 2 -m lplr_q.save_hessians --model micro-mistral

Every function is safe in a single process: rank 0 of a world of 1, sums that stay as they are.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from workbench.errors import ConfigError
from workbench.run import Run

Item = TypeVar("Item")
TIMEOUT = timedelta(hours=12)
"""Others wait as long while rank 0 compresses or judges a model; a process that dies is noticed by
the launcher at once."""
_BY_ITSELF: ContextVar[bool] = ContextVar("lplr_q.distributed.by_itself", default=False)


def under_torchrun() -> bool:
    """Whether this process was started as one of several by torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def active() -> bool:
    """Whether a process group exists, and this is no work by itself (:func:`by_itself`)."""
    return dist.is_available() and dist.is_initialized() and not _BY_ITSELF.get()


@contextmanager
def by_itself() -> Iterator[None]:
    """In it this process is rank 0 of a world of 1: for what one does while the others wait."""
    before = _BY_ITSELF.set(True)
    try:
        yield
    finally:
        _BY_ITSELF.reset(before)


def init(device: torch.device | str = "cpu") -> bool:
    """Join the group that torchrun's environment describes; False (and nothing) without torchrun.

    NCCL for CUDA devices (each local rank takes its own), gloo otherwise.

    Raises:
        ConfigError: the environment is incomplete, or torch was built without distribution.
    """
    if active() or not under_torchrun():
        return active()
    if not dist.is_available():
        raise ConfigError("this torch was built without torch.distributed; run a single process")
    missing = [k for k in ("MASTER_ADDR", "MASTER_PORT") if k not in os.environ]
    if missing:
        raise ConfigError(f"WORLD_SIZE is set but not {', '.join(missing)}; start with torchrun")
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.set_device(local_rank())
    dist.init_process_group("nccl" if cuda else "gloo", timeout=TIMEOUT)
    return True


def cleanup() -> None:
    """Leave the group."""
    if active():
        dist.destroy_process_group()


@contextmanager
def group(device: torch.device | str = "cpu") -> Iterator[int]:
    """:func:`init` on entry, :func:`cleanup` on exit; yields the rank."""
    mine = not active() and init(device)
    try:
        yield rank()
    finally:
        if mine:
            cleanup()


def rank() -> int:
    """Number of this process, 0 when alone."""
    return dist.get_rank() if active() else 0


def world() -> int:
    """Number of processes."""
    return dist.get_world_size() if active() else 1


def local_rank() -> int:
    """Number of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0")) if under_torchrun() else 0


def barrier() -> None:
    """Wait for all."""
    if active():
        dist.barrier()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if active():
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def broadcast(tensor: Tensor, source: int = 0) -> Tensor:
    """The tensor of rank ``source``, in place."""
    if active():
        dist.broadcast(tensor, source)
    return tensor


def announce(number: int, device: torch.device | str = "cpu") -> int:
    """The number that rank 0 gives."""
    return int(broadcast(torch.tensor([number], device=device))) if world() > 1 else number


def sharded() -> bool:
    """Whether ``accelerate launch`` was told to spread gradients and optimiser state: DeepSpeed's
    ZeRO stage 1 or 2, FSDP without resharding after the forward pass.

    Raises:
        ConfigError: it was told to spread the parameters as well.
    """
    if world() == 1:
        return False
    said = os.environ.get
    deepspeed = said("ACCELERATE_USE_DEEPSPEED") == "true"
    stage = int(said("ACCELERATE_DEEPSPEED_ZERO_STAGE", "0")) if deepspeed else 0
    if said("ACCELERATE_USE_FSDP") == "true":
        if said("FSDP_VERSION", "1") == "1":
            named = said("FSDP_SHARDING_STRATEGY", "FULL_SHARD")
            stage = {"NO_SHARD": 0, "3": 0, "SHARD_GRAD_OP": 2, "2": 2}.get(named, 3)
        else:
            stage = 2 if said("FSDP_RESHARD_AFTER_FORWARD", "true") == "false" else 3
    if stage > 2:
        raise ConfigError(
            "parameters cannot be spread over processes: each holds the codes of the whole model; "
            "use ZeRO stage 2, or FSDP with fsdp_reshard_after_forward: false (SHARD_GRAD_OP)"
        )
    return stage > 0


def all_agree(flag: bool) -> bool:
    """Whether it is true on every process."""
    if not active():
        return flag
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    count = all_reduce_sum(torch.tensor([int(flag)], device=device))
    return int(count) == world()


def mine(items: Sequence[Item]) -> list[Item]:
    """Every world-th item beginning with this rank's: all processes together see each once."""
    return list(items[rank() :: world()])


def own_run(script: str, experiment: Any) -> Any:
    """The experiment with a run folder of this rank's own (``<folder>.rank1``); rank 0 keeps its.

    A run folder is locked by one process, so each rank records into its own.
    """
    if rank() == 0:
        return experiment
    name = f"{Run.open(script, experiment).directory.name}.rank{rank()}"
    return dataclasses.replace(experiment, run=dataclasses.replace(experiment.run, name=name))
