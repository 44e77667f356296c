"""Train a classification head, L and R on a task of one or two sentences (RTE and the like).

    python -m lplr_q.finetune_glue
    python -m lplr_q.finetune_glue --model-save-path COMPRESSED --task-name rte
    python -m lplr_q.finetune_glue --train-file train.jsonl --validation-file valid.jsonl

    p(label | text) = softmax( A h_T + b ),    h_T = last hidden state of the text

The head (A, b) and the first --ft-rank components of L and R train. Records have `label` and the
task's fields (sentence1 and sentence2, premise and hypothesis, sentence, text, ...); labels are
numbers or names. The state with the smallest validation loss is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lplr_q.comparison import curve_figure
from lplr_q.finetuning import (
    Tuning,
    batches,
    load_student,
    stored_bits,
    together,
    trained_parts,
    tune,
    tuning_groups,
)
from workbench.cli import cli
from workbench.errors import ConfigError, DataError, require_least, unknown_name

if TYPE_CHECKING:
    from lplr_q.classifier import Classifier, Example
    from lplr_q.tuning_loop import Progress
    from workbench.run import Run

SCRIPT = "lplr_q.finetune_glue"
BUILT_IN = "microworld"

FIELDS: dict[str, tuple[str, ...]] = {
    "cola": ("sentence",),
    "mnli": ("premise", "hypothesis"),
    "mrpc": ("sentence1", "sentence2"),
    "qnli": ("question", "sentence"),
    "qqp": ("question1", "question2"),
    "rte": ("sentence1", "sentence2"),
    "sst2": ("sentence",),
    "wnli": ("sentence1", "sentence2"),
    BUILT_IN: ("document",),
}
"""Task → fields of its texts."""
FILE_FIELDS = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("sentence",), ("text",),
               ("document",))  # fmt: skip
"""Fields looked for in a local file, in this order."""


@dataclass(frozen=True)
class Experiment(Tuning):
    """Which task, and for how long."""

    task_name: str = BUILT_IN
    """A GLUE task (rte, mrpc, sst2, ...) from the hub, or claims about the built-in world."""
    train_file: Path | None = None
    """Records as .jsonl instead."""
    validation_file: Path | None = None
    """Records for validation; needed with train_file."""
    train_rows: int | None = 512
    """At most so many."""
    validation_rows: int | None = 256
    """At most so many."""
    max_seq_length: int = 128
    """Tokens per text; longer ones are cut on the left."""
    train_signs: bool = False
    """Train the signs of the rotations as well."""
    signs_learning_rate: float = 1e-3
    """Of the signs."""
    head_learning_rate: float = 1e-2
    """Of the classification head."""
    batch_size: int = 16
    epochs: float = 3.0
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup_steps: int | None = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train_file is None and self.task_name not in FIELDS:
            raise unknown_name("task", self.task_name, FIELDS)
        if (self.train_file is None) != (self.validation_file is None):
            raise ConfigError("--train-file and --validation-file belong together; give both")
        if self.max_seq_length < 2 or self.head_learning_rate <= 0:
            raise ConfigError("expected max_seq_length >= 2 and head_learning_rate > 0")
        require_least(self, 2, "train_rows", "validation_rows")


EXPERIMENT = Experiment()  # edit me


def main(experiment: Experiment) -> dict[str, Any]:
    """Tune; returns accuracy on the validation records."""
    return together(SCRIPT, experiment, lambda run: _tune(run, experiment))


def _tune(run: Run, e: Experiment) -> dict[str, Any]:
    import torch

    from lplr_q.classifier import Classifier, encode_texts
    from lplr_q.tuning_loop import Job

    student, tokenizer = load_student(run, SCRIPT, e)
    train, held = _records(e)
    labels = label_names(train)
    examples = encode_texts(tokenizer, train, labels, e.max_seq_length)
    judged = encode_texts(tokenizer, held, labels, e.max_seq_length)
    bits = {"compressed": stored_bits(student)}
    right = 0
    _, parameters = trained_parts(run, e, student, signs=e.train_signs)
    classifier = Classifier(student, len(labels), run.streams.torch("head"))
    parameters["head"] = list(classifier.head.parameters())

    def judge(stage: str, model: Any, stored: float) -> None:
        nonlocal right
        head = {k: v.detach().cpu().contiguous() for k, v in classifier.head.state_dict().items()}
        run.save_tensors("head.safetensors", head, {"labels": "\n".join(labels)})
        classifier.model, bits[stage] = model, stored
        _, right = scores(run, classifier, judged, e.batch_size)

    def validate() -> dict[str, float]:
        nats, right = scores(run, classifier, judged, e.batch_size)
        return {"loss_nats": nats / len(judged), "accuracy": right / len(judged)}

    job = Job(
        module=classifier,
        groups=tuning_groups(e, parameters, signs=e.signs_learning_rate, head=e.head_learning_rate),
        weight_of=torch.ones(len(examples)),
        loss_sum=lambda rows: classifier.loss_sum([examples[i] for i in rows])[0],
        validate=validate,
    )
    progress = tune(run, e, job, student, tokenizer, judge)
    return {} if progress is None else _report(run, e, labels, held, right, bits, progress)


def scores(
    run: Run, classifier: Classifier, examples: list[Example], batch_size: int
) -> tuple[float, int]:
    """(sum of nats, how many are right)."""
    import torch

    nats, right = 0.0, 0
    with torch.no_grad():
        for some in batches(run, len(examples), batch_size):
            loss, good = classifier.loss_sum(examples[some])
            nats, right = nats + float(loss), right + good
    return nats, right


def _records(e: Experiment) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training and validation records as {text: (one or two), label}."""
    if e.train_file is not None and e.validation_file is not None:
        from workbench.text import read_jsonl

        train = read_jsonl(e.train_file, {"label": (int, str)}, n=e.train_rows)
        held = read_jsonl(e.validation_file, {"label": (int, str)}, n=e.validation_rows)
        fields = next((f for f in FILE_FIELDS if set(f) <= set(train[0])), None)
        if fields is None:
            raise DataError(f"{e.train_file}: no text; expected sentence1 and sentence2, or text")
        return _texts(train, fields, e.train_file), _texts(held, fields, e.validation_file)
    fields = FIELDS[e.task_name]
    if e.task_name == BUILT_IN:
        from workbench.microworld import World

        world = World()
        train = world.statements(e.train_rows or 1024, "train", unknowable=0.0)
        held = world.statements(e.validation_rows or 256, "test", unknowable=0.0)
        return _texts(train, fields, BUILT_IN), _texts(held, fields, BUILT_IN)
    from lplr_q.eval_tasks import hub_rows

    source = f"nyu-mll/glue:{e.task_name}"
    split = "validation_matched" if e.task_name == "mnli" else "validation"
    train = hub_rows(source, "train", e.train_rows)
    held = hub_rows(source, split, e.validation_rows)
    return _texts(train, fields, source), _texts(held, fields, source)


