"""Models of this repository on Apple's MLX (and on its CPU build): logits and greedy text.

    model = load_mlx("micro-mistral")
    model.greedy([1, 17, 203], n_tokens=20)

The folder is read by mlx-lm as it stands: the same config.json and safetensors that transformers
reads. Greedy tokens agree with the torch path (tested where the extra is installed).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from workbench.engines import need
from workbench.errors import DataError
from workbench.models import check_folder, resolve


class MlxModel:
    """A causal language model in MLX."""

    def __init__(self, model: Any, config: dict[str, Any]):
        self.model = model
        self.config = config

    def logits(self, ids: Sequence[int]) -> Float[np.ndarray, "time vocab"]:
        """Logits after each token of one sequence, as float32."""
        mlx = need("mlx")
        out = self.model(mlx.array([list(ids)]))
        return np.asarray(out[0].astype(mlx.float32))

    def greedy(self, ids: Sequence[int], n_tokens: int) -> list[int]:
        """The `n_tokens` most likely tokens after `ids`, one by one, with a cache."""
        mlx = need("mlx")
        from mlx_lm.models.cache import make_prompt_cache

        cache = make_prompt_cache(self.model)
        step, result = list(ids), []
        for _ in range(n_tokens):
            out = self.model(mlx.array([step]), cache=cache)
            token = int(mlx.argmax(out[0, -1]).item())
            result.append(token)
            step = [token]
        return result


def _flat_rotary(config: dict[str, Any]) -> dict[str, Any]:
    """The rotary base where mlx-lm looks for it; it silently takes 10 000 without.

    transformers 5 writes {"rope_parameters": {"rope_theta": …}}, mlx-lm reads "rope_theta".
    """
    rotary = config.get("rope_parameters")
    if isinstance(rotary, dict) and "rope_theta" in rotary and "rope_theta" not in config:
        return {"rope_theta": rotary["rope_theta"]}
    return {}


def load_mlx(spec: str | Path, *, dtype: str = "float32") -> MlxModel:
    """The built-in model or local folder `spec` in MLX.

    Raises:
        MissingExtra: mlx or mlx-lm is not installed.
        DataError: a hub id or tiny model (give a folder), or an architecture mlx-lm does not have.
    """
    mlx = need("mlx", feature="generation on MLX")
    mlx_lm = need("mlx_lm", extra="mlx", feature="generation on MLX")
    kind, name = resolve(spec)
    if kind != "folder":
        raise DataError(f"{spec}: the MLX path reads a model folder; save the model to one first")
    config = check_folder(name)
    try:
        model, _ = mlx_lm.utils.load_model(Path(name), model_config=_flat_rotary(config))
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{name}: mlx-lm cannot load model_type {config.get('model_type')!r} ({error}); use "
            "the torch path"
        ) from error
    model.set_dtype(getattr(mlx, dtype))
    return MlxModel(model, config)
