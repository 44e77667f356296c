"""Move a prompt into LoRA, memory tokens, a KV prefix or the weights, and say what it cost.

    python -m sycomode.consolidate
    python -m sycomode.consolidate --students lora kv --steps 300
    python -m sycomode.consolidate --model FOLDER --prompt-file p.txt --questions-file q.jsonl
    python -m sycomode.consolidate --require-recovery 0.9 --max-ppl-ratio 1.05

One command: the prompted model asks and answers (self-study); every student learns the teacher's
distributions under a retention guard; all arms are examined on questions in wordings that training
never saw; gates decide the exit status (3 if one is missed); artefacts are written as PEFT folders.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sycomode.registry import check_students, objective_named
from workbench.cli import RunField, RunOptions, cli
from workbench.errors import ConfigError, GateFailed
from workbench.run import Run

if TYPE_CHECKING:
    import numpy as np

    from sycomode.data import Task
    from sycomode.evaluate import Recovery
    from sycomode.selfstudy import Lesson
    from sycomode.students import Prompted, Reader, Student
    from sycomode.train import Material, Recipe


@dataclass(frozen=True)
class Rates:
    """Learning rates by student; AdamW, cosine to 2 %."""

    lora: float = 5e-3
    """Low-rank updates (1e-4 … 2e-4 for models of a billion weights and more)."""
    memory: float = 5e-2
    """Memory embeddings."""
    kv: float = 5e-2
    """Key/value prefix."""
    full: float = 1e-3
    """All weights (1e-5 … 2e-5 for large models)."""


@dataclass(frozen=True)
class Experiment:
    """Which prompt goes into which students, how it is taught and how it is examined."""

    model: str = "micro-mistral"
    """Built-in name, local folder or hub id."""
    prompt_file: Path | None = None
    """Text to consolidate; without it a document of the built-in microworld is used."""
    questions_file: Path | None = None
    """Exam on it, JSONL {question, answer, kind?, heldout?}."""
    document: int = 0
    """Which microworld document."""
    n_facts: int = 16
    """Facts in the microworld document."""
    students: tuple[str, ...] = ("lora", "memory", "kv")
    """What is trained: full, lora, memory, kv."""
    objective: str = "kl_selfstudy"
    """Objective of the students."""
    baseline: str = "causal_language_model"
    """Objective of the baseline arm: the first student, with the same steps."""
    steps: int = 150
    """Optimiser steps per arm."""
    rows: int = 16
    """Conversations per step."""
    guard_rows: int = 4
    """Rows of guard text per step."""
    guard_weight: float = 1.0
    """Weight of KL(bare model ‖ student) on guard text; 0 = no guard."""
    rates: Rates = Rates()
    """Learning rates."""
    rank: int = 8
    """Rank of the LoRA student."""
    memory_tokens: int = 16
    """Embeddings of the memory student."""
    kv_tokens: int = 16
    """Positions of the kv student, BOS included."""
    start: Literal["prompt", "random"] = "prompt"
    """Where memory and kv start from."""
    conversations: int = 192
    """Self-study conversations drawn."""
    conversation_tokens: int = 40
    """Length of each, in tokens."""
    answer_temperature: float = 1.0
    """Sampling temperature of self-study."""
    temp: float = 1.0
    """Temperature τ of the distillation targets (loss times τ²)."""
    top_k: int = 64
    """Teacher log-probabilities kept per position, and a rest; 0 = all."""
    question_mark: str = " Q"
    """Text that opens a question in self-study."""
    banned_openings: tuple[str, ...] = (" tell", " I")
    """Words that never follow it in self-study: the microworld's held-out wordings."""
    unrelated: tuple[str, ...] = ("microworld:world", "microworld:text")
    """Sources of unrelated text, train split for the guard, test split for the exam."""
    n_others: int = 6
    """Other documents in the exam of in-context ability."""
    n_unrelated: int = 24
    """Unrelated texts in the exam."""
    evaluate_every: int = 25
    """Steps between points of the learning curve."""
    require_recovery: float | None = None
    """Gate: least recovery on held-out wordings (first student)."""
    max_ppl_ratio: float | None = None
    """Gate: most perplexity ratio on unrelated text."""
    min_icl_retention: float | None = None
    """Gate: least share of in-context accuracy kept."""
    seed: int = 0
    """Seed of all named streams."""
    run: RunField = RunOptions()
    """Where and how."""

    def __post_init__(self) -> None:
        check_students(self.students)
        for name in (self.objective, self.baseline):
            objective_named(name, self.top_k)
        if (self.prompt_file is None) != (self.questions_file is None):
            raise ConfigError("--prompt-file and --questions-file belong together; give both")
        least = {"steps": 1, "rows": 1, "guard_rows": 0, "rank": 1, "memory_tokens": 1}
        least |= {"kv_tokens": 2, "conversations": 2, "conversation_tokens": 4, "n_facts": 2}
        least |= {"top_k": 0, "evaluate_every": 1, "document": 0}
        least |= {"n_others": 1, "n_unrelated": 2}
        for field, value in least.items():
            if getattr(self, field) < value:
                raise ConfigError(f"{field}={getattr(self, field)}: expected at least {value}")
        if self.temp <= 0 or self.answer_temperature <= 0:
            raise ConfigError("temperatures must be positive")


