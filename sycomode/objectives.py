"""Objectives that pull a student without the prompt towards a teacher with it; pure functions.

Glossary: `S` student logits, `T` teacher logits, both (batch, time, vocab) and aligned so that
entry t predicts token t of the conversation; `mask` (batch, time) is 1 where a position is
supervised; `tau` is the temperature. Every loss is a mean over the supervised positions, in nats
per token, so the loss of a padded batch is the token-weighted mean of the losses of its rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from workbench.errors import ConfigError

_LEAST_TAIL = (
    1e-7  # probability below which the rest class is held, so that its logarithm is finite
)


@dataclass(frozen=True)
class Targets:
    """Teacher distributions per position: whole, or the `k` best (`ids`) and a rest (`tail`).

    All are log-probabilities at the temperature they were made for.
    """

    logp: Float[Tensor, "batch time k"]
    ids: Int[Tensor, "batch time k"] | None = None
    tail: Float[Tensor, "batch time"] | None = None

    def rows(self, index: Int[Tensor, " some"]) -> Targets:
        """The targets of some rows of the batch."""
        ids = None if self.ids is None else self.ids[index]
        tail = None if self.tail is None else self.tail[index]
        return Targets(self.logp[index].float(), ids, None if tail is None else tail.float())


def masked_mean(
    values: Float[Tensor, "batch time"], mask: Float[Tensor, "batch time"]
) -> Float[Tensor, ""]:
    """Mean of `values` over the positions where `mask` is 1; 0 if there is none."""
    return (values * mask).sum() / mask.sum().clamp_min(1.0)


def cross_entropy(
    logits: Float[Tensor, "batch time vocab"],
    ids: Int[Tensor, "batch time"],
    mask: Float[Tensor, "batch time"],
) -> Float[Tensor, ""]:
    """Negative log-likelihood of the tokens, −1/|A| Σ log S_t(y_t), one shift only.

    On the prompt's own text this is the baseline `causal_language_model`; on sampled conversations
    it is `sft_selfstudy`, a one-sample estimate of the soft cross-entropy.
    """
    nats = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view_as(ids)
    return masked_mean(nats, mask)


def forward_kl(
    student: Float[Tensor, "batch time vocab"],
    teacher: Float[Tensor, "batch time vocab"],
    mask: Float[Tensor, "batch time"],
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """τ²/|A| Σ_t KL(T_t ‖ S_t), both softened by τ; its gradient at τ=1 is softmax(S) − softmax(T).

    The factor τ² keeps the gradient of the same order for every τ        [Hinton et al. 2015, §2]
    """
    t, s = _soften(teacher, temperature), _soften(student, temperature)
    return temperature**2 * masked_mean(_kl(t, s), mask)


def reverse_kl(
    student: Float[Tensor, "batch time vocab"],
    teacher: Float[Tensor, "batch time vocab"],
    mask: Float[Tensor, "batch time"],
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """τ²/|A| Σ_t KL(S_t ‖ T_t): prefers a mode of the teacher to its whole spread."""
    t, s = _soften(teacher, temperature), _soften(student, temperature)
    return temperature**2 * masked_mean(_kl(s, t), mask)


def generalised_jsd(
    student: Float[Tensor, "batch time vocab"],
    teacher: Float[Tensor, "batch time vocab"],
    mask: Float[Tensor, "batch time"],
    beta: float = 0.5,
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """β KL(T‖M) + (1−β) KL(S‖M) with M = βT + (1−β)S            [GKD, arXiv 2306.13649, eq. 1]

    Symmetric in T and S at β = ½. Divided by β it tends to KL(T‖S) as β → 0, divided by 1−β to
    KL(S‖T) as β → 1; the two ends are these limits themselves: β = 0 gives forward and β = 1
    reverse KL.
    """
    if not 0.0 <= beta <= 1.0:
        raise ConfigError(f"beta={beta} of the Jensen-Shannon objective must lie in [0, 1]")
    if beta == 0.0:
        return forward_kl(student, teacher, mask, temperature)
    if beta == 1.0:
        return reverse_kl(student, teacher, mask, temperature)
    t, s = _soften(teacher, temperature), _soften(student, temperature)
    log_beta = torch.log(torch.tensor(beta, dtype=t.dtype, device=t.device))
    log_rest = torch.log1p(torch.tensor(-beta, dtype=t.dtype, device=t.device))
    mixture = torch.logaddexp(t + log_beta, s + log_rest)
    value = beta * _kl(t, mixture) + (1.0 - beta) * _kl(s, mixture)
    return temperature**2 * masked_mean(value, mask)


def compress(
    logits: Float[Tensor, "batch time vocab"], k: int = 0, temperature: float = 1.0
) -> Targets:
    """Teacher targets as they are stored: whole for k = 0, else the k best and the log of the rest.

    r = log(1 − Σ_i e^{T(v_i)}), by log1p(−exp(logsumexp)).  20 ids and values and a rest take 122
    bytes per token where a whole distribution over 128k words takes 256 kB.
    """
    logp = _soften(logits, temperature)
    if k <= 0:
        return Targets(logp)
    best, ids = logp.topk(min(k, logp.shape[-1]), dim=-1)
    return Targets(best, ids, _log_rest(best))


def topk_tail_kl(
    student: Float[Tensor, "batch time vocab"],
    targets: Targets,
    mask: Float[Tensor, "batch time"],
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """KL to stored targets: Σ_i e^{T_i}(T_i − S_i) + e^r (r − log(1 − Σ_i e^{S_i})), times τ².

    The rest is one class, so by the data-processing inequality this never exceeds the full KL; it
    grows with k and is exact for k = V. Without the last term the student could put any mass
    outside the k.
    """
    logp = _soften(student, temperature)
    if targets.ids is None or targets.tail is None:
        return temperature**2 * masked_mean(_kl(targets.logp, logp), mask)
    at_ids = logp.gather(-1, targets.ids)
    nats = _kl(targets.logp, at_ids)
    if targets.ids.shape[-1] < logp.shape[-1]:  # with k = V nothing is left over
        nats = nats + targets.tail.exp() * (targets.tail - _log_rest(at_ids))
    return temperature**2 * masked_mean(nats, mask)


def hidden_last(
    student: Sequence[Float[Tensor, "batch width"]], teacher: Sequence[Float[Tensor, "batch width"]]
) -> Float[Tensor, ""]:
    """Mean squared difference of the last layer at one position: a baseline."""
    return F.mse_loss(student[-1], teacher[-1])


def hidden_all(
    student: Sequence[Float[Tensor, "batch width"]], teacher: Sequence[Float[Tensor, "batch width"]]
) -> Float[Tensor, ""]:
    """Mean of 1 − cos(h_S, h_T) over the layers 1…L at one position.

    Layer 0 is left out: it is the embedding of the input token, which differs by construction.
    """
    pairs = list(zip(student, teacher, strict=True))[1:]
    cosines = [F.cosine_similarity(s, t, dim=-1).mean() for s, t in pairs]
    return 1.0 - torch.stack(cosines).mean()


def _soften(logits: Tensor, temperature: float) -> Tensor:
    exact = logits if logits.dtype == torch.float64 else logits.float()
    return torch.log_softmax(exact / temperature, dim=-1)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return (p.exp() * (p - q)).sum(-1)


def _log_rest(logp: Tensor) -> Tensor:
    taken = torch.logsumexp(logp, -1).clamp(max=0.0)
    return torch.log1p(-taken.exp().clamp(max=1.0 - _LEAST_TAIL))