def _texts(
    records: list[dict[str, Any]], fields: tuple[str, ...], where: object
) -> list[dict[str, Any]]:
    found = []
    for number, record in enumerate(records, 1):
        texts = [record.get(field) for field in fields]
        if not all(isinstance(text, str) and text.strip() for text in texts):
            raise DataError(f"{where}: record {number}: expected text in {', '.join(fields)}")
        found.append({"texts": texts, "label": str(record["label"])})
    return found


def label_names(records: list[dict[str, Any]]) -> list[str]:
    """The labels that occur, in order.

    Raises:
        DataError: fewer than two.
    """
    names = sorted({record["label"] for record in records})
    if len(names) < 2:
        raise DataError(f"the training records have only label {names[0]!r}; at least 2 needed")
    return names


def _report(
    run: Run,
    e: Experiment,
    labels: list[str],
    held: list[dict[str, Any]],
    right: int,
    bits: dict[str, float],
    progress: Progress,
) -> dict[str, Any]:
    from workbench.evaluate import proportion_interval

    n = len(held)
    low, high = proportion_interval(right, n)
    majority = max(sum(r["label"] == name for r in held) for name in labels) / n
    name = e.task_name if e.train_file is None else e.train_file.name
    row = {
        "task": name,
        "accuracy": right / n,
        "accuracy_low": low,
        "accuracy_high": high,
        "majority": majority,
        "n": n,
        **{f"bits_{stage}": value for stage, value in bits.items()},
    }
    run.table("accuracy", [row], caption="Validation records; exact 95 % interval.")
    curve_figure(run, progress, "loss (nats per record)")
    return run.finish(
        {"rows": [row], "curve": progress.curve, "labels": labels, "bits": bits},
        title=f"Classifying {name} at {bits['compressed']:.2f} bits",
        question="Does a compressed model learn a classification task?",
        summary=f"Accuracy {right / n:.3f} [{low:.3f}, {high:.3f}] on {n} records "
        f"(majority {majority:.3f}).",
        headline={"accuracy": right / n, "majority": majority},
    )


if __name__ == "__main__":
    cli(main, EXPERIMENT)