EXPERIMENT = Experiment()


def main(experiment: Experiment) -> dict[str, Any]:
    """Self-study, all arms, exam, export; the figures of the run."""
    with Run.open("sycomode.consolidate", experiment) as run:
        results = run.results if run.finished else _consolidate(run, experiment)
    _check_gates(experiment, results)
    return results


def _consolidate(run: Run, e: Experiment) -> dict[str, Any]:
    from sycomode import report
    from sycomode.data import bos_of, encode
    from sycomode.selfstudy import StudyPlan, coverage, sentences, study
    from sycomode.students import Prompted, check_length
    from sycomode.train import material

    device = run.device
    model, tokenizer = run.load_model(e.model)
    model.requires_grad_(False)
    task = _task(e)
    bos, prompt = bos_of(tokenizer), encode(tokenizer, task.document.prompt)
    check_length(model, 1 + len(prompt) + e.conversation_tokens)
    teacher, bare = Prompted(model, bos, prompt), Prompted(model, bos)
    run.note(f"prompt of {len(prompt)} tokens, {len(task.document.questions)} exam questions")

    plan = StudyPlan(
        conversations=e.conversations,
        tokens=e.conversation_tokens,
        temperature=e.answer_temperature,
        top_k=e.top_k,
        question_mark=e.question_mark,
        banned_openings=e.banned_openings if e.prompt_file is None else (),
    )
    lesson, record = study(run, teacher, tokenizer, task, plan, targets_temperature=e.temp)
    texts = [tokenizer.decode(row) for row in lesson.ids.tolist()]
    parts = sentences(task.document.prompt)
    hits = coverage(parts, texts)
    run.note(
        f"self-study: {record['kept']} conversations kept of {record['drawn']}; "
        f"{sum(h < 4 for h in hits)} of {len(hits)} sentences asked about fewer than 4 times"
    )
    guard = _guard(run, bare, tokenizer, task, e)
    given = material(teacher, lesson, guard)

    examiner = _Examiner(run, tokenizer, task, teacher, e)
    fixed: dict[str, Reader] = {"no_prompt": bare, "prompted": teacher}
    if e.memory_tokens < len(prompt):
        fixed["truncate_prompt"] = Prompted(model, bos, prompt[-e.memory_tokens :])
    for name, reader in fixed.items():
        examiner.examine(name, reader)

    curves: list[dict[str, Any]] = []
    arms = [("lm_on_prompt", e.students[0], e.baseline)]
    arms += [(kind, kind, e.objective) for kind in e.students]
    exports: dict[str, Any] = {}
    for name, kind, objective in arms:
        student, points = _train(run, e, name, kind, objective, teacher, given, examiner)
        curves += points
        examiner.examine(name, student)
        if name != "lm_on_prompt":
            exports[name] = _export(run, name, student, model, lesson.ids[:2].to(device.device))

    rows = examiner.table()
    costs = _costs(e, model, teacher, lesson, guard, exports)
    run.table("arms", rows, caption=_caption(task, e))
    run.table("kinds", examiner.kinds(), caption="Accuracy by kind of question, every wording.")
    run.table("cost", costs, caption="What each artefact replaces, and what it weighs.")
    covered = [{"sentence": s, "conversations": h} for s, h in zip(parts, hits, strict=True)]
    run.table("coverage", covered, caption="Conversations that name each sentence's subject.")
    n = examiner.n_heldout
    report.retention_figure(run, rows, n)
    report.curve_figure(run, curves, n)
    values = _values(e, rows, costs, record, len(prompt))
    return run.finish(
        values,
        title="Moving a prompt into the model",
        question="Can a model without the prompt answer as it does with it, and what is lost?",
        summary=report.verdict(rows, e.students[0], len(prompt)),
        headline={
            f"recovery, {e.students[0]}": values["recovery"],
            "recovery, training on the text": values["recovery_lm_on_prompt"],
            "perplexity ratio, unrelated text": values["ppl_ratio"],
        },
    )


