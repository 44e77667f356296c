"""The two short trainings on cached states: translators (if the emission is affine), then gates."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from early_exit.adapters.base import Adapter
from early_exit.features import labels, measure, residual
from early_exit.heads import Exits, Gates
from workbench.errors import DataError
from workbench.optim import clip, cosine_schedule
from workbench.run import Run

WEIGHTINGS = ("uniform", "wsum")
"""Weight of exit i = 1..n in the loss: 1/n, or i/Σj (later exits more, as published)."""


def exit_weights(n_exits: int, weighting: str) -> torch.Tensor:
    """Weights that add up to 1; .1, .2, .3, .4 for four exits under `wsum`."""
    raw = torch.arange(1.0, n_exits + 1) if weighting == "wsum" else torch.ones(n_exits)
    return raw / raw.sum()


def fit_translators(
    run: Run,
    adapter: Adapter,
    exits: Exits,
    features: dict[str, Any],
    *,
    steps: int,
    batch: int = 256,
    learning_rate: float = 4e-3,
    save_every: int = 100,
) -> None:
    """Distil the full model's distribution into each exit: mean KL(p_{L-1} ‖ p_e)."""
    translators = exits.translators
    assert translators is not None
    h, final = residual(adapter, features), features["final"]
    optimizer = torch.optim.AdamW(translators.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = cosine_schedule(optimizer, steps, warmup_steps=min(20, steps // 5))
    state = {"model": translators, "optimizer": optimizer, "schedule": schedule}
    for step in run.steps(steps, state, save_every=save_every, phase="translators"):
        pick = torch.from_numpy(run.streams("translators", index=step).integers(len(h), size=batch))
        with torch.no_grad():
            target = adapter.logits(final[pick].to(adapter.device)).log_softmax(-1)
        guess = adapter.logits(translators(h[pick].to(adapter.device))).log_softmax(-1)
        target = target[:, None].expand_as(guess)
        loss = F.kl_div(guess, target, log_target=True, reduction="none").sum(-1).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = clip(translators.parameters(), 0)
        run.require_finite(step, {"rows": pick}, loss=loss, gradient_norm=norm)
        optimizer.step()
        schedule.step()
        if step % 10 == 0 or step == steps:
            run.log(step, {"translators/kl_nats": loss.detach()})
    translators.requires_grad_(False)


def fit_gates(
    run: Run,
    adapter: Adapter,
    exits: Exits,
    features: dict[str, Any],
    *,
    steps: int,
    topk: int,
    weighting: str = "uniform",
    batch: int = 2048,
    learning_rate: float = 0.02,
    save_every: int = 100,
) -> dict[str, Any]:
    """Fit all gates at once: Σ_e w_e CE(g_e(x_e), q_e); returns the measures of the training text.

    Inputs are standardised per channel while fitting and the scaling is folded into the gates.

    Raises:
        DataError: an exit's labels are all equal on the training text.
    """
    measures = measure(adapter, exits, features, watch=run.progress)
    target = labels(measures, topk)
    share = target.float().mean(0)
    if len(target) < 2:
        raise DataError("fewer than two training tokens; raise --train-tokens")
    x = features["x"]
    mean, scale = x.mean(0), x.std(0).clamp_min(1e-6)
    gates = Gates(*exits.gates.weight.shape[::2])
    gates.bias.data[:, 1] = torch.logit(share.clamp(0.01, 0.99))
    weights = exit_weights(len(exits.exits), weighting)
    optimizer = torch.optim.AdamW(gates.parameters(), lr=learning_rate, weight_decay=1e-4)
    schedule = cosine_schedule(optimizer, steps, floor=0.02)
    state = {"model": gates, "optimizer": optimizer, "schedule": schedule}
    for step in run.steps(steps, state, save_every=save_every, phase="gates"):
        pick = torch.from_numpy(run.streams("gates", index=step).integers(len(x), size=batch))
        logits = gates((x[pick] - mean) / scale)
        each = F.cross_entropy(logits.transpose(1, 2), target[pick], reduction="none").mean(0)
        loss = (weights * each).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = clip(gates.parameters(), 0)
        run.require_finite(step, {"rows": pick}, loss=loss, gradient_norm=norm)
        optimizer.step()
        schedule.step()
        if step % 10 == 0 or step == steps:
            run.log(step, {"gates/loss_nats": loss.detach()})
    folded = gates.folded(mean, scale)
    with torch.no_grad():
        exits.gates.weight.copy_(folded.weight)
        exits.gates.bias.copy_(folded.bias)
    exits.requires_grad_(False)
    measures["gate"] = exits.gates.scores(x)
    return measures
