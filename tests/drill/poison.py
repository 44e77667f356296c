"""Non-finite numbers put into a running job: called in the fork, before the script begins.

Each function patches one place of the real code; what must stop them is that code itself.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from workbench import storage
from workbench.errors import DivergedError

VALUES = {"nan": float("nan"), "inf": float("inf")}


def training(kind: str, value: str, phase: str, step: int, witness: str) -> None:
    """At the first backward pass of that step: the loss alone, or one entry of one gradient.

    The state of the loop at the moment of the error is written to the folder `witness`.
    """
    import torch

    from workbench.run import Run

    now: dict[str, Any] = {"step": 0, "phase": "", "struck": False}
    real_steps, real_backward, real_check = Run.steps, torch.Tensor.backward, Run.require_finite

    def steps(this: Any, total: int, state: Any, **options: Any) -> Any:
        now["state"] = state
        for n in real_steps(this, total, state, **options):
            now["step"], now["phase"] = n, this.phase
            yield n

    def backward(this: Any, *arguments: Any, **options: Any) -> None:
        due = (now["phase"], now["step"]) == (phase, step) and not now["struck"]
        real_backward(this, *arguments, **options)
        if due:
            now["struck"] = True
            target = this.data if kind == "loss" else _leaf(this.grad_fn).grad
            target.view(-1)[0] = VALUES[value]

    def require_finite(this: Any, *arguments: Any, **options: Any) -> None:
        try:
            real_check(this, *arguments, **options)
        except DivergedError:
            state = {name: dict(thing.state_dict()) for name, thing in now["state"].items()}
            storage.save_tree(Path(witness), state)
            raise

    Run.steps, Run.require_finite = steps, require_finite
    torch.Tensor.backward = backward


def _leaf(node: Any) -> Any:
    """A parameter that the graph below `node` leads to."""
    waiting, seen = [node], set()
    while waiting:
        here = waiting.pop(0)
        if here is None or here in seen:
            continue
        seen.add(here)
        if hasattr(here, "variable"):
            return here.variable
        waiting += [below for below, _ in here.next_functions]
    raise AssertionError("no parameter in this graph")


def weights(value: str) -> None:
    """One weight of the last block of the loaded model."""
    import torch

    from workbench import models

    real = models.load_model

    def load_model(*arguments: Any, **options: Any) -> Any:
        model, tokenizer = real(*arguments, **options)
        matrices = [p for p in model.parameters() if p.ndim == 2]
        with torch.no_grad(), contextlib.suppress(IndexError):
            matrices[-3].view(-1)[0] = VALUES[value]
        return model, tokenizer

    models.load_model = load_model


def hessians(value: str) -> None:
    """One entry of one collected Hessian."""
    from lplr_q.activation_aware import hessian

    real = hessian.collect_hessians

    def collect_hessians(*arguments: Any, **options: Any) -> Any:
        found = real(*arguments, **options)
        next(iter(found.moments.values())).centred[0, 0] = VALUES[value]
        return found

    hessian.collect_hessians = collect_hessians


def tracker(bad: str, how: str) -> None:
    """A wandb whose call `bad` raises or hangs."""
    import sys
    import threading
    import types

    module: Any = types.ModuleType("wandb")

    def call(name: str) -> Any:
        def act(*arguments: Any, **options: Any) -> Any:
            if name == bad and how == "raises":
                raise ConnectionError(f"{name} failed")
            if name == bad and how == "hangs":
                threading.Event().wait(60)
            return module

        return act

    for name in ("init", "log", "finish"):
        setattr(module, name, call(name))
    sys.modules["wandb"] = module


def small_files(limit: int) -> None:
    """No file of this process can grow beyond `limit` bytes, as on a full disk or quota."""
    import resource
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def features(value: str) -> None:
    """One entry of the features that the adaptors learn from."""
    from sdm import estimator

    real = estimator.as_features

    def as_features(x: Any) -> Any:
        x = x.clone()
        x[3, 1] = VALUES[value]
        return real(x)

    estimator.as_features = as_features