def _task(e: Experiment) -> Task:
    from sycomode.data import file_task, microworld_task

    if e.prompt_file is not None and e.questions_file is not None:
        return file_task(e.prompt_file, e.questions_file, unrelated=e.unrelated)
    return microworld_task(
        document=e.document,
        n_facts=e.n_facts,
        banned_openings=e.banned_openings,
        question_mark=e.question_mark,
        n_others=e.n_others,
        n_unrelated=e.n_unrelated,
        unrelated=e.unrelated,
    )


def _guard(run: Run, bare: Prompted, tokenizer: Any, task: Task, e: Experiment) -> Lesson | None:
    """Text that the prompt does not concern, with the bare model's distributions."""
    from sycomode.data import encode
    from sycomode.selfstudy import Lesson, lesson

    if e.guard_weight <= 0 or e.guard_rows == 0:
        return None
    texts = [*task.guard_others, *task.guard_unrelated]
    rows = [encode(tokenizer, text)[:144] for text in texts]
    rows = [row for row in rows if len(row) > 2]
    made = run.once("guard", lambda: lesson(bare, rows, top_k=e.top_k, unsupervised=1).tree())
    return Lesson.from_tree(made)


def _train(
    run: Run,
    e: Experiment,
    name: str,
    kind: str,
    objective_name: str,
    teacher: Prompted,
    given: Material,
    examiner: _Examiner,
) -> tuple[Student, list[dict[str, Any]]]:
    from sycomode.students import build_student
    from sycomode.train import losses, optimizer_for, update

    student = build_student(
        kind,
        teacher,
        init=run.streams.torch(f"init/{kind}"),
        rank=e.rank,
        tokens=e.memory_tokens if kind == "memory" else e.kv_tokens,
        start=e.start,
    )
    objective = objective_named(objective_name)
    recipe = _recipe(e, kind)
    optimizer, schedule = optimizer_for(student, recipe)
    curve = _Curve()
    state = {"student": student, "optimizer": optimizer, "schedule": schedule, "curve": curve}
    for step in run.steps(e.steps, state, save_every=50, phase=name):
        stream = run.streams("batches", index=step)  # the same rows for every arm
        if step == 1:
            curve.add(0, name, examiner.quick(student))
        parts = losses(student, objective, given, recipe, stream)
        norm = update(optimizer, schedule, parts, partial(run.require_finite, step))
        shown = {f"{name}/{key}_nats": value.detach() for key, value in parts.items()}
        run.log(step, shown | {f"{name}/gradient_norm": norm})
        if run.every(step, e.evaluate_every) or step == e.steps:
            curve.add(step, name, examiner.quick(student))
            run.log(step, {f"{name}/heldout_recovery": curve.rows[-1]["recovery"]})
    return student, curve.rows


def _recipe(e: Experiment, kind: str) -> Recipe:
    from sycomode.train import Recipe

    return Recipe(
        lr=getattr(e.rates, kind),
        steps=e.steps,
        rows=e.rows,
        guard_rows=e.guard_rows,
        guard_weight=e.guard_weight,
        temperature=e.temp,
    )


