"""The protocol that the three classic experiments share, with the original's flags.

Per item: the metric with the context, without it, and after the objective has run on the context
alone (it never sees the question). Beside it, in the default recipe, a student trained by language
modelling on the context for as many steps. The model is loaded once; every item starts from the
same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from sycomode.registry import objective_named
from workbench.cli import RunField, RunOptions
from workbench.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

    from sycomode.data import Document
    from sycomode.students import Prompted, Reader, Student
    from workbench.run import Run


@dataclass(frozen=True)
class Classic:
    """What the three experiments can be told; empty fields take the recipe's value."""

    num_mem_tokens: int = 0
    """New memory tokens after BOS; 0 = the weights themselves."""
    objective_function: str | None = None
    """seed: causal_language_model, default: kl_selfstudy; or another name of the registry."""
    lr: float | None = None
    """seed: 2e-5; default: 1e-3 for the weights, 5e-2 for memory tokens."""
    num_iter: int | None = None
    """Gradient steps; seed: 5, default: 60."""
    temp: float = 1.0
    """Softmax temperature of the distillation targets."""
    model_name: str = "micro-mistral"
    """Built-in name, local folder or hub id."""
    recipe: Literal["seed", "default"] = "default"
    """seed: plain SGD on one sequence as published; default: AdamW, self-study, guard."""
    items: Literal["auto", "english", "microworld"] = "auto"
    """Language of the items; auto: microworld for the built-in models, English for others."""
    n_items: int | None = None
    """Items; letters: 100 (seed) or 6 (default); fewer than there are elsewhere."""
    seed: int = 0
    """Seed of all named streams."""
    run: RunField = RunOptions()
    """Where and how."""

    def __post_init__(self) -> None:
        objective_named(self.objective)
        if self.num_mem_tokens < 0:
            raise ConfigError(f"--num-mem-tokens {self.num_mem_tokens}: expected 0 or more")
        if self.num_iter is not None and self.num_iter < 1:
            raise ConfigError(f"--num-iter {self.num_iter}: expected at least 1")
        if self.n_items is not None and self.n_items < 1:
            raise ConfigError(f"--n-items {self.n_items}: expected at least 1")
        if self.temp <= 0:
            raise ConfigError(f"--temp {self.temp}: expected more than 0")
        if self.lr is not None and self.lr <= 0:
            raise ConfigError(f"--lr {self.lr}: expected more than 0")

    @property
    def objective(self) -> str:
        """The objective's name, the recipe's if none is given."""
        return self.objective_function or (
            "causal_language_model" if self.recipe == "seed" else "kl_selfstudy"
        )

    @property
    def rate(self) -> float:
        """The learning rate, the recipe's if none is given."""
        if self.lr is not None:
            return self.lr
        if self.recipe == "seed":
            return 2e-5
        return 5e-2 if self.num_mem_tokens else 1e-3

    @property
    def steps(self) -> int:
        """Gradient steps, the recipe's if none are given."""
        return self.num_iter or (5 if self.recipe == "seed" else 60)

    @property
    def language(self) -> str:
        """The items' language."""
        if self.items != "auto":
            return self.items
        return "microworld" if self.model_name.startswith("micro-") else "english"


Metric = Callable[["Reader", "Document"], "np.ndarray"]
"""One value per question of a document."""


def run_items(
    run: Run,
    experiment: Classic,
    documents: Sequence[Document],
    metric: Metric,
    load: tuple[Any, Any],
    *,
    opening: str,
) -> list[dict[str, Any]]:
    """One row per question: full_context, no_context, distilled (and lm_on_prompt), durable."""
    import numpy as np

    from sycomode.data import bos_of, encode
    from sycomode.students import Prompted, check_length

    model, tokenizer = load
    model.requires_grad_(False)
    bos = bos_of(tokenizer)
    prompts = [encode(tokenizer, document.prompt) for document in documents]
    shortest = min(len(prompt) for prompt in prompts)
    if experiment.recipe == "default" and experiment.num_mem_tokens > shortest:
        raise ConfigError(
            f"--num-mem-tokens {experiment.num_mem_tokens}: memory starts from the context's "
            f"tokens, and the shortest context has {shortest}; lower it, or use --recipe seed "
            "(random start)"
        )
    for prompt in prompts:
        check_length(model, 1 + len(prompt) + 64)
    arms = {"distilled": experiment.objective}
    if experiment.recipe == "default" and experiment.objective != "causal_language_model":
        arms = {"lm_on_prompt": "causal_language_model", **arms}
    rows: list[dict[str, Any]] = []
    for index in run.progress(range(len(documents)), "items", total=len(documents)):
        document = documents[index]
        teacher = Prompted(model, bos, prompts[index])

        def measure(
            document: Document = document, teacher: Prompted = teacher, index: int = index
        ) -> dict[str, Any]:
            values = {
                "full_context": metric(teacher, document),
                "no_context": metric(Prompted(model, bos), document),
            }
            for arm, objective in arms.items():
                student = distil(run, experiment, objective, teacher, tokenizer, index, opening)
                values[arm] = metric(student, document)
            return values

        values = run.once(f"item-{index:04d}", measure)
        for at, question in enumerate(document.questions):
            row = {"item": index, "question": question.question.strip(), "answer": question.answer}
            rows.append(row | {name: float(value[at]) for name, value in values.items()})
        run.log(index + 1, {name: float(value.mean()) for name, value in values.items()})
        shown = []
        for name in values:
            so_far = [row[name] for row in rows]
            shown.append(f"{name} {np.mean(so_far):.4g} ± {np.std(so_far):.3g}")
        run.note(f"item {index + 1}/{len(documents)}  " + "  ".join(shown))
    return rows


