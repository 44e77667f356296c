"""Train a built-in language model from its recipe.   [Muon: Jordan et al. 2024]

python -m workbench.backbones --recipe micro-mistral --quick
python -m workbench.backbones --recipe micro-mistral --publish
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

from workbench.cli import RunField, RunOptions, cli
from workbench.errors import ConfigError
from workbench.run import Run


@dataclass(frozen=True)
class Experiment:
    """Which model is trained, and for how long."""

    recipe: str = "micro-mistral"
    """micro-mistral, micro-mamba, micro-mamba2, tiny, or module:NAME of a recipe of one's own."""
    quick: bool = False
    """The short recipe for tests: recall emerges, world facts do not."""
    tokens: int = 0
    """Token budget; 0 takes the recipe's."""
    seed: int = 0
    """Seed of initialisation and data order (the world is always the same)."""
    save_every: int = 50
    """Steps between checkpoints."""
    probe_every: int = 100
    """Steps between measurements of recall."""
    publish_every: int = 0
    """Steps between copies of the weights in the run's folder; 0 means only at the end."""
    documents: int = 128
    """Documents per size in the final evaluation; the other parts follow in proportion."""
    publish: bool = False
    """Copy the weights to the package and record them in its manifest."""
    run: RunField = RunOptions()

    def __post_init__(self) -> None:
        if self.tokens < 0 or self.save_every < 1 or self.documents < 1:
            raise ConfigError("tokens must be 0 or more, save_every and documents at least 1")
        if self.publish and self.quick:
            raise ConfigError("--publish with --quick: a quick model is not worth shipping")


EXPERIMENT = Experiment()


def main(experiment: Experiment) -> dict[str, Any]:
    """Train, evaluate on unseen texts, and record the weights."""
    with Run.open("workbench.backbones", experiment) as run:
        if run.finished:
            return run.results
        from workbench.backbones import manifest, training
        from workbench.backbones.evaluation import evaluate_backbone
        from workbench.backbones.recipes import find_recipe, quick
        from workbench.backbones.report import learning_curve

        recipe = find_recipe(experiment.recipe)
        if experiment.quick:
            recipe = quick(recipe)
        recipe = replace(recipe, seed=experiment.seed, tokens=experiment.tokens or recipe.tokens)
        run.note(f"{recipe.name}: {recipe.steps} steps, {recipe.tokens} tokens, {recipe.digest()}")
        began = time.process_time()
        training.train_backbone(
            recipe,
            run,
            save_every=experiment.save_every,
            probe_every=experiment.probe_every,
            publish_every=experiment.publish_every,
        )
        spent = time.process_time() - began
        weights = run.directory / "weights"
        with training.context_of(recipe):
            figures = run.once(
                "figures",
                lambda: evaluate_backbone(
                    manifest.load_folder(weights, run.device.device),
                    n=experiment.documents,
                    tick=lambda part: run.check_interrupt(),
                ),
            )
        learning_curve(run, recipe)
        run.table(
            "figures",
            [{"figure": name, "value": value} for name, value in figures.items()],
            caption="Accuracy by class on texts that training never saw "
            f"({experiment.documents} documents per size); weights in half precision.",
        )
        entry = manifest.entry(recipe, weights, figures, experiment.documents)
        entry["training_cpu_seconds"] = round(spent, 1)
        run.save_json("entry.json", entry)
        if experiment.publish:
            manifest.publish(recipe.name, weights, entry)
        recall = figures.get("documents/8_facts", float("nan"))
        return run.finish(
            {**figures, "tokens": recipe.tokens, "training_cpu_seconds": round(spent, 1)},
            title=f"Built-in model {recipe.name}",
            question="What does the model know, and how far is it from the best possible?",
            summary=f"{recall:.3f} of the questions on documents of 8 facts are answered, "
            f"{figures['world/ask_stated']:.3f} of those on the world; "
            f"{figures['nats_above_floor/doc']:.3f} nats per token above the floor on documents.",
        )


if __name__ == "__main__":
    cli(main, EXPERIMENT)
