"""A mirror of metrics.jsonl in Weights & Biases that can never harm the run.

Everything that touches the service happens in a thread of its own behind a bounded queue. If
starting, logging or finishing raises or hangs, one warning is written and the run goes on; at the
end it waits at most two seconds. Without login (no WANDB_API_KEY, no netrc entry) it works offline,
in the run's folder, for `wandb sync` later; WANDB_MODE is respected.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from workbench.engines import need

CLOSE_SECONDS = 2.0
"""Longest wait for the service at the end of a run."""
QUEUE_LENGTH = 10_000
"""Metrics that may wait for a slow service; later ones are dropped, with the warning."""

_log = logging.getLogger("fivefold.wandb")


def wandb_mode() -> str:
    """WANDB_MODE if set, else "online" with a login and "offline" without."""
    if mode := os.environ.get("WANDB_MODE"):
        return mode
    if os.environ.get("WANDB_API_KEY"):
        return "online"
    try:
        home = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
        known = "wandb" in home.read_text(encoding="utf-8", errors="replace")
    except (OSError, RuntimeError):
        known = False
    return "online" if known else "offline"


class Tracker:
    """`log(step, metrics)` and `close()`, both immediate; the service runs behind them."""

    def __init__(self, wandb: ModuleType, settings: dict[str, Any]):
        self._wandb = wandb
        self._settings = settings
        self._queue: queue.Queue[tuple[int, dict[str, Any]] | None] = queue.Queue(QUEUE_LENGTH)
        self._failed = threading.Event()
        self._warn_lock = threading.Lock()
        self._warned = False
        self._thread = threading.Thread(target=self._work, name="wandb mirror", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Queues the metrics of one step."""
        if self._failed.is_set():
            return
        try:
            self._queue.put_nowait((int(step), dict(metrics)))
        except queue.Full:
            self._give_up(f"{QUEUE_LENGTH} metrics are waiting")

    def close(self) -> None:
        """Finishes the mirror, within two seconds."""
        until = time.monotonic() + CLOSE_SECONDS
        if not self._failed.is_set():
            try:
                self._queue.put(None, timeout=CLOSE_SECONDS)
            except queue.Full:
                self._give_up(f"{QUEUE_LENGTH} metrics are waiting")
                return
        self._thread.join(max(0.0, until - time.monotonic()))
        if self._thread.is_alive():
            self._give_up(f"it did not finish within {CLOSE_SECONDS:g} s")

    def _give_up(self, why: str) -> None:
        self._failed.set()
        with self._warn_lock:
            if self._warned:
                return
            self._warned = True
        _log.warning("the wandb mirror stopped (%s); metrics.jsonl has everything", why)

    def _work(self) -> None:
        try:
            run = self._wandb.init(**self._settings)
            while not self._failed.is_set():
                entry = self._queue.get()
                if entry is None:
                    run.finish()
                    return
                step, metrics = entry
                run.log(metrics, step=step)
        except BaseException as error:  # whatever it raises stays in this thread
            first = (str(error).strip().splitlines() or [""])[0][:200]
            self._give_up(f"{type(error).__name__}: {first}")


def start_tracker(
    project: str, name: str, config: Mapping[str, Any], directory: Path | str
) -> Tracker:
    """A mirror of one run, started in the background.

    Raises:
        MissingExtra: wandb is not installed.
    """
    wandb = need("wandb", feature="--wandb")
    settings: dict[str, Any] = {
        "project": project,
        "name": name,
        "config": dict(config),
        "dir": str(directory),
        "mode": wandb_mode(),
        "settings": {"console": "off", "silent": True},
    }
    return Tracker(wandb, settings)
