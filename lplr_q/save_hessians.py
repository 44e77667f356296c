"""Collect the second moments of all layer inputs into a folder that compression reads.
[CALDERA §5]

    python -m lplr_q.save_hessians --base-model micro-mistral
    python -m lplr_q.save_hessians --base-model FOLDER --devset wikitext \\
        --hessian-save-path hessians/mine
    torchrun --nproc-per-node 4 -m lplr_q.save_hessians --base-model FOLDER --device cuda

One file per layer input, one decoder block at a time; the same command continues after any
interruption. Under torchrun every process takes a share of the text; the sums are exact. A gated
model needs HF_TOKEN or the file hf_access_token.txt; the token is never printed or stored.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lplr_q.activation_aware.dataclasses import DataParameters, ModelParameters
from workbench.cli import RunField, RunOptions, cli
from workbench.errors import ConfigError, require_least
from workbench.run import Run


@dataclass(frozen=True)
class Experiment:
    """Which model on which text."""

    base_model: str = "micro-mistral"
    """Built-in name, local folder or hub id."""
    hessian_save_path: Path | None = None
    """Folder of the Hessians; by default `hessians` in the run's folder."""
    data: DataParameters = DataParameters(
        devset=("microworld:doc", "stdlib"), devset_size=48, context_length=512, batch_size=8
    )
    """The calibration text."""
    include: str = ".*"
    """Regular expression: linear layers of the decoder blocks."""
    exclude: str | None = None
    """Regular expression: those to leave out."""
    resume: bool = True
    """Continue what the folder holds; False refuses a folder with Hessians in it."""
    devices: tuple[str, ...] = ()
    """The device, in place of --device; several share the text under torchrun, one process each."""
    token: str | None = None
    """Access token of the hub. HF_TOKEN or hf_access_token.txt are better: others can see flags."""
    chunk_size: int = 256
    """Of the published code, without effect: sums take a few rows at a time anyway."""
    n_sample_proc: int = 4
    """Of the published code, without effect: texts are cut by this process."""
    seed: int = 0
    """Seed of all named streams."""
    run: RunField = RunOptions()

    def __post_init__(self) -> None:
        """Settings that cannot work; the token goes to where the hub's client looks for it."""
        if self.token is not None:  # not into files of settings, nor onto the screen
            os.environ["HF_TOKEN"] = self.token
            object.__setattr__(self, "token", None)
        require_least(self, 1, "chunk_size", "n_sample_proc")
        if len(self.devices) > 1:
            raise ConfigError(
                f"{len(self.devices)} devices: torchrun --nproc-per-node {len(self.devices)} -m "
                "lplr_q.save_hessians --device cuda gives each process one"
            )
        if self.devices:
            own = dataclasses.replace(self.run, device=self.devices[0])
            object.__setattr__(self, "run", own)
        if not self.resume and self.hessian_save_path is not None:
            found = self.hessian_save_path / "fingerprint.json"
            if found.exists():
                raise ConfigError(f"{found} exists and resume is off; choose another folder")


EXPERIMENT = Experiment()  # edit me


def main(experiment: Experiment) -> dict[str, Any]:
    """Collect, store and describe the Hessians; returns where they are."""
    from lplr_q import distributed

    name = "lplr_q.save_hessians"
    folder = experiment.hessian_save_path
    if folder is None:
        folder = Run.open(name, experiment).directory / "hessians"
    with distributed.group(_device(experiment)):
        own = distributed.own_run(name, experiment)
        with Run.open(name, own) as run:
            if distributed.all_agree(run.finished):
                return run.results
            return _collect(run, own, folder)


def _device(experiment: Experiment) -> str:
    """Kind of device, for the choice between NCCL and gloo."""
    import torch

    asked = experiment.run.device
    if asked in (None, "auto"):
        return "cuda" if torch.cuda.is_available() else "cpu"
    return str(asked)


def _collect(run: Run, e: Experiment, folder: Path) -> dict[str, Any]:
    from lplr_q import distributed
    from lplr_q.activation_aware.discovery import fused_experts, unfuse_experts
    from lplr_q.activation_aware.hessian import collect_hessians
    from lplr_q.calibration import calibration_blocks, fingerprint, use_token

    if use_token(ModelParameters(base_model=e.base_model)):
        run.note("an access token for the hub was found")
    model, tokenizer = run.load_model(e.base_model)
    tokens, counted = calibration_blocks(e.data, tokenizer)
    origin = fingerprint(e.base_model, model, tokens, counted, include=e.include, exclude=e.exclude)
    if unfuse_experts(model):
        run.note("fused experts were taken apart into one linear layer each")
    left = [name for name, fits in fused_experts(model).items() if not fits]
    if left:
        run.note(f"{len(left)} modules of fused experts stay as they are, e.g. {left[0]}")
    calibration = collect_hessians(
        model,
        tokens,
        mask=counted,
        batch_size=e.data.batch_size,
        include=e.include,
        exclude=e.exclude,
        folder=folder,
        fingerprint=origin,
        progress=lambda items: run.progress(items, "hessians"),
    )
    for warning in calibration.warnings():
        run.note(warning)
    rows = [_row(key, calibration) for key in run.progress(list(calibration.moments), "describe")]
    run.table("hessians", rows, caption="Inputs of linear layers; participation = (tr H)^2/tr H^2.")
    narrow = min(rows, key=lambda r: r["participation"] / r["width"])
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return run.finish(
        {
            "folder": "hessians" if e.hessian_save_path is None else str(folder),
            "calibration": calibration.digest(),
            "tokens": origin["counted"],
            "layers": len(calibration.key_of),
            "hessians": len(rows),
            "bytes": size,
            "processes": distributed.world(),
        },
        title=f"Hessians of {e.base_model}",
        question="What do the linear layers of this model see?",
        summary=f"{len(rows)} Hessians for {len(calibration.key_of)} layers from "
        f"{origin['counted']} tokens; the most concentrated input, {narrow['hessian']}, has "
        f"{narrow['participation']:.1f} effective of {narrow['width']} directions.",
    )


def _row(key: str, calibration: Any) -> dict[str, Any]:
    moment = calibration.moments[key]
    matrix = moment.matrix()
    trace = float(matrix.diagonal().sum())
    squares = float(matrix.square().sum())
    return {
        "hessian": key,
        "used_by": sum(k == key for k in calibration.key_of.values()),
        "width": len(moment.mean),
        "tokens": moment.count,
        "mean_square": trace / len(moment.mean),
        "mean_share": float(moment.mean.double().square().sum()) / max(trace, 1e-300),
        "participation": trace**2 / max(squares, 1e-300),
        "dead_channels": int((matrix.diagonal() == 0).sum()),
    }


if __name__ == "__main__":
    cli(main, EXPERIMENT)
