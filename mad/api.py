"""`train` as a function: any module on one task, one row of results.

    from mad import MADConfig, train
    frame = train(model, MADConfig(task="memorization", vocab_size=256), "logs")

It is the training of `python -m mad.train` with a model that is handed over instead of named.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mad.config import MADConfig
from mad.train import Experiment, fit
from workbench.errors import ConfigError
from workbench.record import RunOptions
from workbench.run import Run

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn


@dataclass(frozen=True)
class GivenModel(Experiment):
    """The settings of a run whose model is an object instead of a list of layers."""

    layers: tuple[str, ...] = ()
    """None: the model is given."""
    dim: int = 1
    """Unused: the model is given."""
    model_id: str = "model"
    """Name of the model in results."""
    model_digest: str = ""
    """SHA-256 of the model's structure and initial weights."""

    def check_model(self) -> None:
        """Nothing to check: the model exists already."""

    @property
    def stack(self) -> str:
        """The name that was given."""
        return self.model_id


def digest(model: nn.Module) -> str:
    """SHA-256 of a model's structure and weights: what a result depends on beside the settings."""
    import torch

    kind = type(model)
    found = hashlib.sha256(f"{kind.__module__}.{kind.__qualname__}\n{model}\n".encode())
    for name, tensor in model.state_dict().items():
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def train(
    model: nn.Module,
    mad_config: MADConfig,
    log_path: str | Path,
    log_to_csv: bool = True,
    log_to_wandb: bool = False,
    wandb_project: str = "mad",
    save_checkpoints: bool = True,
    *,
    model_id: str = "model",
    **settings: Any,
) -> pd.DataFrame:
    """Train `model` in place and score it; one row with the settings and every score.

    The columns `train_acc`, `train_ppl`, `train_loss`, `test_acc`, `test_ppl` and `test_loss` are
    the published ones; all others are those of `python -m mad.train`. The model must map token ids
    (batch, time) to logits (batch, time, vocab). `settings` are further fields of
    `mad.train.Experiment`, such as `protocol="mad-code"` or `evaluate_every=50`.

    The run lies in `log_path/mad/train-<key>`. The key is made of the settings and of the model's
    structure and initial weights, so a second call with the same of both returns the first one's
    results (and puts the trained weights into `model` if they were saved), and no other call does.

    Raises:
        ConfigError: settings that do not go together.
    """
    import pandas as pd
    import torch

    if not isinstance(model, torch.nn.Module):
        raise ConfigError(
            f"model is a {type(model).__name__}; expected a torch.nn.Module that maps token ids "
            "(batch, time) to logits (batch, time, vocab)"
        )
    unknown = set(settings) & {"layers", "dim", "max_length", "backbone", "global_pool", "run"}
    if unknown:
        raise ConfigError(f"{', '.join(sorted(unknown))}: decided by the model and `log_path`")
    base = mad_config.experiment()
    experiment = mad_config.experiment(
        GivenModel,
        **{"save_checkpoints": save_checkpoints and mad_config.save_checkpoints} | settings,
        model_id=model_id,
        model_digest=digest(model),
        run=RunOptions(
            root=Path(log_path),
            device=base.run.device,
            dtype=base.run.dtype,
            wandb=log_to_wandb,
            wandb_project=wandb_project,
        ),
    )
    with Run.open("mad.train", experiment) as run:
        finished = run.finished
        results = run.results if finished else fit(run, experiment, model)
        weights = run.path("model.safetensors")
        if finished and weights.is_file():
            from workbench.storage import read_safetensors

            model.load_state_dict(read_safetensors(weights))
        row = published_columns(mad_config, results)
        frame = pd.DataFrame([row])
        if log_to_csv and not run.path("results.csv").is_file():
            run.save_text("results.csv", frame.to_csv(index=False))
    return frame


def perplexity(nats: float) -> float:
    """exp(nats), infinite where that is too large for a float."""
    return math.exp(nats) if nats < 700 else math.inf


def published_columns(config: MADConfig, results: dict[str, Any]) -> dict[str, Any]:
    """One row: settings, the published columns, all further results but the learning curve."""
    return (
        vars(config)
        | {
            "train_acc": results["train_accuracy_dense"],
            "train_ppl": perplexity(results["train_nll_dense_nats"]),
            "train_loss": results["train_nll_dense_nats"],
            "test_acc": results["test_accuracy"],
            "test_ppl": perplexity(results["test_nll_nats"]),
            "test_loss": results["test_nll_nats"],
        }
        | {key: value for key, value in results.items() if key != "curve"}
    )
