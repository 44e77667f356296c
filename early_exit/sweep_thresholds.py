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
from workbench.errors import ConfigError, require_least
from workbench.run import Run

if TYPE_CHECKING:
    from early_exit.adapters.base import Adapter
    from early_exit.data import Documents
    from early_exit.heads import Exits
    from early_exit.simulate import Evidence

SCORES = ("gate", "maxprob", "margin", "entropy", "saturation")


@dataclass(frozen=True)
class Experiment:
    """Which exits, which thresholds, how much real decoding."""

    model: str = "micro-mistral"
    """Backbone: built-in name, local folder or hub id."""
    exits: Path | None = None
    """Folder written by early_exit.train; none = train here with `at`, `emission` and `steps`."""
    at: tuple[int, ...] = ()
    """Blocks to train exits after; none = four in the second half."""
    emission: Literal["lens", "affine", "last_block"] = "affine"
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
    speedups: tuple[float, ...] = (1.5, 2.0)
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
        require_least(self, 1, "thresholds", "choose_tokens", "test_tokens", "decode_documents")
        require_least(self, 1, "prompt_tokens", "new_tokens")
        if any(not s >= 1 for s in self.speedups) or not self.speedups:
            raise ConfigError(f"speedups={list(self.speedups)}: expected one or more, each ≥ 1")
        if self.criterion == "oracle":
            raise ConfigError(
                "criterion oracle is no rule to decode with; its bound is always in the table"
            )


EXPERIMENT = Experiment()  # edit me


@dataclass
class Material:
    """Backbone, exits and the cached pass over two sets of documents.

    On `choose` the thresholds are picked, on `test` everything is reported.
    """

    adapter: Adapter
    exits: Exits
    tokenizer: Any
    documents: dict[str, Documents]
    features: dict[str, dict[str, Any]]
    measures: dict[str, dict[str, Any]]

    def evidence(self, part: str, criterion: str) -> Evidence:
        """Scores and outcomes of one set under one criterion."""
        from early_exit.simulate import Evidence

        return Evidence.of(
            self.measures[part],
            self.features[part],
            self.exits.exits,
            self.adapter.n_layers,
            criterion,
            self.exits.emission,
        )


def prepare(run: Run, experiment: Experiment) -> Material:
    """Load or train the exits, then one pass of the backbone over both sets."""
    from early_exit.adapters.base import adapt
    from early_exit.criteria import get_criterion
    from early_exit.data import load_documents
    from early_exit.features import collect, measure
    from early_exit.model import load_exits

    get_criterion(experiment.criterion)
    model, tokenizer = run.load_model(experiment.model)
    adapter = adapt(model)
    for policy in experiment.policies:
        if policy not in adapter.policies():
            raise ConfigError(
                f"state policy {policy!r} is not available for {adapter.family} backbones; "
                f"use some of {', '.join(adapter.policies())}"
            )
    if experiment.exits is not None:
        exits, _ = load_exits(experiment.exits, adapter, force=experiment.force)
    else:
        exits = _train(run, experiment, adapter, tokenizer)
    sets = {
        "choose": ("train", experiment.choose_tokens, experiment.seed + 1),
        "test": ("test", experiment.test_tokens, experiment.seed),
    }
    material = Material(adapter, exits, tokenizer, {}, {}, {})
    for part, (split, tokens, seed) in sets.items():
        documents = load_documents(
            tokenizer,
            experiment.data,
            split=split,
            tokens=tokens,
            max_length=experiment.max_length,
            seed=seed,
        )
        features = run.once(
            f"features_{part}",
            lambda documents=documents: collect(
                adapter, exits.exits, documents, emission=exits.emission, watch=run.progress
            ),
        )
        material.documents[part], material.features[part] = documents, features
        material.measures[part] = run.once(
            f"measures_{part}",
            lambda features=features: measure(adapter, exits, features, watch=run.progress),
        )
    return material