class _Curve:
    """The learning curve of one arm; part of its checkpoint."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, step: int, arm: str, recovery: float) -> None:
        if not any(row["step"] == step for row in self.rows):
            self.rows.append({"step": step, "arm": arm, "recovery": recovery})

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows = [dict(row) for row in state["rows"]]


class _Examiner:
    """The exam, the same for every arm; finished parts are kept in the run."""

    def __init__(self, run: Run, tokenizer: Any, task: Task, teacher: Prompted, e: Experiment):
        from sycomode.data import encode
        from sycomode.selfstudy import sample

        self.run, self.tokenizer, self.task, self.teacher = run, tokenizer, task, teacher
        self.questions = task.document.questions
        self.scores: dict[str, dict[str, Any]] = {}
        opening = encode(tokenizer, e.question_mark)
        eos = tokenizer.eos_token_id
        self.skipped = len(opening)
        self.exam_talk: list[list[int]] = run.once(
            "exam-conversations",
            lambda: sample(
                teacher,
                opening,
                rows=24,
                tokens=e.conversation_tokens,
                generator=run.streams.torch("exam-conversations"),
                stop=[] if eos is None else [eos],
            ),
        )

    def _asked(self, heldout: bool) -> np.ndarray:
        import numpy as np

        told = [q.kind != "absent" and q.heldout == heldout for q in self.questions]
        return np.flatnonzero(told)

    @property
    def n_heldout(self) -> int:
        """Questions of the main exam."""
        return len(self._asked(True))

    def quick(self, reader: Reader) -> float:
        """Recovery on the held-out wordings, without interval, for the learning curve."""
        from sycomode.evaluate import answers

        which = self._asked(True)
        some = [self.questions[i] for i in which]
        none = self.scores["no_prompt"]["correct"][which].mean()
        full = self.scores["prompted"]["correct"][which].mean()
        mine = answers(reader, self.tokenizer, some)["correct"].mean()
        return float((mine - none) / (full - none)) if abs(full - none) > 1e-9 else 0.0

    def examine(self, name: str, reader: Reader) -> None:
        """All scores of one arm."""
        from sycomode import evaluate

        def compute() -> dict[str, Any]:
            talk = [row for row in self.exam_talk if len(row) > self.skipped]
            kl, agree = evaluate.kl_to_teacher(self.teacher, reader, talk, self.skipped)
            return {
                **evaluate.answers(reader, self.tokenizer, self.questions),
                "in_context": evaluate.in_context(reader, self.tokenizer, self.task.others),
                "text_nats": evaluate.text_nats(reader, self.tokenizer, self.task.unrelated),
                "kl": kl,
                "agreement": agree,
                "prefix_tokens": reader.prefix_tokens - 1,
            }

        self.scores[name] = self.run.once(f"scores-{name}", compute)

    def recovery(self, name: str, heldout: bool, what: str = "correct") -> Recovery:
        """Recovery of an arm on one set of wordings."""
        from sycomode.evaluate import recovery

        which = self._asked(heldout)
        picked = [self.scores[arm][what][which] for arm in (name, "no_prompt", "prompted")]
        return recovery(*picked, self.run.streams("bootstrap/recovery"))

    def table(self) -> list[dict[str, Any]]:
        """One row per arm: recovery, distance to the teacher, retention."""
        from sycomode.evaluate import perplexity_ratio, ratio_interval

        base = self.scores["no_prompt"]
        absent = [i for i, q in enumerate(self.questions) if q.kind == "absent"]
        rows = []
        for name, score in self.scores.items():
            held, seen = self.recovery(name, True), self.recovery(name, False)
            stream = self.run.streams("bootstrap/retention")
            ppl = perplexity_ratio(score["text_nats"], base["text_nats"], stream)
            stream = self.run.streams("bootstrap/in-context")
            icl = ratio_interval(score["in_context"], base["in_context"], stream)
            rows.append(
                {
                    "arm": name,
                    "recovery": held.mean,
                    "recovery_low": held.low,
                    "recovery_high": held.high,
                    "recovery_seen_wordings": seen.mean,
                    "accuracy": float(score["correct"][self._asked(True)].mean()),
                    "accuracy_absent": float(score["correct"][absent].mean()) if absent else None,
                    "style_kept": float(score["ending"].mean()),
                    "kl_nats": score["kl"],
                    "kl_share": score["kl"] / base["kl"] if base["kl"] else None,
                    "agreement": score["agreement"],
                    "ppl_ratio": ppl[0],
                    "ppl_ratio_low": ppl[1],
                    "ppl_ratio_high": ppl[2],
                    "icl_retention": icl[0],
                    "icl_retention_low": icl[1],
                    "icl_retention_high": icl[2],
                    "prefix_tokens": score["prefix_tokens"],
                }
            )
        return rows

    def kinds(self) -> list[dict[str, Any]]:
        """Accuracy by kind of question, one column per arm."""
        from sycomode.evaluate import by_kind

        columns = {
            name: by_kind(self.questions, score["correct"], lambda q: True)
            for name, score in self.scores.items()
        }
        some = next(iter(columns.values()))
        return [
            {"kind": row["kind"], "n": row["n"]}
            | {name: column[i]["score"] for name, column in columns.items()}
            for i, row in enumerate(some)
        ]


def _export(run: Run, name: str, student: Student, model: Any, ids: Any) -> dict[str, Any]:
    """Write the artefact, load it through the public loader, compare the logits."""
    import torch

    directory = run.path(f"artefacts/{name}")
    student.save(directory)
    with torch.no_grad():
        again = student.reload(directory, model)(ids)
        difference = float((again - student.logits(ids)).abs().max())
    trained = sum(p.numel() for p in student.trained().values())
    size = sum(f.stat().st_size for f in directory.iterdir() if f.suffix == ".safetensors")
    run.note(f"artefacts/{name}: {size} bytes, reloaded logits differ by {difference:.1e}")
    return {"bytes": size, "reload_difference": difference, "trained": trained}


def _costs(
    e: Experiment,
    model: Any,
    teacher: Prompted,
    lesson: Lesson,
    guard: Lesson | None,
    exports: dict[str, Any],
) -> list[dict[str, Any]]:
    from sycomode.evaluate import break_even_requests
    from sycomode.students import attention_only, kv_bytes

    n = teacher.prefix_tokens - 1
    mean = float(lesson.mask.sum() / lesson.mask.shape[0])
    per_step = e.rows * mean
    if guard is not None:
        per_step += e.guard_rows * float(guard.mask.sum() / guard.mask.shape[0])
    weights = sum(p.numel() for p in model.parameters())
    rows = []
    for name, made in exports.items():
        taken = {"memory": e.memory_tokens, "kv": e.kv_tokens - 1}.get(name, 0)
        rows.append(
            {
                "arm": name,
                "trained_parameters": made["trained"],
                "artefact_bytes": made["bytes"],
                "reload_max_difference": made["reload_difference"],
                "prompt_tokens": n,
                "replacement_tokens": taken,
                "tokens_saved": n - taken,
                "kv_bytes_saved": kv_bytes(model, n - taken) if attention_only(model) else None,
                "break_even_requests": break_even_requests(
                    weights, round(per_step * e.steps), n, taken
                ),
            }
        )
    return rows


def _values(
    e: Experiment,
    rows: list[dict[str, Any]],
    costs: list[dict[str, Any]],
    record: dict[str, Any],
    prompt_tokens: int,
) -> dict[str, Any]:
    arms = {row["arm"]: {k: v for k, v in row.items() if k != "arm"} for row in rows}
    main = arms[e.students[0]]
    first = {k: main[k] for k in ("recovery", "recovery_low", "recovery_high", "kl_nats")}
    return {
        "student": e.students[0],
        **first,
        "ppl_ratio": main["ppl_ratio"],
        "icl_retention": main["icl_retention"],
        "prompt_tokens": prompt_tokens,
        **{f"recovery_{name}": arm["recovery"] for name, arm in arms.items()},
        "arms": arms,
        "cost": {row["arm"]: row for row in costs},
        "selfstudy": record,
    }


def _caption(task: Task, e: Experiment) -> str:
    held = sum(q.heldout and q.kind != "absent" for q in task.document.questions)
    others = sum(len(d.questions) for d in task.others)
    return (
        f"All arms. Recovery with 95 % bootstrap interval on n = {held} questions in wordings kept "
        f"out of training; perplexity ratio on {len(task.unrelated)} unrelated texts; in-context "
        f"retention on {others} questions on other documents, artefact active; {e.steps} steps."
    )


def _check_gates(e: Experiment, results: dict[str, Any]) -> None:
    """Raises GateFailed, naming every gate that the first student missed."""
    missed = []
    value = results["recovery"]
    if e.require_recovery is not None and (value is None or value < e.require_recovery):
        shown = "n/a" if value is None else f"{value:.3f}"
        missed.append(f"recovery {shown} < {e.require_recovery}")
    if e.max_ppl_ratio is not None and results["ppl_ratio"] > e.max_ppl_ratio:
        missed.append(f"perplexity ratio {results['ppl_ratio']:.3f} > {e.max_ppl_ratio}")
    kept = results["icl_retention"]
    if e.min_icl_retention is not None and (kept is None or kept < e.min_icl_retention):
        shown = "n/a" if kept is None else f"{kept:.3f}"
        missed.append(f"in-context retention {shown} < {e.min_icl_retention}")
    if missed:
        raise GateFailed(f"{results['student']}: " + "; ".join(missed))


if __name__ == "__main__":
    cli(main, EXPERIMENT)
