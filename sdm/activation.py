"""The SDM activation and its loss as pure functions.

Glossary (code name: symbol of the paper)
    similarity q    length of the prefix of agreeing nearest training points, >= 0
    distance   d    quantile of the nearest-neighbour distance, in [0, 1]
    magnitude  z'   logits of the adaptor
    output     sdm  probabilities of the activation
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

SOFTMAX_SIMILARITY = math.e - 2
"""With q = e - 2 and d = 1 the activation is the softmax; training starts there."""


def log_sdm(
    logits: Float[Tensor, "*batch classes"],
    similarity: Float[Tensor, "*batch"],
    distance: Float[Tensor, "*batch"],
) -> Float[Tensor, "*batch classes"]:
    """Natural logarithm of the SDM activation.

    ln sdm(z')_i = log_softmax(ln(2+q) · d · z')_i        [SDM Activations]

    The power is never formed, so the gradient of a confident mistake does not vanish: a mistake
    with margin 5, q = 1000 and d = 1 has slope 1 (a clipped loss has 1e-8 there).
    """
    scale = torch.log(2 + similarity) * distance
    return torch.log_softmax(scale.unsqueeze(-1) * logits, dim=-1)


def sdm(
    logits: Float[Tensor, "*batch classes"],
    similarity: Float[Tensor, "*batch"],
    distance: Float[Tensor, "*batch"],
) -> Float[Tensor, "*batch classes"]:
    """Probabilities that grow with similarity, distance quantile and magnitude.

    sdm(z')_i = (2+q)^(d z'_i) / Σ_c (2+q)^(d z'_c)

    q = e − 2 and d = 1 give the softmax, d = 0 the uniform distribution; for d > 0 the argmax is
    that of the logits.

    >>> sdm(torch.tensor([[2.0, -1.0]]), torch.tensor([0.0]), torch.tensor([1.0]))
    tensor([[0.8889, 0.1111]])
    """
    return log_sdm(logits, similarity, distance).exp()


def sdm_loss(
    logits: Float[Tensor, "*batch classes"],
    labels: Int[Tensor, "*batch"],
    similarity: Float[Tensor, "*batch"],
    distance: Float[Tensor, "*batch"],
) -> Float[Tensor, "*batch"]:
    """Negative logarithm in base 2+q of the probability of the label, one number per point.

    L_n = −log_{2+q_n} sdm(z'_n)_{y_n}

    The base equals the one of the activation, so a wrong margin m costs about d·m whatever q is.
    """
    chosen = log_sdm(logits, similarity, distance).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return -chosen / torch.log(2 + similarity)


def rescaled_similarity(
    similarity: Float[Tensor, "*batch"], probability: Float[Tensor, "*batch"]
) -> Float[Tensor, "*batch"]:
    """Similarity damped by the probability of the predicted class.

    q' = min(q, (2+q)^sdm_ŷ)        [Activations, version 2]

    >>> rescaled_similarity(torch.tensor([20.0]), torch.tensor([0.5]))
    tensor([4.6904])
    """
    return torch.minimum(similarity, torch.exp(probability * torch.log(2 + similarity)))