def _train(run: Run, experiment: Experiment, adapter: Adapter, tokenizer: Any) -> Exits:
    from early_exit.data import load_documents
    from early_exit.train import train_exits

    training = Training(
        model=experiment.model,
        exits=experiment.at,
        emission=experiment.emission,
        data=experiment.data,
        train_tokens=experiment.train_tokens,
        max_length=experiment.max_length,
        steps=experiment.steps,
        translator_steps=experiment.translator_steps,
        save_every=experiment.save_every,
        seed=experiment.seed,
    )
    documents = load_documents(
        tokenizer,
        experiment.data,
        split="train",
        tokens=experiment.train_tokens,
        max_length=experiment.max_length,
        seed=experiment.seed,
    )
    return train_exits(run, training, adapter, documents)[0]


def baselines(run: Run, material: Material, criterion: str) -> list[dict[str, Any]]:
    """One exit for all tokens, layers pruned, and the oracle."""
    from early_exit import simulate
    from early_exit.features import pruned_agreement

    test = material.evidence("test", criterion)
    counts = simulate.document_sums(0.0 * test.document + 1, test.document)
    pruned = run.once(
        "pruning",
        lambda: {
            "hits": pruned_agreement(
                material.adapter, material.documents["test"], watch=run.progress
            )
        },
    )
    layers = material.adapter.n_layers
    return [
        *simulate.fixed_rows(test, run.streams("bootstrap/fixed")),
        *simulate.pruning_rows(pruned["hits"], counts, layers, run.streams("bootstrap/pruned")),
        simulate.oracle_row(test, run.streams("bootstrap/oracle")),
    ]


def criteria_rows(run: Run, material: Material, experiment: Experiment) -> list[dict[str, Any]]:
    """Every criterion at every target: threshold from `choose`, figures from `test`."""
    from early_exit import simulate

    rows = []
    costs, width = material.adapter.costs(), material.adapter.width
    for name in SCORES:
        choose, test = material.evidence("choose", name), material.evidence("test", name)
        grid = simulate.threshold_grid(choose.scores, experiment.thresholds)
        for target in experiment.speedups:
            threshold = simulate.threshold_for_speedup(choose, target, grid)
            (row,) = simulate.curve(
                test,
                [threshold],
                costs,
                width,
                run.streams(f"bootstrap/{name}"),
                family=material.adapter.family,
            )
            keep = ("threshold", "agreement", "low", "high", "mean_blocks", "speedup_blocks")
            rows.append(
                {
                    "criterion": name,
                    "target": target,
                    **{key: row[key] for key in keep},
                    "speedup_arithmetic": row["speedup_arithmetic_propagate"],
                }
            )
    return rows


def source_rows(
    material: Material, experiment: Experiment, chosen: dict[float, float]
) -> list[dict[str, Any]]:
    """Agreement and depth by kind of text: easy text leaves early, hard text does not."""
    test = material.evidence("test", experiment.criterion)
    source = material.features["test"]["source"].numpy()
    rows = []
    for target, threshold in chosen.items():
        index = test.leave(threshold)
        correct, depth = test.correct(index), test.depth(index)
        for number, name in enumerate(material.documents["test"].sources):
            own = source == number
            if own.any():
                rows.append(
                    {
                        "target": target,
                        "source": name,
                        "agreement": float(correct[own].mean()),
                        "mean_blocks": float(depth[own].mean()),
                        "exited": float((index[own] < len(test.exits)).mean()),
                        "tokens": int(own.sum()),
                    }
                )
    return rows


