"""Write the hidden states of a causal language model over documents into a folder.   [SDM]

python -m sdm.cache_hidden_states --model micro-mistral --out runs/features
python -m sdm.cache_hidden_states --model ../models/llama --data claims.jsonl --out runs/mine
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from workbench.cli import RunField, RunOptions, cli
from workbench.errors import ConfigError
from workbench.run import Run

if TYPE_CHECKING:
    from torch import Tensor

CLAIMS = "microworld:statements"
BATCHES_PER_UNIT = 16


@dataclass(frozen=True)
class Experiment:
    """Which model reads which documents, and where the features go."""

    model: str = "micro-mistral"
    """Built-in name, local folder, hub id, or tiny:<family>."""
    data: str = CLAIMS
    """microworld:statements, or a JSONL file with id, label, document (and split, group)."""
    out: Path | None = None
    """Folder to write; default: features/ in the run's folder."""
    n_train: int = 1600
    """Claims of the pool that is shuffled into training and calibration (microworld)."""
    n_test: int = 300
    """Rows of each test group (microworld)."""
    context: int = 2
    """At most this many statements before a claim (microworld)."""
    layer: int = -1
    """Which hidden states: -1 the last layer, 0 the embedding."""
    pooling: Literal["mean+last", "mean", "last"] = "mean+last"
    """Mean over tokens, last token, or both one after the other."""
    prompt_template: str = "{document}"
    """Text around a document."""
    answers: tuple[str, ...] = (" false", " true")
    """Answer words in the order of the labels; their logits are kept."""
    batch_size: int = 32
    """Documents per forward pass."""
    max_length: int = 512
    """Tokens of a document that are read, counted from its end."""
    seed: int = 0
    """Seed of the microworld."""
    run: RunField = RunOptions()

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        if self.n_train < 8 or self.n_test < 2 or self.batch_size < 1 or self.context < 0:
            raise ConfigError("expected n_train >= 8, n_test >= 2, batch_size >= 1, context >= 0")
        if self.max_length < 2:
            raise ConfigError(f"--max-length {self.max_length}: expected at least 2")
        if "{document}" not in self.prompt_template:
            raise ConfigError("--prompt-template: expected a text with {document} in it")
        if len(self.answers) < 2:
            raise ConfigError("--answers: expected at least two words")


EXPERIMENT = Experiment()  # edit me


def cache(run: Run, experiment: Experiment, out: Path) -> dict[str, Any]:
    """Features of all documents into `out`, in durable parts; returns the counts and the time."""
    import time

    import torch

    from sdm.data import claim_documents, read_documents, write_cache
    from sdm.embed import (
        answer_ids,
        batches_by_length,
        encode,
        hidden_states,
    )
    from workbench.microworld import World
    from workbench.models import weights_digest

    if experiment.data == CLAIMS:
        documents = claim_documents(
            experiment.n_train,
            experiment.n_test,
            world=World(seed=experiment.seed),
            context=experiment.context,
        )
    else:
        documents = read_documents(experiment.data)
    model, tokenizer = run.load_model(experiment.model, dtype=None)
    texts = [experiment.prompt_template.replace("{document}", d["document"]) for d in documents]
    rows = encode(tokenizer, texts, experiment.max_length)
    words = answer_ids(tokenizer, experiment.answers)
    batches = batches_by_length(rows, experiment.batch_size)
    begin = time.perf_counter()

    def compute(part: list[list[int]]) -> dict[str, Tensor]:
        read = [
            hidden_states(
                model,
                [rows[i] for i in batch],
                answers=words,
                layer=experiment.layer,
                pooling=experiment.pooling,
            )
            for batch in part
        ]
        return {name: torch.cat([one[name] for one in read]) for name in read[0]}

    order: list[int] = []
    parts: list[dict[str, Tensor]] = []
    starts = range(0, len(batches), BATCHES_PER_UNIT)
    for number, start in enumerate(run.progress(starts, "hidden states")):
        part = batches[start : start + BATCHES_PER_UNIT]
        parts.append(run.once(f"hidden-{number:05d}", lambda part=part: compute(part)))
        order += [i for batch in part for i in batch]
    back = torch.tensor(order).argsort()
    features = torch.cat([part["features"] for part in parts])[back]
    answers = torch.cat([part["answers"] for part in parts])[back]
    write_cache(
        out,
        features,
        answers,
        documents,
        model=experiment.model,
        weights_sha256=weights_digest(model),
        layer=experiment.layer,
        pooling=experiment.pooling,
        prompt_template=experiment.prompt_template,
        answers_text=list(experiment.answers),
    )
    n_tokens = sum(len(row) for row in rows)
    seconds = time.perf_counter() - begin
    run.note(f"{len(rows)} documents, {n_tokens} tokens, {n_tokens / seconds:.0f} tokens/s → {out}")
    return {
        "documents": len(rows),
        "tokens": n_tokens,
        "width": int(features.shape[1]),
        "caching_seconds": seconds,
    }


def main(experiment: Experiment) -> dict[str, Any]:
    """Cache the hidden states and say how many there are."""
    with Run.open("sdm.cache_hidden_states", experiment) as run:
        out = experiment.out or run.directory / "features"
        if run.finished and (out / "manifest.json").is_file():
            return run.results
        figures = cache(run, experiment, out)
        return run.finish(
            {**figures, "out": str(out) if experiment.out else "features"},
            title="Hidden states as features",
            question="What does the model know about each document before it answers?",
            summary=f"{figures['documents']} documents, {figures['width']} features each.",
        )


if __name__ == "__main__":
    cli(main, EXPERIMENT)
