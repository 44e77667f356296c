"""Calibration text for the scripts: blocks of tokens, and the fingerprint of what they are."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lplr_q.evaluate import load_blocks
from workbench.models import weights_digest

if TYPE_CHECKING:
    from lplr_q.activation_aware.dataclasses import DataParameters, ModelParameters


def use_token(model: ModelParameters) -> bool:
    """Put the hub's access token into this process's environment; True when there is one.

    It comes from HF_TOKEN or the file hf_access_token.txt and is never written anywhere.
    """
    token = model.access_token()
    if token:
        os.environ["HF_TOKEN"] = token
    return bool(token)


def calibration_blocks(data: DataParameters, tokenizer: Any) -> tuple[Any, Any]:
    """(tokens, counted) of all sources, ``devset_size`` sequences shared evenly among them."""
    sources = data.sources()
    parts = []
    for i, source in enumerate(sources):
        rows = data.devset_size * (i + 1) // len(sources) - data.devset_size * i // len(sources)
        if rows:
            parts.append(
                load_blocks(
                    tokenizer,
                    source,
                    tokens=rows * data.context_length,
                    length=data.context_length,
                    split=data.split,
                    seed=data.seed,
                )
            )
    return torch.cat([p.tokens for p in parts]), torch.cat([p.counted for p in parts])


def fingerprint(
    spec: str, model: Any, tokens: Any, counted: Any, *, include: str, exclude: str | None
) -> dict[str, Any]:
    """What Hessians are made from: the model's weights, the tokens, the chosen layers."""
    digest = hashlib.sha256(memoryview(tokens.numpy()).cast("B"))
    digest.update(memoryview(counted.numpy()).cast("B"))
    return {
        "model": spec if not Path(spec).is_dir() else Path(spec).name,
        "weights": weights_digest(model),
        "tokens": digest.hexdigest(),
        "rows": tokens.shape[0],
        "length": tokens.shape[1],
        "counted": int(counted.sum()),
        "include": include,
        "exclude": exclude,
    }
