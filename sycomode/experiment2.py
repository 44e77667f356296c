"""Basic reasoning: three contexts of one fact, two of which differ in that fact alone.

    python -m sycomode.experiment2
    python -m sycomode.experiment2 --recipe seed --objective-function distill_on_all_hidden_layers
    python -m sycomode.experiment2 --num-mem-tokens 4 --model-name FOLDER --items english

Metric: perplexity of the answer (lower is better).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sycomode.classic import Classic
from workbench.cli import cli
from workbench.run import Run


@dataclass(frozen=True)
class Experiment(Classic):
    """Which objective moves one fact into the model."""


EXPERIMENT = Experiment()


def main(experiment: Experiment) -> dict[str, Any]:
    """The triple over the three items."""
    with Run.open("sycomode.experiment2", experiment) as run:
        if run.finished:
            return run.results
        from sycomode.classic import answer_perplexity, run_items, sentence, summarise
        from sycomode.data import MICROWORLD_ITEMS, REASONING_ITEMS

        load = run.load_model(experiment.model_name)
        english = experiment.language == "english"
        documents = (REASONING_ITEMS if english else MICROWORLD_ITEMS)[: experiment.n_items]
        metric = answer_perplexity(load[1])
        opening = " Question:" if english else " Q"
        rows = run_items(run, experiment, documents, metric, load, opening=opening)
        what = "perplexity of the answer"
        values = summarise(run, experiment, rows, higher=False, what=what)
        return run.finish(
            values,
            title="Basic reasoning",
            question="Does the model answer from a fact that it no longer sees?",
            summary=sentence(values),
        )


if __name__ == "__main__":
    cli(main, EXPERIMENT)
