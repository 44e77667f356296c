"""Train the signs of the rotations, and optionally L and R, towards the original model's outputs.

    python -m lplr_q.finetune_rht
    python -m lplr_q.finetune_rht --base-model ORIGINAL --model-save-path COMPRESSED
    torchrun --nproc-per-node 4 -m lplr_q.finetune_rht --base-model ORIGINAL --bits 2.4

The +-1 of the randomised Hadamard transform become float parameters (16 bits each once trained);
codes stay. Loss: cross-entropy between the softmax of the original (teacher) and of the compressed
model (student). The teacher runs along, or with --teacher-cache K its K likeliest tokens per
position and the mass of the rest are computed once and kept on disk. The state that was best on the
validation rows is kept: --model-save-path of the other scripts takes <run>/model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lplr_q.comparison import Comparison, finish_perplexity
from lplr_q.finetuning import (
    TextTuning,
    batches,
    concatenated,
    judge_before,
    load_original,
    load_student,
    together,
    token_blocks,
    trained_parts,
    tune,
    tuning_groups,
)
from workbench.cli import cli
from workbench.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from workbench.run import Run

SCRIPT = "lplr_q.finetune_rht"
CACHE_ROWS = 8


@dataclass(frozen=True)
class Experiment(TextTuning):
    """Which student learns from which teacher, and for how long."""

    devset: tuple[str, ...] = ("microworld:doc", "stdlib")
    """Texts of the training and validation rows: built-in, file, folder or hub id."""
    devset_size: int = 256
    """Rows in all, spread evenly over the texts."""
    ft_valid_size: int = 64
    """Rows of these for validation."""
    ctx_size: int = 512
    """Tokens per row."""
    batch_size: int = 2
    epochs: float = 5.0
    ft_rank: int = 0
    """Components of L and R that train along with the signs."""
    train_signs: bool = True
    """False trains L and R alone."""
    signs_learning_rate: float = 1e-3
    """Of the signs."""
    teacher_cache: int = 0
    """Keep the teacher's K likeliest tokens per position on disk; 0 runs it along."""
    patience: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.ft_valid_size < self.devset_size:
            raise ConfigError(
                f"ft_valid_size={self.ft_valid_size} of devset_size={self.devset_size}: expected "
                "some rows for each of training and validation"
            )
        if not self.devset or self.devset_size < 2 * len(self.devset):
            raise ConfigError("devset needs at least one text and two rows of each")
        if self.ctx_size < 2 or self.teacher_cache < 0 or self.signs_learning_rate <= 0:
            raise ConfigError("expected ctx_size >= 2, teacher_cache >= 0, signs_learning_rate > 0")
        if not self.train_signs and not self.ft_rank:
            raise ConfigError("nothing to train: no signs and ft_rank=0")


EXPERIMENT = Experiment()  # edit me


def main(experiment: Experiment) -> dict[str, Any]:
    """Tune; returns perplexity before and after."""
    return together(SCRIPT, experiment, lambda run: _tune(run, experiment))


def _tune(run: Run, e: Experiment) -> dict[str, Any]:
    import torch

    from lplr_q.tuning_loop import Job

    student, tokenizer = load_student(run, SCRIPT, e)
    teacher = load_original(run, e, "teacher")
    tokens, counted, validation = _rows_of(tokenizer, e)
    comparison = Comparison(run, e, tokenizer, e.ctx_size)
    judge_before(run, e, student, comparison.judge, original=teacher)
    rank, parameters = trained_parts(run, e, student, signs=e.train_signs)
    targets = Targets(run, e, teacher, tokens)
    training = torch.nonzero(~validation).flatten().tolist()
    judged = torch.nonzero(validation).flatten().tolist()

    def loss_of(rows: list[int]) -> Tensor:
        ids = tokens[rows].to(run.device.device)
        logits = student(input_ids=ids, use_cache=False).logits[:, :-1].float()
        nats = targets.cross_entropy(rows, logits)  # rows time
        return (nats * counted[rows].to(nats.device)).sum()

    def validate() -> dict[str, float]:
        some = batches(run, len(judged), e.batch_size)
        total = sum(float(loss_of(judged[rows])) for rows in some)
        return {"cross_entropy_nats": total / float(counted[judged].sum())}

    job = Job(
        module=student,
        groups=tuning_groups(e, parameters, signs=e.signs_learning_rate),
        weight_of=counted[training].sum(dim=1).float(),
        loss_sum=lambda rows: loss_of([training[i] for i in rows]),
        validate=validate,
    )
    progress = tune(run, e, job, student, tokenizer, comparison.judge)
    if progress is None:
        return {}
    label = "cross-entropy to the teacher (nats per token)"
    parts = ["signs"] if e.train_signs else []
    what = " and ".join([*parts, f"{rank} components"] if rank else parts)
    return finish_perplexity(run, e, what, comparison, progress, label)


