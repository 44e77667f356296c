"""A job of the same shape as the five methods', small enough to be killed a thousand times.

python drill_job.py --steps 12
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from workbench.cli import RunField, RunOptions, cli
from workbench.run import Run


@dataclass(frozen=True)
class Experiment:
    """A linear map learnt twice, from a unit that is computed once."""

    steps: int = 4
    """Steps of each of the two phases."""
    pause: float = 0.0
    """Seconds slept in each step."""
    diverge_at: int = 0
    """Step of the second phase whose loss becomes NaN (0 = never)."""
    seed: int = 0
    """Seed of all streams."""
    run: RunField = RunOptions()


EXPERIMENT = Experiment()


def main(experiment: Experiment) -> dict:
    """Data → train twice → evaluate → report."""
    with Run.open("drill.job", experiment) as run:
        if run.finished:
            return run.results
        import time

        import torch

        data = run.once("data", lambda: {"x": run.streams("x").standard_normal((64, 4))})
        x = torch.from_numpy(data["x"]).float()
        model = torch.nn.Linear(4, 4)
        with torch.no_grad():
            model.weight.normal_(generator=run.streams.torch("init"))
            model.bias.zero_()
        for phase in ("first", "second"):
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (1 + n))
            state = {"model": model, "optimizer": optimizer, "schedule": schedule}
            for step in run.steps(experiment.steps, state, save_every=2, phase=phase):
                batch = x[run.streams("batch", step).integers(0, 64, 8)]
                noise = torch.randn(8, 4)  # the global generator must survive a crash too
                loss = (model(batch) - batch + 0.01 * noise).square().mean()
                if phase == "second" and step == experiment.diverge_at:
                    loss = loss * float("nan")
                run.require_finite(step, batch={"x": batch}, loss=loss.detach())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                run.log(step, {"loss": loss.detach()})
                time.sleep(experiment.pause)
            run.log(experiment.steps, {"error": (model(x) - x).square().mean().detach()})
        run.save_tensors("weights.safetensors", model.state_dict())
        error = (model(x) - x).square().mean().item()
        return run.finish({"error": error, "made_in_seconds": run.seconds})


def fingerprint(folder: Path) -> str:
    """SHA-256 over what must be equal: weights, results and metrics without their seconds."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("**/*.safetensors")):
        if not {"checkpoints", "units"} & set(path.relative_to(folder).parts):
            digest.update(path.name.encode() + path.read_bytes())
    values = json.loads((folder / "results.json").read_text(encoding="utf-8"))["values"]
    digest.update(json.dumps(without_seconds(values), sort_keys=True).encode())
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        digest.update(json.dumps(without_seconds(json.loads(line)), sort_keys=True).encode())
    return digest.hexdigest()


def without_seconds(value):
    """The tree without the keys that hold measured time."""
    if isinstance(value, dict):
        return {k: without_seconds(v) for k, v in value.items() if "seconds" not in k}
    if isinstance(value, list):
        return [without_seconds(v) for v in value]
    return value


if __name__ == "__main__":
    cli(main, EXPERIMENT)