def decode_rows(
    run: Run, material: Material, experiment: Experiment, chosen: dict[float, float]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Real decoding at the chosen thresholds under every policy: fed text, then own text."""
    from early_exit.decode import Setting, choose_documents, compare, free_running, summarise

    settings = [
        Setting(f"{policy}, {target:g}×", threshold, policy, experiment.criterion)
        for policy in experiment.policies
        for target, threshold in chosen.items()
    ]
    documents = material.documents["test"]
    prompt, new = experiment.prompt_tokens, experiment.new_tokens
    numbers = choose_documents(documents, experiment.decode_documents, prompt, new)
    adapter, exits = material.adapter, material.exits
    span = {"prompt": prompt, "new": new, "watch": run.progress}
    raw = run.once(
        "decoded",
        lambda: compare(adapter, exits, settings, documents, numbers, **span),
    )
    free = run.once(
        "free_running",
        lambda: free_running(adapter, exits, settings, documents, numbers[:6], **span),
    )
    return summarise(raw, settings, adapter, run.streams("bootstrap/decoded")), free


def main(experiment: Experiment) -> dict[str, Any]:
    """Simulate the whole curve from one pass, decode at the chosen speed-ups, draw."""
    with Run.open("early_exit.sweep_thresholds", experiment) as run:
        if run.finished:
            return run.results
        from early_exit import simulate
        from early_exit.train import exit_rows

        material = prepare(run, experiment)
        adapter, exits = material.adapter, material.exits
        choose = material.evidence("choose", experiment.criterion)
        test = material.evidence("test", experiment.criterion)
        grid = simulate.threshold_grid(choose.scores, experiment.thresholds)
        chosen = {
            target: simulate.threshold_for_speedup(choose, target, grid)
            for target in experiment.speedups
        }
        curve = simulate.curve(
            test,
            grid,
            adapter.costs(),
            adapter.width,
            run.streams("bootstrap/curve"),
            family=adapter.family,
        )
        measured, free = decode_rows(run, material, experiment, chosen)
        tables = {
            "curve": curve,
            "baselines": baselines(run, material, experiment.criterion),
            "criteria": criteria_rows(run, material, experiment),
            "sources": source_rows(material, experiment, chosen),
            "decoded": measured,
            "free_running": free,
            "exits": exit_rows(material.measures["test"], exits, 1, 0.8),
        }
        return publish(run, experiment, material, tables, chosen)


def publish(
    run: Run,
    experiment: Experiment,
    material: Material,
    tables: dict[str, list[dict[str, Any]]],
    chosen: dict[float, float],
) -> dict[str, Any]:
    """Tables, figures and the summary."""
    from early_exit.report import speed_figure, token_heat_map

    n = len(material.features["test"]["x"])
    documents = material.documents["test"]
    measured = tables["decoded"]
    shown = [row for row in measured if experiment.accounting == "dynamax"] or [
        {k: v for k, v in row.items() if k != "speedup_dynamax"} for row in measured
    ]
    run.table(
        "decoded",
        shown,
        caption=f"Real decoding, {measured[0]['tokens']} tokens of {experiment.decode_documents} "
        "documents, the full model interleaved on the same text. speedup_blocks is latency, "
        "speedup_work counts deferred blocks too, speedup_seconds is the median over documents "
        "with quartiles. Agreement with 95 % bootstrap interval over documents. Only long "
        "documents are decoded, so speed-ups differ from the targets, which hold for all.",
    )
    run.table(
        "baselines",
        tables["baselines"],
        caption=f"What one gets without a gate, and the bound, n = {n} tokens.",
    )
    run.table(
        "criteria",
        tables["criteria"],
        caption="Every score at the target speed-ups, exact state, thresholds chosen on other "
        "documents; arithmetic includes filling skipped blocks and looking at the vocabulary.",
    )
    run.table("sources", tables["sources"], caption="By kind of text, exact state.")
    run.table("exits", tables["exits"], caption="Each exit and each score on the test documents.")
    run.table(
        "free_running",
        tables["free_running"],
        caption="Each setting continues its own text: share of positions equal to the full "
        "model's text (one early difference changes everything after it).",
    )
    run.table("curve", tables["curve"], caption="The simulated curve.")
    name = experiment.model if "/" not in experiment.model else Path(experiment.model).name
    figure, points = speed_figure(tables["curve"], tables["baselines"], measured)
    run.figure(
        "agreement_against_speed",
        figure,
        points,
        caption=f"{name}: agreement with the full model against speed-up in three accountings. "
        f"Line: threshold sweep over n = {n} tokens of {len(documents.ids)} documents with 95 % "
        f"interval over documents. Marks: real decoding of {measured[0]['tokens']} tokens. "
        "Deferred work is exact and saves waiting, not arithmetic.",
        alt="; ".join(
            f"{row['setting']}: agreement {row['agreement']:.3f}, blocks "
            f"{row['speedup_blocks']:.2f}×, arithmetic {row['speedup_arithmetic']:.2f}×, time "
            f"{row['speedup_seconds']:.2f}×"
            for row in measured
        ),
    )
    target = max(chosen)
    pieces, layers, rows = _one_text(experiment, material, chosen[target])
    run.figure(
        "heat_map",
        token_heat_map(pieces, layers, material.adapter.n_layers),
        rows,
        caption=f"A test document read by {name} (λ for {target:g}× in blocks): the colour is the "
        f"block after which the prediction of each of {len(pieces)} tokens left.",
        alt=f"mean depth {sum(layers) / len(layers) + 1:.2f} of {material.adapter.n_layers} blocks",
    )
    return run.finish(
        _values(tables, experiment),
        title="Early exits",
        question="How many blocks does a token need?",
        summary=_sentence(tables, experiment, name),
        headline=_headline(tables),
    )


def _headline(tables: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """What real decoding reached, by policy and target."""
    return {
        f"agreement at {row['speedup_blocks']:.2f}× in blocks ({row['policy']})": row["agreement"]
        for row in tables["decoded"][:3]
    }


def _values(tables: dict[str, list[dict[str, Any]]], experiment: Experiment) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for row in tables["criteria"]:
        if row["criterion"] == experiment.criterion:
            label = f"simulated_{row['target']:g}x"
            for key in ("agreement", "low", "high", "speedup_blocks", "speedup_arithmetic"):
                values[f"{label}_{key}"] = row[key]
    names = [
        f"{policy}_{target:g}x" for policy in experiment.policies for target in experiment.speedups
    ]
    keys = ["agreement", "speedup_blocks", "speedup_work", "speedup_arithmetic"]
    keys += ["speedup_seconds", "speedup_cpu_seconds"]
    if experiment.accounting == "dynamax":
        keys.append("speedup_dynamax")
    for name, row, free in zip(names, tables["decoded"], tables["free_running"], strict=True):
        for key in keys:
            values[f"{name}_{key}"] = row[key]
        values[f"{name}_identical_positions"] = free["identical_positions"]
    oracle = next(row for row in tables["baselines"] if row["method"] == "oracle")
    values["oracle_speedup_blocks"] = oracle["speedup_blocks"]
    known = [row["auroc_gate"] for row in tables["exits"] if row["auroc_gate"] is not None]
    values["mean_auroc_gate"] = sum(known) / len(known) if known else None
    return values


def _sentence(tables: dict[str, list[dict[str, Any]]], experiment: Experiment, name: str) -> str:
    parts = [
        f"{100 * row['agreement']:.1f} % at {row['speedup_blocks']:.2f}× in blocks "
        f"({row['speedup_work']:.2f}× with deferred work, {row['speedup_arithmetic']:.2f}× in "
        f"arithmetic; {row['policy']})"
        for row in tables["decoded"]
    ]
    oracle = next(row for row in tables["baselines"] if row["method"] == "oracle")
    return (
        f"Decoding {name} with {experiment.criterion} exits agrees with the full model on "
        + ", ".join(parts)
        + f"; an oracle would reach {oracle['speedup_blocks']:.2f}× at 100 %. "
        "Seconds are in the table."
    )


def _one_text(
    experiment: Experiment, material: Material, threshold: float
) -> tuple[list[str], list[int], list[dict[str, Any]]]:
    """A test document read with exits: its tokens, where each was predicted, and the rows."""
    import torch

    from early_exit.decode import choose_documents
    from early_exit.engine import Engine

    documents = material.documents["test"]
    prompt, new = experiment.prompt_tokens, experiment.new_tokens
    number = choose_documents(documents, 1, prompt, new)[0]
    ids = documents.ids[number]
    engine = Engine(
        material.adapter, material.exits, criterion=experiment.criterion, threshold=threshold
    )
    span = min(len(ids) - prompt - 1, 2 * new)
    done = engine.decode(torch.tensor(ids[:prompt]), span + 1, forced=ids[prompt : prompt + span])
    emitted, layers = done.tokens[:span], done.exit_layers[:span]
    pieces = [material.tokenizer.decode([t]) for t in ids[prompt : prompt + span]]
    rows = [
        {
            "token": i,
            "text": pieces[i],
            "emitted": material.tokenizer.decode([emitted[i]]),
            "exit_layer": layers[i],
        }
        for i in range(span)
    ]
    return pieces, layers, rows


if __name__ == "__main__":
    cli(main, EXPERIMENT)