def distil(
    run: Run,
    experiment: Classic,
    objective_name: str,
    teacher: Prompted,
    tokenizer: Any,
    index: int,
    opening: str,
) -> Student:
    """The student after `num_iter` steps of the objective on this item's context alone."""
    from sycomode.students import build_student
    from sycomode.train import Recipe, losses, material, optimizer_for, update

    seed = experiment.recipe == "seed"
    student = build_student(
        "memory" if experiment.num_mem_tokens else "full",
        teacher,
        init=run.streams.torch("init", index=index),
        tokens=experiment.num_mem_tokens,
        start="random" if seed else "prompt",
    )
    objective = objective_named(objective_name)
    lesson = guard = None
    if objective.reads == "conversations":
        lesson = _conversations(run, experiment, teacher, tokenizer, index, opening)
    if not seed:
        guard = _guard(teacher, tokenizer)
    recipe = Recipe(
        lr=experiment.rate,
        steps=experiment.steps,
        rows=10 if seed else 16,
        guard_rows=2,
        guard_weight=0.0 if seed else 1.0,
        temperature=experiment.temp,
        optimizer="sgd" if seed else "adamw",
    )
    given = material(teacher, lesson, guard)
    optimizer, schedule = optimizer_for(student, recipe)
    for step in range(1, experiment.steps + 1):
        stream = run.streams(f"batches/{index}", index=step)
        parts = losses(student, objective, given, recipe, stream)
        update(optimizer, schedule, parts, partial(run.require_finite, step))
        run.check_interrupt()
    return student


def _conversations(
    run: Run, experiment: Classic, teacher: Prompted, tokenizer: Any, index: int, opening: str
) -> Any:
    """Self-study on one context; the original's 10 continuations of 4 tokens under `seed`."""
    from sycomode.data import encode
    from sycomode.selfstudy import lesson, sample

    seed = experiment.recipe == "seed"
    start = [] if seed else encode(tokenizer, opening)
    eos = tokenizer.eos_token_id
    rows = sample(
        teacher,
        start,
        rows=10 if seed else 48,
        tokens=4 if seed else 24,
        generator=run.streams.torch("selfstudy", index=index),
        stop=[] if eos is None else [eos],
    )
    rows = [row for row in rows if len(row) > len(start)] or [[*start, teacher.bos]]
    whole = objective_named(experiment.objective).whole
    return lesson(
        teacher,
        rows,
        top_k=0 if whole else 64,
        temperature=experiment.temp,
        unsupervised=len(start),
    )


def _guard(teacher: Prompted, tokenizer: Any) -> Any:
    from sycomode.data import encode
    from sycomode.selfstudy import lesson
    from sycomode.students import Prompted
    from workbench.text import load_texts

    texts = load_texts("microworld:world", n=8, split="train")
    rows = [encode(tokenizer, text)[:64] for text in texts]
    return lesson(Prompted(teacher.model, teacher.bos), rows, top_k=64, unsupervised=1)


def answer_perplexity(tokenizer: Any) -> Metric:
    """exp(mean nats) of the answer's tokens after the question; lower is better."""
    import numpy as np

    from sycomode.evaluate import answers

    def metric(reader: Reader, document: Document) -> np.ndarray:
        return np.exp(answers(reader, tokenizer, document.questions)["nats"])

    return metric


def letter_probability(tokenizer: Any) -> Metric:
    """Probability of the right letter among the 26, at the position after the context."""
    import torch

    from sycomode.data import LETTERS, letter_ids
    from sycomode.evaluate import soft_scores

    @torch.no_grad()
    def metric(reader: Reader, document: Document) -> np.ndarray:
        _, letters = letter_ids(tokenizer, document.prompt)
        one = torch.full((1, 1), reader.bos, device=reader.model.device)
        right = LETTERS.index(document.questions[0].answer)
        return soft_scores(reader.logits(one)[:, 0], letters)[:, right].cpu().numpy()

    return metric


def summarise(
    run: Run, experiment: Classic, rows: Sequence[dict[str, Any]], *, higher: bool, what: str
) -> dict[str, Any]:
    """Means, standard deviations and recovery over the items; table and figure."""
    import numpy as np

    from sycomode.evaluate import recovery
    from sycomode.report import triple_figure

    arms = [name for name in rows[0] if name not in ("item", "question", "answer")]
    columns = {name: np.array([row[name] for row in rows]) for name in arms}
    sign = (lambda v: v) if higher else (lambda v: -np.log(v))  # perplexity is scored by its log
    values: dict[str, Any] = {
        "objective": experiment.objective,
        "recipe": experiment.recipe,
        "num_mem_tokens": experiment.num_mem_tokens,
        "n": len(rows),
    }
    for name, column in columns.items():
        values |= {name: float(column.mean()), f"{name}_sd": float(column.std())}
    for name in arms:
        if name in ("full_context", "no_context"):
            continue
        found = recovery(
            sign(columns[name]),
            sign(columns["no_context"]),
            sign(columns["full_context"]),
            run.streams("bootstrap"),
        )
        prefix = "recovery" if name == "distilled" else f"recovery_{name}"
        values |= {
            prefix: found.mean,
            f"{prefix}_low": found.low,
            f"{prefix}_high": found.high,
        }
    run.table("items", rows, caption=f"{what}; n = {len(rows)}.")
    triple_figure(run, columns, what)
    return values


def sentence(values: dict[str, Any]) -> str:
    """The figures of an experiment in one sentence."""
    shown = values["recovery"]
    told = "n/a (the context has no measurable effect)" if shown is None else f"{shown:.2f}"
    return (
        f"With context {values['full_context']:.3g}, without {values['no_context']:.3g}, after "
        f"{values['objective']} {values['distilled']:.3g}; recovery {told}, n = {values['n']}."
    )
