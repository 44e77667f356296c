"""Encyclopaedia passage: many facts in one context, questions on each.

    python -m sycomode.experiment3
    python -m sycomode.experiment3 --model-name HUB_ID --num-mem-tokens 32
    python -m sycomode.experiment3 --context-file passage.txt --qa-file questions.jsonl

Metric: perplexity of the answer (lower is better). English: the shipped passage on an invented salt
railway (613 words, 24 questions); built-in models: a microworld document of 40 facts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sycomode.classic import Classic
from workbench.cli import cli
from workbench.errors import ConfigError
from workbench.run import Run


@dataclass(frozen=True)
class Experiment(Classic):
    """Which objective moves a passage into the model."""

    context_file: Path | None = None
    """A passage of one's own, UTF-8 text."""
    qa_file: Path | None = None
    """Questions on it, JSONL {question, answer}."""
    n_facts: int = 40
    """Facts in the microworld document."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_facts < 2:
            raise ConfigError(f"--n-facts {self.n_facts}: expected at least 2")
        if (self.context_file is None) != (self.qa_file is None):
            raise ConfigError("--context-file and --qa-file belong together; give both")


EXPERIMENT = Experiment()


def main(experiment: Experiment) -> dict[str, Any]:
    """The triple over the passage's questions."""
    with Run.open("sycomode.experiment3", experiment) as run:
        if run.finished:
            return run.results
        from sycomode import data
        from sycomode.classic import answer_perplexity, run_items, sentence, summarise

        load = run.load_model(experiment.model_name)
        opening = " Q" if experiment.language == "microworld" else "\n\nQuestion:"
        if experiment.context_file is not None and experiment.qa_file is not None:
            document = data.document_from_files(experiment.context_file, experiment.qa_file)
        elif experiment.language == "microworld":
            document = data.microworld_passage(experiment.n_facts)
        else:
            document = data.shipped_passage()
        document = data.Document(document.prompt, document.questions[: experiment.n_items])
        metric = answer_perplexity(load[1])
        rows = run_items(run, experiment, [document], metric, load, opening=opening)
        what = "perplexity of the answer"
        values = summarise(run, experiment, rows, higher=False, what=what)
        return run.finish(
            values,
            title="Encyclopaedia passage",
            question="Does the model answer from a passage that it no longer sees?",
            summary=sentence(values),
        )


if __name__ == "__main__":
    cli(main, EXPERIMENT)
