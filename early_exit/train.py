"""Train exit gates from cached hidden states and report how well they know.   [DYNAMAX §3]

python -m early_exit.train --model micro-mistral
python -m early_exit.train --model micro-mamba2 --exits 3 4 5 6 --emission lens
python -m early_exit.train --model /models/mistral-7b --emission last_block --label-topk 15
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from workbench.cli import RunField, RunOptions, cli
from workbench.errors import ConfigError, require_least
from workbench.run import Run

if TYPE_CHECKING:
    from early_exit.adapters.base import Adapter
    from early_exit.data import Documents
    from early_exit.heads import Exits

SOURCES = ("microworld:doc", "microworld:world", "microworld:sum", "microworld:text")


@dataclass(frozen=True)
class Experiment:
    """Which backbone, which exits, on what text."""

    model: str = "micro-mistral"
    """Built-in name, local folder or hub id."""
    exits: tuple[int, ...] = ()
    """Blocks after which a token may leave (0-based); none = four in the second half."""
    emission: Literal["lens", "affine", "last_block"] = "affine"
    """Token of an exited position: norm and head (lens), a trained affine map before them, or the
    last block before them (the published one)."""
    label_topk: int = 1
    """An exit counts as right if the full model's token is among its k best (published: 15)."""
    weighting: Literal["uniform", "wsum"] = "uniform"
    """Weight of the exits in the loss; wsum = growing with depth, as published."""
    data: tuple[str, ...] = SOURCES
    """Sources: built-in corpora, files or hub data sets; equal token shares."""
    train_tokens: int = 24000
    """Tokens the gates are fitted on."""
    test_tokens: int = 16000
    """Tokens of other documents for the report."""
    max_length: int = 512
    """Documents are cut at this many tokens."""
    steps: int = 400
    """Optimiser steps of the gates."""
    translator_steps: int = 300
    """Optimiser steps of the affine emission (if chosen)."""
    learning_rate: float = 0.02
    """Peak rate of the gates (inputs are standardised)."""
    threshold: float = 0.8
    """Gate probability at which F1 is reported, and the default when decoding."""
    save_every: int = 100
    """Optimiser steps between checkpoints."""
    seed: int = 0
    """Seed of all named streams."""
    run: RunField = RunOptions()

    def __post_init__(self) -> None:
        require_least(self, 1, "label_topk", "train_tokens", "test_tokens", "steps")
        require_least(self, 1, "translator_steps")
        require_least(self, 2, "max_length")
        if not self.learning_rate > 0:
            raise ConfigError(f"learning_rate={self.learning_rate}: expected more than 0")


EXPERIMENT = Experiment()  # edit me


def train_exits(
    run: Run, experiment: Experiment, adapter: Adapter, documents: Documents
) -> tuple[Exits, dict[str, Any]]:
    """Cache hidden states, fit translators and gates, save `exits.safetensors` and its config."""
    from early_exit.features import collect
    from early_exit.fitting import fit_gates, fit_translators
    from early_exit.heads import Exits, check_exits, default_exits
    from early_exit.model import CONFIG, TENSORS, exit_config
    from workbench.storage import sha256

    layers = check_exits(experiment.exits or default_exits(adapter.n_layers), adapter.n_layers)
    exits = Exits(layers, adapter.gate_width, adapter.width, experiment.emission).to(adapter.device)
    adapter.model.requires_grad_(False)  # only the exits learn
    features = run.once(
        "features_train",
        lambda: collect(
            adapter, layers, documents, emission=experiment.emission, watch=run.progress
        ),
    )
    if experiment.emission == "affine":
        fit_translators(
            run,
            adapter,
            exits,
            features,
            steps=experiment.translator_steps,
            save_every=experiment.save_every,
        )
    fit_gates(
        run,
        adapter,
        exits,
        features,
        steps=experiment.steps,
        topk=experiment.label_topk,
        weighting=experiment.weighting,
        learning_rate=experiment.learning_rate,
        save_every=experiment.save_every,
    )
    config = exit_config(
        adapter,
        exits,
        backbone=experiment.model,
        label_topk=experiment.label_topk,
        thresholds={"default": experiment.threshold},
        training={
            "data": list(experiment.data),
            "tokens": len(features["x"]),
            "documents": len(documents.ids),
            "steps": experiment.steps,
            "weighting": experiment.weighting,
            "seed": experiment.seed,
        },
    )
    file = run.save_tensors(TENSORS, exits.tensors(), metadata={"format": "pt"})
    run.save_json(CONFIG, config | {"tensors_sha256": sha256(file)})
    return exits, config


