"""The entropy floor: what a perfect model of the grammar would still pay per token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from workbench.microworld.sampling import Sample, total_logp

if TYPE_CHECKING:
    from workbench.microworld.sampling import World


def floor_of(samples: list[Sample]) -> float:
    """Mean of -log p per token over given samples, the closing `</s>` counted as a token.

    Reported beside a model's loss on the *same* samples, the difference is an unbiased estimate of
    the model's divergence from the grammar, KL(grammar ‖ model) / token.
    """
    return -total_logp(samples) / sum(len(sample.words) + 1 for sample in samples)


def entropy_floor(
    world: World, kind: str, *, n: int = 2000, split: str = "test", start: int = 0, **options: Any
) -> float:
    """Nats per token of a kind of text, from the exact probabilities of `n` samples.

    Each sample's probability is exact; the mean over samples has a standard error of about
    .003 nats per token at n = 2000.
    """
    indices = range(start, start + n)
    return floor_of([world.sample(kind, index, split, **options) for index in indices])  # type: ignore[arg-type]
