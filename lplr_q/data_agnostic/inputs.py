"""What the demonstrations compress: a phantom, labelled feature vectors, hidden states, weights.

Everything is made in code from a generator; a picture or model of one's own can be given instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from workbench.errors import ConfigError, DataError

# intensity, half axes a and b, centre x and y, angle in degrees
SHEPP_LOGAN = (
    (1.0, 0.69, 0.92, 0.0, 0.0, 0.0),
    (-0.8, 0.6624, 0.874, 0.0, -0.0184, 0.0),
    (-0.2, 0.11, 0.31, 0.22, 0.0, -18.0),
    (-0.2, 0.16, 0.41, -0.22, 0.0, 18.0),
    (0.1, 0.21, 0.25, 0.0, 0.35, 0.0),
    (0.1, 0.046, 0.046, 0.0, 0.1, 0.0),
    (0.1, 0.046, 0.046, 0.0, -0.1, 0.0),
    (0.1, 0.046, 0.023, -0.08, -0.605, 0.0),
    (0.1, 0.023, 0.023, 0.0, -0.606, 0.0),
    (0.1, 0.023, 0.046, 0.06, -0.605, 0.0),
)


def shepp_logan(size: int) -> Float[Tensor, "size size"]:
    """The head phantom: ten ellipses on [-1, 1]^2, values 0 to 1, first row on top.

    Axes and centres of Shepp & Logan 1974, Table 1, with the higher contrast of Toft 1996,
    Table B.3.

    >>> float(shepp_logan(65)[32, 32].round(decimals=6))
    0.2
    """
    if size < 8:
        raise ConfigError(f"size={size} pixels; a phantom needs at least 8")
    x = torch.linspace(-1, 1, size, dtype=torch.float64)
    grid_y, grid_x = torch.meshgrid(-x, x, indexing="ij")
    image = torch.zeros(size, size, dtype=torch.float64)
    for intensity, a, b, x0, y0, degrees in SHEPP_LOGAN:
        angle = np.deg2rad(degrees)
        u = (grid_x - x0) * np.cos(angle) + (grid_y - y0) * np.sin(angle)
        v = (grid_y - y0) * np.cos(angle) - (grid_x - x0) * np.sin(angle)
        image += intensity * ((u / a) ** 2 + (v / b) ** 2 <= 1)
    return image.clamp(0, 1).float()


def read_image(path: Path) -> Float[Tensor, "height width"]:
    """A picture file as grey values in [0, 1] (ITU-R BT.601 luma of colours, alpha ignored).

    Raises:
        DataError: no such file, or no picture.
    """
    from matplotlib.image import imread

    if not path.is_file():
        raise DataError(f"{path}: no such picture; give the path of a PNG file")
    try:
        pixels = np.asarray(imread(path))
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{path}: no picture that can be read ({str(error)[:200]})") from None
    scaled = pixels / 255.0 if pixels.dtype == np.uint8 else pixels
    if scaled.ndim == 3 and scaled.shape[2] >= 3:
        scaled = scaled[..., :3] @ np.array([0.299, 0.587, 0.114])
    elif scaled.ndim == 3:
        scaled = scaled[..., 0]
    return torch.tensor(np.ascontiguousarray(scaled), dtype=torch.float32)


def power_law_matrix(
    n: int, d: int, exponent: float, generator: torch.Generator
) -> Float[Tensor, "n d"]:
    """Random singular vectors, singular values (1 + i)^-exponent."""
    k = min(n, d)
    left = torch.linalg.qr(torch.randn(n, k, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(d, k, generator=generator)).Q
    values = torch.arange(1, k + 1, dtype=torch.float32) ** -exponent
    return (left * values) @ right.T


@dataclass(frozen=True)
class Embeddings:
    """Vectors with labels: those that are stored compressed, and those that ask."""

    stored: Float[Tensor, "n d"]
    labels: Int64[Tensor, " n"]
    queries: Float[Tensor, "q d"]
    query_labels: Int64[Tensor, " q"]
    classes: str
    """What the labels are, for the tables."""


def mixture_embeddings(
    n: int,
    queries: int,
    generator: torch.Generator,
    *,
    d: int = 256,
    classes: int = 10,
    spread: float = 0.23,
) -> Embeddings:
    """Features as of an image classifier: ten classes, a Gaussian mixture.

    x = spread mu_c + T z: class means mu_c and noise z are standard normal, T has random
    directions and singular values (1 + i)^-1/2, so that few directions carry most of the variance.
    Means lie in the stronger half of the directions.
    """
    basis = torch.linalg.qr(torch.randn(d, d, generator=generator)).Q
    scales = torch.arange(1, d + 1, dtype=torch.float32) ** -0.5
    means = torch.randn(classes, d, generator=generator) * scales.sqrt() * spread
    means[:, d // 2 :] = 0
    labels = torch.randint(0, classes, (n + queries,), generator=generator)
    noise = torch.randn(n + queries, d, generator=generator) * scales
    points = (means[labels] + noise) @ basis.T
    return Embeddings(points[:n], labels[:n], points[n:], labels[n:], f"{classes} classes")


def hidden_state_embeddings(
    model: Any, tokenizer: Any, texts: list[str], n: int, queries: int, length: int = 64
) -> Embeddings:
    """Last hidden states of a language model, each labelled with the token that follows it.

    A vote of the neighbours is then a language model of its own [Khandelwal et al. 2020].

    Raises:
        DataError: too little text for ``n + queries`` tokens.
    """
    from workbench.text import pack_blocks

    wanted = -(-(n + queries) // (length - 1))
    blocks = pack_blocks(tokenizer, texts, length)
    if len(blocks) < wanted:
        raise DataError(
            f"the text fills {len(blocks)} blocks of {length} tokens; {n} stored vectors and "
            f"{queries} queries need {wanted}: give more text or ask for fewer"
        )
    device = next(model.parameters()).device
    states, labels = [], []
    with torch.inference_mode():
        for batch in blocks[:wanted].split(16):
            out = model(batch.to(device), output_hidden_states=True)
            states.append(out.hidden_states[-1][:, :-1].float().cpu().flatten(0, 1))
            labels.append(batch[:, 1:].flatten())
    points, tokens = torch.cat(states)[: n + queries], torch.cat(labels)[: n + queries]
    return Embeddings(points[:n], tokens[:n], points[n:], tokens[n:], "next token")


def linear_weights(model: Any, include: str = "") -> dict[str, Float[Tensor, "m n"]]:
    """Weights (outputs x inputs) of the linear layers inside the blocks, by module name.

    The output head is left out; transformers' ``Conv1D`` is transposed. ``include`` is a regular
    expression that a name has to contain.

    Raises:
        ConfigError: nothing is left.
    """
    import re

    head = model.get_output_embeddings()
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if module is head or not re.search(include, name):
            continue
        if isinstance(module, torch.nn.Linear):
            found[name] = module.weight.detach().float()
        elif type(module).__name__ == "Conv1D":
            found[name] = module.weight.detach().float().T.contiguous()
    if not found:
        raise ConfigError(f"include={include!r} matches no linear layer of the model")
    return found
