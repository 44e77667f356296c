"""Several processes under ``torchrun``; nothing at all without it.

    torchrun --nproc-per-node 2 -m lplr_q.save_hessians --model micro-mistral

Every function is safe in a single process: rank 0 of a world of 1, sums that stay as they are.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from workbench.errors import ConfigError
from workbench.run import Run

Item = TypeVar("Item")
TIMEOUT = timedelta(minutes=30)


def under_torchrun() -> bool:
    """Whether this process was started as one of several by torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def active() -> bool:
    """Whether a process group exists."""
    return dist.is_available() and dist.is_initialized()


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
