"""What the scripts that look at single layers share: which model, and the text its inputs come
from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workbench.cli import RunField, RunOptions
from workbench.errors import ConfigError

if TYPE_CHECKING:
    from lplr_q.activation_aware.hessian import Calibration
    from workbench.run import Run


@dataclass(frozen=True)
class LayerStudy:
    """Whose layers, under which inputs."""

    model: str = "micro-mistral"
    """Built-in name, local folder or hub id."""
    hessians: str | None = None
    """Folder written by save_hessians; None: collected from the calibration texts."""
    calibration: tuple[str, ...] = ("microworld:doc", "stdlib")
    """Texts whose activations make the Hessians."""
    calibration_tokens: int = 8192
    """Tokens of each text."""
    length: int = 512
    """Tokens per row."""
    batch_size: int = 8
    """Rows per forward pass."""
    sigma_reg: float = 0.01
    """Multiple of the mean diagonal added to each Hessian."""
    seed: int = 0
    """Seed of all named streams."""
    run: RunField = RunOptions()

    def __post_init__(self) -> None:
        if self.calibration_tokens < self.length or not self.calibration:
            raise ConfigError(
                f"calibration_tokens={self.calibration_tokens} of {len(self.calibration)} texts do "
                f"not fill one row of length {self.length}"
            )


def load_study(run: Run, e: LayerStudy, *, include: str = ".*") -> tuple[Any, Calibration]:
    """The model, not a compressed one, and the second moments of its layers' inputs."""
    from lplr_q.activation_aware.dataclasses import DataParameters
    from lplr_q.activation_aware.weight_compression import calibration_of_run
    from lplr_q.hf import require_uncompressed

    model, tokenizer = run.load_model(e.model, dtype=None)
    require_uncompressed(model)
    data = DataParameters(
        devset=e.calibration,
        devset_size=e.calibration_tokens // e.length * len(e.calibration),
        context_length=e.length,
        batch_size=e.batch_size,
        seed=e.seed,
    )
    return model, calibration_of_run(
        run, model, tokenizer, data, include=include, stored=e.hessians
    )
