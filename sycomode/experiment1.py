"""Letter sequences: the context is a run of the alphabet, the answer its next letter.

    python -m sycomode.experiment1
    python -m sycomode.experiment1 --recipe seed --objective-function distill_on_output_logits
    python -m sycomode.experiment1 --num-mem-tokens 4 --lr 5e-2 --num-iter 100 --temp 1 --no-wandb

Metric: probability of the right letter among the 26 (higher is better).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sycomode.classic import Classic
from workbench.cli import cli
from workbench.run import Run


@dataclass(frozen=True)
class Experiment(Classic):
    """Which objective moves a run of letters into the model."""


EXPERIMENT = Experiment()


def main(experiment: Experiment) -> dict[str, Any]:
    """The triple over all items."""
    with Run.open("sycomode.experiment1", experiment) as run:
        if run.finished:
            return run.results
        from sycomode.classic import letter_probability, run_items, sentence, summarise
        from sycomode.data import Document, Question, letter_items

        load = run.load_model(experiment.model_name)
        n = experiment.n_items or (100 if experiment.recipe == "seed" else 6)
        documents = [
            Document(context, (Question("next letter", answer),))
            for context, answer in letter_items(n, run.streams("items"))
        ]
        metric = letter_probability(load[1])
        rows = run_items(run, experiment, documents, metric, load, opening="")
        what = "probability of the right letter"
        values = summarise(run, experiment, rows, higher=True, what=what)
        return run.finish(
            values,
            title="Letter sequences",
            question="Does the model continue a sequence that it no longer sees?",
            summary=sentence(values),
        )


if __name__ == "__main__":
    cli(main, EXPERIMENT)
