"""Workers for independent units: in this process, or processes that take turns at the devices.

Every worker computes with the same number of threads, so results do not depend on how many there
are. Workers end when their parent does, however it ends.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lplr_q.activation_aware.hessian import Calibration, load_hessians
from lplr_q.weights import FolderWeights, ModuleWeights, TensorWeights, Weights
from workbench.device import require_device
from workbench.errors import ConfigError

if TYPE_CHECKING:
    from lplr_q.quantize_model import Group, Job

_DEVICE = "cpu"  # of this worker process, set once when it starts


@dataclass(frozen=True)
class Pool:
    """``workers`` processes over ``devices``; one worker and one device stay in this process."""

    workers: int = 1
    devices: Sequence[str] = ("cpu",)
    threads: int = 1

    def __post_init__(self) -> None:
        if self.workers < 1 or not self.devices or self.threads < 1:
            raise ConfigError(
                f"workers={self.workers}, devices={list(self.devices)}, threads={self.threads}: "
                "each needs at least one"
            )
        for device in self.devices:
            require_device(device)

    def run(
        self,
        job: Job,
        groups: Sequence[Group],
        weights: ModuleWeights | FolderWeights,
        calibration: Calibration | Path,
        progress: Callable[[Iterable], Iterator] = iter,
    ) -> list[Group]:
        """Do all groups; returns those that another process holds."""
        if max(self.workers, len(self.devices)) == 1 or len(groups) == 1:
            return self._here(job, groups, weights, calibration, progress)
        return self._apart(job, groups, weights, calibration, progress)

    def _here(
        self, job: Job, groups: Any, weights: Weights, calibration: Any, progress: Any
    ) -> list[Group]:
        busy = []
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            known = load_hessians(calibration) if isinstance(calibration, Path) else calibration
            for group in progress(groups):
                if not job.compress(group, weights, known, self.devices[0]):
                    busy.append(group)
        finally:
            torch.set_num_threads(before)
        return busy

    def _apart(
        self, job: Job, groups: Any, weights: Weights, calibration: Any, progress: Any
    ) -> list[Group]:
        context = multiprocessing.get_context("spawn")
        count = max(self.workers, len(self.devices))
        devices = context.SimpleQueue()
        for i in range(count):
            devices.put(self.devices[i % len(self.devices)])
        executor = ProcessPoolExecutor(
            min(count, len(groups)), context, _start, (devices, self.threads)
        )
        running: dict[Future, Group] = {}
        busy: list[Group] = []
        try:
            for group in progress(groups):
                if len(running) >= 2 * count:  # bounds what is in flight
                    _collect(running, busy)
                sent = _sent(group, weights, calibration)
                running[executor.submit(_work, job, group, *sent)] = group
            while running:
                _collect(running, busy)
        finally:
            executor.shutdown(wait=True, cancel_futures=True)
        return busy


def _sent(group: Group, weights: Weights, calibration: Any) -> tuple[Weights, Any]:
    """What a worker gets: references where it can read for itself, else the tensors."""
    if not isinstance(weights, FolderWeights):
        weights = TensorWeights({name: weights(name).clone() for name in group.names})
    if isinstance(calibration, Calibration):
        key_of = dict.fromkeys(group.names, group.key)
        calibration = Calibration({group.key: calibration.moments[group.key]}, key_of)
    return weights, calibration


def _collect(running: dict[Future, Group], busy: list[Group]) -> None:
    done, _ = wait(running, return_when=FIRST_COMPLETED)
    for future in done:
        group = running.pop(future)
        if not future.result():
            busy.append(group)


def _start(devices: Any, threads: int) -> None:
    """First thing in a worker: device, threads, and a watch over the parent."""
    global _DEVICE
    _DEVICE = devices.get()
    torch.set_num_threads(threads)
    if _DEVICE.startswith("cuda"):
        torch.cuda.set_device(_DEVICE)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _work(job: Job, group: Group, weights: Weights, calibration: Any) -> bool:
    if isinstance(calibration, Path):
        calibration = load_hessians(calibration)
    return job.compress(group, weights, calibration, _DEVICE)
