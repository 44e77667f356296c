"""Train the 16-bit components of L and R as a language model on a text.

    python -m lplr_q.finetune_wikitext
    python -m lplr_q.finetune_wikitext --model-save-path COMPRESSED --dataset wikitext2
    python -m lplr_q.finetune_wikitext --train-file train.jsonl --validation-file valid.txt

Only the first --ft-rank components train; codes, signs, embeddings and norms stay. A file is .txt
(passages), .jsonl, .json or .csv with a field `text`; without --validation-file the last tenth of
--train-file is the validation set. The published settings are in
configs/lplr_q/finetune_wikitext.paper.yaml.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lplr_q.comparison import Comparison, finish_perplexity
from lplr_q.finetuning import (
    TextTuning,
    batches,
    concatenated,
    judge_before,
    language_model_nats,
    load_student,
    together,
    token_blocks,
    trained_parts,
    tune,
    tuning_groups,
)
from workbench.cli import cli
from workbench.errors import ConfigError, DataError, require_least

if TYPE_CHECKING:
    from torch import Tensor

    from lplr_q.evaluate import TextBlocks
    from workbench.run import Run

SCRIPT = "lplr_q.finetune_wikitext"


@dataclass(frozen=True)
class Experiment(TextTuning):
    """Which text, and for how long."""

    dataset: str = "stdlib"
    """wikitext2, a built-in text, a folder with split files, or a hub id."""
    train_file: Path | None = None
    """Training text instead of the data set's."""
    validation_file: Path | None = None
    """Validation text instead of the data set's."""
    block_size: int = 256
    """Tokens per row."""
    train_rows: int | None = 256
    """At most so many rows; None takes all of a finite text."""
    validation_rows: int | None = 48
    """At most so many rows of the validation set."""
    train_signs: bool = False
    """Train the signs as well."""
    signs_learning_rate: float = 1e-4
    """Of the signs."""
    batch_size: int = 4
    epochs: float = 2.0
    learning_rate: float = 3e-4
    weight_decay: float = 1e-3
    warmup_ratio: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        require_least(self, 2, "block_size")
        require_least(self, 1, "train_rows", "validation_rows")
        if not self.ft_rank and not self.train_signs:
            raise ConfigError("nothing to train: ft_rank=0 and no signs")
        if self.validation_file is not None and self.train_file is None:
            raise ConfigError("--validation-file without --train-file; give both")


EXPERIMENT = Experiment()  # edit me


def main(experiment: Experiment) -> dict[str, Any]:
    """Tune; returns perplexity before and after."""
    return together(SCRIPT, experiment, lambda run: _tune(run, experiment))


def _tune(run: Run, e: Experiment) -> dict[str, Any]:
    from lplr_q.tuning_loop import Job

    student, tokenizer = load_student(run, SCRIPT, e)
    train, validation = _texts(tokenizer, e)
    comparison = Comparison(run, e, tokenizer, e.block_size)
    judge_before(run, e, student, comparison.judge)
    rank, parameters = trained_parts(run, e, student, signs=e.train_signs)
    (tokens, counted), (held, held_counted) = concatenated([train]), concatenated([validation])

    def loss_of(ids: Tensor, mask: Tensor) -> Tensor:
        nats = language_model_nats(student, ids.to(run.device.device))
        return (nats * mask.to(nats.device)).sum()

    def validate() -> dict[str, float]:
        some = batches(run, len(held), e.batch_size)
        total = sum(float(loss_of(held[rows], held_counted[rows])) for rows in some)
        return {"loss_nats": total / float(held_counted.sum())}

    job = Job(
        module=student,
        groups=tuning_groups(e, parameters, signs=e.signs_learning_rate),
        weight_of=counted.sum(dim=1).float(),
        loss_sum=lambda rows: loss_of(tokens[rows], counted[rows]),
        validate=validate,
    )
    progress = tune(run, e, job, student, tokenizer, comparison.judge)
    if progress is None:
        return {}
    what = f"{rank} components" + (" and signs" if e.train_signs else "")
    return finish_perplexity(run, e, what, comparison, progress, "loss (nats per token)")


def _texts(tokenizer: Any, e: Experiment) -> tuple[TextBlocks, TextBlocks]:
    """Training and validation rows."""
    train: str | Path = e.train_file or e.dataset
    validation: str | Path = e.validation_file or (e.train_file or e.dataset)
    if e.train_file is not None and e.validation_file is None:
        return _split(tokenizer, e, e.train_file)
    rows = token_blocks(
        tokenizer, train, split="train", length=e.block_size, n=e.train_rows, seed=e.seed
    )
    held = token_blocks(
        tokenizer, validation, split="validation", length=e.block_size, n=e.validation_rows
    )
    return rows, held


def _split(tokenizer: Any, e: Experiment, path: Path) -> tuple[TextBlocks, TextBlocks]:
    """One file in two: the last tenth of its rows is for validation."""
    from lplr_q.evaluate import TextBlocks

    both = token_blocks(tokenizer, path, split="train", length=e.block_size, n=None)
    n = len(both.tokens)
    if n < 2:
        raise DataError(f"{path}: {n} rows of {e.block_size} tokens; at least 2 are needed")
    cut = n - max(1, n // 10)
    limit = cut if e.train_rows is None else min(cut, e.train_rows)
    end = n if e.validation_rows is None else min(n, cut + e.validation_rows)
    return (
        TextBlocks(str(path), both.tokens[:limit], both.counted[:limit]),
        TextBlocks(str(path), both.tokens[cut:end], both.counted[cut:end]),
    )


if __name__ == "__main__":
    cli(main, EXPERIMENT)