def exit_rows(
    measures: dict[str, Any], exits: Exits, topk: int, threshold: float
) -> list[dict[str, Any]]:
    """One row per exit: agreement and the quality of every score."""
    from early_exit.features import labels
    from early_exit.simulate import gate_quality

    positive = labels(measures, topk).bool().numpy()
    agree = (measures["token"] == measures["answer"][:, None]).numpy()
    rows = []
    for number, layer in enumerate(exits.exits):
        row: dict[str, Any] = {
            "exit": layer,
            "agreement": float(agree[:, number].mean()),
            "positives": float(positive[:, number].mean()),
        }
        for name in ("gate", "maxprob", "margin", "entropy", "saturation"):
            scores = measures[name][:, number].double().numpy()
            quality = gate_quality(scores, positive[:, number], threshold)
            row[f"auroc_{name}"] = quality["auroc"]
            if name == "gate":
                row.update({k: quality[k] for k in ("brier", "ece", "f1")})
        row["tokens"] = len(agree)
        rows.append(row)
    return rows


def main(experiment: Experiment) -> dict[str, Any]:
    """Train and report; the run's folder can be given to `--exits` of the other scripts."""
    with Run.open("early_exit.train", experiment) as run:
        if run.finished:
            return run.results
        from early_exit.adapters.base import adapt
        from early_exit.data import load_documents
        from early_exit.features import collect, measure
        from early_exit.report import exits_figure, reliability_figure

        model, tokenizer = run.load_model(experiment.model)
        adapter = adapt(model)
        settings = {"max_length": experiment.max_length, "seed": experiment.seed}
        train = load_documents(
            tokenizer, experiment.data, split="train", tokens=experiment.train_tokens, **settings
        )
        test = load_documents(
            tokenizer, experiment.data, split="test", tokens=experiment.test_tokens, **settings
        )
        exits, _ = train_exits(run, experiment, adapter, train)
        features = run.once(
            "features_test",
            lambda: collect(
                adapter, exits.exits, test, emission=experiment.emission, watch=run.progress
            ),
        )
        measures = run.once(
            "measures_test", lambda: measure(adapter, exits, features, watch=run.progress)
        )
        rows = exit_rows(measures, exits, experiment.label_topk, experiment.threshold)
        n = len(features["x"])
        run.table(
            "exits",
            rows,
            caption=f"Each exit on {n} held-out tokens of {len(test.ids)} documents: agreement of "
            f"its token with the full model's, AUROC of every score, calibration of the gate, F1 "
            f"at {experiment.threshold:g}.",
        )
        run.figure(
            "exits",
            exits_figure(rows, adapter.n_layers),
            rows,
            caption=f"Agreement and AUROC by exit, n = {n} held-out tokens.",
            alt="; ".join(
                f"exit {r['exit']}: agreement {r['agreement']:.3f}, gate AUROC {_show(r)}"
                for r in rows
            ),
        )
        agree = (measures["token"] == measures["answer"][:, None]).numpy()
        figure, points = reliability_figure(measures["gate"].numpy(), agree, exits.exits)
        run.figure(
            "reliability",
            figure,
            points,
            caption=f"Gate probability against the share that agrees, n = {n}; bins under 10 "
            "tokens are left out.",
            alt="Calibration error per exit: "
            + ", ".join(f"exit {r['exit']} {r['ece']:.3f}" for r in rows),
        )
        values: dict[str, Any] = {"tokens": n}
        for row in rows:
            layer = row["exit"]
            for name in ("agreement", "auroc_gate", "auroc_maxprob", "brier", "ece", "f1"):
                values[f"exit_{layer}_{name}"] = row[name]
        known = [row["auroc_gate"] for row in rows if row["auroc_gate"] is not None]
        values["mean_auroc_gate"] = sum(known) / len(known) if known else None
        return run.finish(
            values,
            title="Exit gates",
            question="Can a linear gate tell from a hidden state whether the token is decided?",
            summary=f"{len(rows)} gates on {experiment.model}: agreement "
            f"{rows[0]['agreement']:.3f} at block {rows[0]['exit']} to {rows[-1]['agreement']:.3f} "
            f"at block {rows[-1]['exit']}; gate AUROC "
            + ", ".join(_show(row) for row in rows)
            + ".",
        )


def _show(row: dict[str, Any]) -> str:
    value = row["auroc_gate"]
    return "undefined" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    cli(main, EXPERIMENT)
