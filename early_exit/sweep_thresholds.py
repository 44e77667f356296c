"""Agreement with the full model against blocks, arithmetic and time, for every threshold.

    python -m early_exit.sweep_thresholds --exits runs/early_exit/train-1a2b3c4d
    python -m early_exit.sweep_thresholds --model micro-mistral          (trains the exits first)
    python -m early_exit.sweep_thresholds --exits DIR --criterion margin --accounting dynamax
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from early_exit.train import SOURCES
from early_exit.train import Experiment as Training
from workbench.cli import RunField, RunOptions, cli
from workbench.errors import ConfigError
from workbench.run import Run

if TYPE_CHECKING:
    from early_exit.adapters.base import Adapter
    from early_exit.data import Documents
    from early_exit.heads import Exits


@dataclass(frozen=True)
class Experiment:
    """Which exits, which thresholds, how much real decoding."""

    model: str = "micro-mistral"
    """Backbone: built-in name, local folder or hub id."""
    exits: Path | None = None
    """Folder written by early_exit.train; none = train here with `at`, `emission` and `steps`."""
    at: tuple[int, ...] = ()
    """Blocks to train exits after; none = four in the second half."""
    emission: Literal["lens", "affine", "last_block"] = "lens"
    """Emission of exits trained here (see early_exit.train)."""
    steps: int = 400
    """Optimiser steps of gates trained here."""
    translator_steps: int = 300
    """Optimiser steps of an affine emission trained here."""
    train_tokens: int = 24000
    """Tokens for exits trained here."""
    save_every: int = 100
    """Optimiser steps between checkpoints."""
    criterion: str = "gate"
    """gate, maxprob, margin, entropy or saturation."""
    thresholds: int = 100
    """Points of the simulated curve."""
    speedups: tuple[float, ...] = (1.25, 1.5)
    """Speed-ups in blocks to decode at; their thresholds are chosen on other documents."""
    policies: tuple[str, ...] = ("propagate", "defer")
    """State policies to decode with."""
    data: tuple[str, ...] = SOURCES
    """Sources: built-in corpora, files or hub data sets; equal token shares."""
    choose_tokens: int = 8000
    """Tokens of the documents on which thresholds are chosen."""
    test_tokens: int = 16000
    """Tokens of the documents that are reported."""
    max_length: int = 512
    """Documents are cut at this many tokens."""
    decode_documents: int = 12
    """Documents for real decoding."""
    prompt_tokens: int = 24
    """Tokens of each that are given."""
    new_tokens: int = 64
    """Tokens of each that are decoded."""
    accounting: Literal["true", "dynamax"] = "true"
    """dynamax adds the published speed-up formula to the summary."""
    force: bool = False
    """Use exits trained for another backbone."""
    seed: int = 0
    """Seed of all named streams."""
    run: RunField = RunOptions()

    def __post_init__(self) -> None:
        for name in ("thresholds", "choose_tokens", "test_tokens", "decode_documents"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: expected at least 1")
        for name in ("prompt_tokens", "new_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: expected at least 1")
        if any(not s >= 1 for s in self.speedups) or not self.speedups:
            raise ConfigError(f"speedups={list(self.speedups)}: expected one or more, each ≥ 1")
        if self.criterion == "oracle":
            raise ConfigError(
                "criterion oracle is no rule to decode with; its bound is always in the table"
            )


EXPERIMENT = Experiment()  # edit me


def main(experiment: Experiment) -> dict[str, Any]:
    """Simulate the whole curve from one pass, decode at the chosen speed-ups, draw."""
    with Run.open("early_exit.sweep_thresholds", experiment) as run:
        if run.finished:
            return run.results
        from early_exit import simulate
        from early_exit.adapters.base import adapt
        from early_exit.criteria import get_criterion
        from early_exit.data import load_documents
        from early_exit.features import collect, measure, pruned_agreement
        from workbench.models import load_model

        get_criterion(experiment.criterion)
        device = run.device
        model, tokenizer = load_model(experiment.model, device=device.device, dtype=device.dtype)
        adapter = adapt(model)
        for policy in experiment.policies:
            if policy not in adapter.policies():
                raise ConfigError(
                    f"state policy {policy!r} is not available for {adapter.family} backbones; "
                    f"use some of {', '.join(adapter.policies())}"
                )
        exits = _exits(run, experiment, adapter, tokenizer)
        sizes = {"choose": experiment.choose_tokens, "test": experiment.test_tokens}
        documents = {
            "choose": load_documents(
                tokenizer,
                experiment.data,
                split="train",
                tokens=sizes["choose"],
                max_length=experiment.max_length,
                seed=experiment.seed + 1,
            ),
            "test": load_documents(
                tokenizer,
                experiment.data,
                split="test",
                tokens=sizes["test"],
                max_length=experiment.max_length,
                seed=experiment.seed,
            ),
        }

        def evidence(part: str, criterion: str) -> simulate.Evidence:
            return simulate.Evidence.of(
                measures[part],
                features[part],
                exits.exits,
                adapter.n_layers,
                criterion,
                exits.emission,
            )

        features, measures = {}, {}
        for part, texts in documents.items():
            features[part] = run.once(
                f"features_{part}",
                lambda texts=texts: collect(
                    adapter, exits.exits, texts, emission=exits.emission, watch=run.progress
                ),
            )
            measures[part] = run.once(
                f"measures_{part}",
                lambda part=part: measure(adapter, exits, features[part], watch=run.progress),
            )
        choose = evidence("choose", experiment.criterion)
        test = evidence("test", experiment.criterion)
        grid = simulate.threshold_grid(choose.scores, experiment.thresholds)
        costs, width = adapter.costs(), adapter.width
        curve = simulate.curve(
            test, grid, costs, width, run.streams("bootstrap/curve"), family=adapter.family
        )
        counts = simulate.document_sums(test.document * 0.0 + 1, test.document)
        used = counts > 0
        pruned = run.once(
            "pruning",
            lambda: {
                "hits": pruned_agreement(adapter, documents["test"], watch=run.progress)
            },
        )
        baselines = [
            *simulate.fixed_rows(test, run.streams("bootstrap/fixed")),
            *simulate.pruning_rows(
                pruned["hits"][used], counts[used], adapter.n_layers, run.streams("bootstrap/prune")
            ),
            simulate.oracle_row(test, run.streams("bootstrap/oracle")),
        ]
        chosen = [
            simulate.threshold_for_speedup(choose, s, grid) for s in experiment.speedups
        ]
        measured, free = _decode(run, experiment, adapter, exits, documents["test"], chosen)
        picture = _heat_map_text(experiment, adapter, exits, tokenizer, documents["test"], chosen)
        return _report(
            run, experiment, adapter, exits, test, curve, baselines, chosen, measured, free, picture,
            {c: evidence("test", c) for c in ("gate", "maxprob", "margin", "entropy", "saturation")},
            {c: evidence("choose", c) for c in ("gate", "maxprob", "margin", "entropy", "saturation")},
            documents["test"], features["test"], measures["test"],
        )


if __name__ == "__main__":
    cli(main, EXPERIMENT)