def _rows_of(tokenizer: Any, e: Experiment) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, counted targets, and which rows are for validation (the same share of each text)."""
    import torch

    parts, held = [], []
    for number, source in enumerate(e.devset):
        n = e.devset_size // len(e.devset) + (number < e.devset_size % len(e.devset))
        parts.append(
            token_blocks(tokenizer, source, split="train", length=e.ctx_size, n=n, seed=e.seed + 1)
        )
        last = torch.zeros(n, dtype=torch.bool)
        last[n - max(1, n * e.ft_valid_size // e.devset_size) :] = True
        held.append(last)
    tokens, counted = concatenated(parts)
    return tokens, counted, torch.cat(held)


class Targets:
    """The teacher's distributions over the next token: run along, or read from disk.

    With K likeliest tokens kept, all others are one outcome, whose probability the student has to
    match as a whole:  - sum_k p_k ln q_k - (1 - sum p_k) ln(1 - sum q_k).
    """

    def __init__(self, run: Run, e: Experiment, teacher: Any, tokens: Tensor) -> None:
        self.run, self.teacher, self.tokens = run, teacher, tokens
        self.top = min(e.teacher_cache, int(teacher.config.vocab_size) - 1)
        self.kept: tuple[Tensor, Tensor] | None = None
        if self.top:
            import torch

            starts = range(0, len(tokens), CACHE_ROWS)
            parts = [
                run.once(f"teacher/{at}", lambda at=at: self._likeliest(at))
                for at in run.progress(starts, "teacher")
            ]
            self.kept = (
                torch.cat([p["tokens"] for p in parts]),
                torch.cat([p["log_probabilities"] for p in parts]),
            )

    def _log_probabilities(self, ids: Tensor) -> Tensor:
        import torch

        with torch.no_grad():
            logits = self.teacher(input_ids=ids.to(self.run.device.device), use_cache=False).logits
        return logits[:, :-1].float().log_softmax(dim=-1)  # rows time vocab

    def _likeliest(self, at: int) -> dict[str, Tensor]:
        values, tokens = self._log_probabilities(self.tokens[at : at + CACHE_ROWS]).topk(self.top)
        return {"tokens": tokens.int().cpu(), "log_probabilities": values.half().cpu()}

    def cross_entropy(self, rows: list[int], logits: Tensor) -> Tensor:
        """- sum p ln q at every position of these rows; (rows, time)."""
        student = logits.log_softmax(dim=-1)
        if self.kept is None:
            teacher = self._log_probabilities(self.tokens[rows])
            return -(teacher.exp() * student).sum(dim=-1)
        tokens, values = (part[rows].to(logits.device) for part in self.kept)
        return grouped_cross_entropy(values.float(), student.gather(-1, tokens.long()))


def grouped_cross_entropy(teacher: Tensor, student: Tensor) -> Tensor:
    """Cross-entropy of distributions known by K log-probabilities each and one rest."""
    import torch

    p, q = teacher.exp(), student.exp()
    rest_p = (1 - p.sum(dim=-1)).clamp_min(0.0)
    rest_q = (1 - q.sum(dim=-1)).clamp_min(1e-6)
    return -(p * student).sum(dim=-1) - rest_p * torch.log(rest_q)


if __name__ == "__main__":
    cli(main, EXPERIMENT)
