"""Train L and R so that the right option of a multiple-choice item is the likelier one.

    python -m lplr_q.finetune_winogrande
    python -m lplr_q.finetune_winogrande --model-save-path COMPRESSED --task winogrande
    python -m lplr_q.finetune_winogrande --train-file train.jsonl --validation-file valid.jsonl

Every option is scored by the language model, s_i = ln p(continuation | context_i); the loss is
-ln softmax(s)_gold (--loss choice) or -s_gold per token (--loss lm). Only the first --ft-rank
components of L and R train. Accuracy on the validation items before and after, exact intervals.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lplr_q.comparison import curve_figure
from lplr_q.eval_tasks import BUILT_IN, TASKS, load_items, read_items
from lplr_q.finetuning import (
    Tuning,
    batches,
    judge_before,
    load_student,
    together,
    trained_parts,
    tune,
    tuning_groups,
)
from workbench.cli import cli
from workbench.errors import ConfigError, DataError, require_least, unknown_name

if TYPE_CHECKING:
    from torch import Tensor

    from lplr_q.choices import Pair
    from lplr_q.tuning_loop import Progress
    from workbench.run import Run

SCRIPT = "lplr_q.finetune_winogrande"


@dataclass(frozen=True)
class Experiment(Tuning):
    """Which items, and for how long."""

    task: str = BUILT_IN
    """winogrande, another task of lplr_q.eval_zeroshot from the hub, or the built-in microworld."""
    train_file: Path | None = None
    """Items as .jsonl instead; see lplr_q.eval_tasks for the fields."""
    validation_file: Path | None = None
    """Without it the last tenth of train_file is for validation."""
    train_items: int | None = 256
    """At most so many."""
    validation_items: int | None = 128
    """At most so many."""
    max_seq_length: int = 256
    """Tokens per option; longer contexts are cut on the left."""
    loss: Literal["choice", "lm"] = "choice"
    """What is minimised."""
    batch_size: int = 8
    """Items per forward pass and process; each has a row per option."""
    epochs: float = 1.0
    learning_rate: float = 3e-4
    warmup_ratio: float = 0.033

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train_file is None and self.task not in (*TASKS, BUILT_IN):
            raise unknown_name("task", self.task, [*TASKS, BUILT_IN])
        if self.validation_file is not None and self.train_file is None:
            raise ConfigError("--validation-file without --train-file; give both")
        if self.max_seq_length < 4 or not self.ft_rank:
            raise ConfigError("expected max_seq_length of at least 4 and ft_rank of at least 1")
        require_least(self, 1, "train_items", "validation_items")


EXPERIMENT = Experiment()  # edit me


def main(experiment: Experiment) -> dict[str, Any]:
    """Tune; returns accuracy before and after."""
    return together(SCRIPT, experiment, lambda run: _tune(run, experiment))


def _tune(run: Run, e: Experiment) -> dict[str, Any]:
    import torch

    from lplr_q.choices import accuracy_columns, encode_items, score_items
    from lplr_q.tuning_loop import Job

    student, tokenizer = load_student(run, SCRIPT, e)
    train, held = _items(e)
    encoded = encode_items(tokenizer, train, max_length=e.max_seq_length)
    judged = encode_items(tokenizer, held, max_length=e.max_seq_length)
    rows: list[dict[str, Any]] = []

    def judge(stage: str, model: Any, bits: float) -> None:
        scores = run.once(
            f"accuracy/{stage}",
            lambda: score_items(
                model, judged, batch_size=16, progress=lambda b: run.progress(b, stage)
            ),
        )
        rows.append({"stage": stage, "bits": bits, **accuracy_columns(held, judged, scores)})

    judge_before(run, e, student, judge)
    _, parameters = trained_parts(run, e, student, signs=False)

    def validate() -> dict[str, float]:
        some = batches(run, len(held), e.batch_size)
        total = sum(float(choice_loss(student, held[s], judged[s], e)) for s in some)
        return {"loss_nats": total / len(held)}

    job = Job(
        module=student,
        groups=tuning_groups(e, parameters),
        weight_of=torch.ones(len(train)),
        loss_sum=lambda some: choice_loss(
            student, [train[i] for i in some], [encoded[i] for i in some], e
        ),
        validate=validate,
    )
    progress = tune(run, e, job, student, tokenizer, judge)
    return {} if progress is None else _report(run, e, rows, progress)


def choice_loss(model: Any, items: list[dict[str, Any]], pairs: list[list[Pair]], e: Any) -> Tensor:
    """Sum over items of -ln softmax(s)_gold, or of -s_gold per token."""
    import torch

    from lplr_q.choices import log_likelihoods

    if e.loss == "lm":
        gold = [own[item["gold"]] for item, own in zip(items, pairs, strict=True)]
        counts = torch.tensor([float(max(1, pair.scored)) for pair in gold])
        scores = log_likelihoods(model, gold)
        return -(scores / counts.to(scores.device)).sum()
    scores = log_likelihoods(model, [pair for own in pairs for pair in own])
    parts = scores.split([len(own) for own in pairs])
    losses = [-part.log_softmax(0)[item["gold"]] for part, item in zip(parts, items, strict=True)]
    return torch.stack(losses).sum()


def _items(e: Experiment) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training and validation items."""
    if e.train_file is None:
        train = load_items(e.task, n=e.train_items, split="train")
        return train, load_items(e.task, n=e.validation_items)
    task = "winogrande" if e.task == BUILT_IN else e.task  # whose fields are understood
    train = read_items(e.train_file, task)
    if e.validation_file is not None:
        return train[: e.train_items], read_items(e.validation_file, task, e.validation_items)
    if len(train) < 2:
        raise DataError(f"{e.train_file}: one item; at least 2 are needed to keep one apart")
    cut = len(train) - max(1, len(train) // 10)
    return train[:cut][: e.train_items], train[cut:][: e.validation_items]


def _report(
    run: Run, e: Experiment, rows: list[dict[str, Any]], progress: Progress
) -> dict[str, Any]:
    run.table("accuracy", rows, caption="Validation items; exact 95 % intervals.")
    curve_figure(run, progress, "loss (nats per item)" if e.loss == "choice" else "loss (nats)")
    by_stage = {row["stage"]: row for row in rows}
    before, after = by_stage["compressed"], by_stage["tuned"]
    bits = {row["stage"]: row["bits"] for row in rows}
    name = e.task if e.train_file is None else e.train_file.name
    return run.finish(
        {"rows": rows, "curve": progress.curve, "bits": bits},
        title=f"Tuning on {name} at {before['bits']:.2f} bits",
        question="Does the compressed model learn the task through a few components of L and R?",
        summary=f"Accuracy {before['accuracy']:.3f} before, {after['accuracy']:.3f} "
        f"[{after['accuracy_low']:.3f}, {after['accuracy_high']:.3f}] after "
        f"(n = {after['n_items']}, chance {after['chance']:.3f}).",
        headline={"accuracy before": before["accuracy"], "accuracy after": after["accuracy"]},
    )


if __name__ == "__main__":
    cli(main, EXPERIMENT)
