"""Scores in [0, 1], larger = safer to leave; an exit fires when score > λ (strictly).

gate        the trained gate's probability of "exit"
maxprob     p₁, the largest probability of the exit's own distribution            [CALM §3.1]
margin      p₁ - p₂                                                               [CALM §3.1]
entropy     1 - H(p)/log V
saturation  (1 + cos(h_e, h_before))/2, with the stream at the exit before        [CALM §3.1]
fixed       1 at every exit: leave at the first one
oracle      1 where the emitted token equals the full model's (simulation only: an upper bound)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from workbench.errors import ConfigError, unknown_name


def maxprob(logits: Float[Tensor, "*n vocab"]) -> Float[Tensor, "*n"]:
    """The largest probability."""
    return logits.float().softmax(-1).amax(-1)


def margin(logits: Float[Tensor, "*n vocab"]) -> Float[Tensor, "*n"]:
    """The largest probability minus the second."""
    top = logits.float().softmax(-1).topk(2, dim=-1).values
    return top[..., 0] - top[..., 1]


def entropy(logits: Float[Tensor, "*n vocab"]) -> Float[Tensor, "*n"]:
    """1 - H(p)/log V: 1 for a certain distribution, 0 for the uniform one."""
    log_p = logits.float().log_softmax(-1)
    nats = -(log_p.exp() * log_p).sum(-1)
    return 1 - nats / torch.log(torch.tensor(float(logits.shape[-1])))


def saturation(
    hidden: Float[Tensor, "*n width"], before: Float[Tensor, "*n width"]
) -> Float[Tensor, "*n"]:
    """(1 + cosine)/2 between the stream here and at the exit before (the embedding at first)."""
    return (1 + F.cosine_similarity(hidden.float(), before.float(), dim=-1)) / 2


@dataclass(frozen=True)
class Criterion:
    """What a score looks at, and the function."""

    looks_at: Literal["gate", "logits", "hidden", "nothing", "answer"]
    score: Callable[..., Tensor] | None = None


CRITERIA: dict[str, Criterion] = {
    "gate": Criterion("gate"),
    "maxprob": Criterion("logits", maxprob),
    "margin": Criterion("logits", margin),
    "entropy": Criterion("logits", entropy),
    "saturation": Criterion("hidden", saturation),
    "fixed": Criterion("nothing"),
    "oracle": Criterion("answer"),
}
"""Name → criterion. Add one with `CRITERIA["mine"] = Criterion("logits", function)`."""


def get_criterion(name: str) -> Criterion:
    """The criterion of that name.

    Raises:
        ConfigError: unknown, with the nearest names.
    """
    if name not in CRITERIA:
        raise unknown_name("criterion", name, CRITERIA)
    return CRITERIA[name]


def thresholds_for(threshold: float | Sequence[float], n_exits: int) -> tuple[float, ...]:
    """One threshold per exit; λ ≥ 1 never leaves, λ < 0 always does.

    Raises:
        ConfigError: a vector of another length, or NaN.
    """
    given = [threshold] if isinstance(threshold, (int, float)) else list(threshold)
    values = given * n_exits if len(given) == 1 else given
    if len(values) != n_exits:
        raise ConfigError(
            f"{len(values)} thresholds for {n_exits} exits; give one for all or one per exit"
        )
    if any(v != v for v in values):
        raise ConfigError(f"thresholds {values}: not a number")
    return tuple(float(v) for v in values)
