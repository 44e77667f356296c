"""Accuracy on multiple-choice tasks without training: winogrande, rte, piqa, arc and local files.

    python -m lplr_q.eval_zeroshot --model-save-path FOLDER --tasks winogrande piqa --data-dir DIR
    python -m lplr_q.eval_zeroshot --model-save-path FOLDER --scorer lm-eval --tasks arc_easy
    python -m lplr_q.eval_zeroshot --model-save-path FOLDER --tasks mine --include-path DIR

The built-in scorer compares ln p(choice | question), raw and divided by the choice's bytes; it
reads DIR/<task>.jsonl[.gz] or the hub. With lm-eval installed its own tasks are run, unless
--data-dir or the built-in task is asked for; --include-path names a folder with task definitions
(YAML) of one's own. Compressed folders load, as importing lplr_q registers them.

lm-eval's own command needs that import too; it has no option for it, so start it from Python:

    python -c "import lplr_q; from lm_eval.__main__ import cli_evaluate as main; main()" \\
      --model hf --model_args pretrained=FOLDER --tasks arc_easy
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lplr_q.eval_tasks import BUILT_IN, TASKS, load_items
from workbench.cli import RunField, RunOptions, cli
from workbench.engines import available
from workbench.errors import ConfigError, DataError, MissingExtra, require_least, unknown_name
from workbench.run import Run


@dataclass(frozen=True)
class Experiment:
    """Which model on which tasks."""

    model_save_path: str = "micro-mistral"
    """Folder of a compressed model, or any model: built-in name, folder, hub id."""
    base_model: str | None = None
    """The original, scored on the same items (built-in scorer)."""
    tasks: tuple[str, ...] = (BUILT_IN,)
    """winogrande, rte, piqa, arc_easy, arc_challenge, microworld, a file's name in --data-dir, or
    with lm-eval any of its tasks."""
    data_dir: Path | None = None
    """Folder with <task>.jsonl or <task>.jsonl.gz; without it the hub is asked."""
    include_path: Path | None = None
    """Folder with task definitions (YAML) for lm-eval, beside its own."""
    scorer: Literal["auto", "built-in", "lm-eval"] = "auto"
    """auto: lm-eval when it is installed and no local items are asked for."""
    num_fewshot: int = 0
    """Solved items put before each question; they are not scored themselves."""
    limit: int | None = None
    """At most so many items per task."""
    batch_size: int = 16
    """Sequences per forward pass."""
    max_length: int = 2048
    """Longest context in tokens, if the model does not say less."""
    seed: int = 0
    """Seed of the choice of solved items."""
    output_path: Path | None = None
    """Also write the rows as JSON to this file."""
    run: RunField = RunOptions()

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ConfigError("tasks is empty; give at least one")
        if len(set(self.tasks)) < len(self.tasks):
            raise ConfigError(f"a task is named twice: {', '.join(self.tasks)}")
        if self.num_fewshot < 0:
            raise ConfigError(f"num_fewshot={self.num_fewshot}: it cannot be negative")
        require_least(self, 1, "batch_size", "max_length", "limit")


EXPERIMENT = Experiment()  # edit me


def main(experiment: Experiment) -> dict[str, Any]:
    """Score all tasks; returns the rows of the table."""
    with Run.open("lplr_q.eval_zeroshot", experiment) as run:
        results = run.results if run.finished else _evaluate(run, experiment)
    if experiment.output_path is not None:
        from workbench import storage

        storage.write_json(experiment.output_path, results)
    return results


def choose_scorer(e: Experiment) -> str:
    """`built-in` or `lm-eval`.

    Raises:
        MissingExtra: a task that only lm-eval knows, and it is not installed.
    """
    local = e.data_dir is not None or BUILT_IN in e.tasks
    if e.include_path is not None and (local or e.scorer == "built-in"):
        raise ConfigError("--include-path holds tasks of lm-eval: no --data-dir, no microworld")
    if e.include_path is not None and not e.include_path.is_dir():
        raise ConfigError(f"--include-path {e.include_path}: no such folder")
    if e.scorer == "lm-eval" or e.include_path is not None:
        if local:
            raise ConfigError("--scorer lm-eval has its own data: no --data-dir, no microworld")
        return "lm-eval"
    if e.scorer == "auto" and not local and available("lm-eval"):
        return "lm-eval"
    unknown = [task for task in e.tasks if task not in (*TASKS, BUILT_IN)]
    if unknown and e.data_dir is None:
        text = str(unknown_name("task", unknown[0], [*TASKS, BUILT_IN]))
        if not available("lm-eval"):
            raise MissingExtra(
                f"{text}; other tasks need lm-eval (pip install 'fivefold[eval]'), or "
                "DIR/<task>.jsonl and --data-dir DIR"
            )
        raise ConfigError(f"{text}; other tasks need --scorer lm-eval")
    return "built-in"


def _evaluate(run: Run, e: Experiment) -> dict[str, Any]:
    scorer = choose_scorer(e)
    run.note(f"scored by {scorer}")
    if scorer == "lm-eval":
        rows = _by_harness(run, e)
    else:
        sets = {task: _items(run, e, task) for task in e.tasks}
        rows = _built_in(run, e, sets)
    run.table("accuracy", rows, caption="Accuracy with exact 95 % intervals (built-in scorer).")
    said = ", ".join(f"{100 * r['accuracy']:.1f} % on {r['task']}" for r in rows)
    return run.finish(
        {"rows": rows, "model": e.model_save_path, "scorer": scorer},
        title=f"Multiple-choice accuracy of {Path(e.model_save_path).name}",
        question="How many questions does the model answer without training on them?",
        summary=f"Accuracy {said}.",
        headline={f"accuracy, {r['task']}": r["accuracy"] for r in rows},
    )


def _items(run: Run, e: Experiment, task: str) -> dict[str, Any]:
    """Items to score, with solved ones before each question."""
    wanted = None if e.limit is None else e.limit + e.num_fewshot
    items = load_items(task, e.data_dir, n=wanted)
    if not e.num_fewshot:
        return {"items": items}
    if len(items) <= e.num_fewshot:
        raise DataError(f"{task}: {len(items)} items, {e.num_fewshot} of them solved: none left")
    order = run.streams(f"fewshot/{task}").permutation(len(items)).tolist()
    solved = [items[i] for i in sorted(order[: e.num_fewshot])]
    shots = [s["contexts"][s["gold"]] + s["continuations"][s["gold"]] for s in solved]
    prefix = "\n\n".join(shots) + "\n\n"
    rest = [items[i] for i in sorted(order[e.num_fewshot :])]
    return {"items": [i | {"contexts": [prefix + c for c in i["contexts"]]} for i in rest]}


def _built_in(run: Run, e: Experiment, sets: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per task: accuracies of the model and, where asked, of the original."""
    from lplr_q.activation_aware.quantized_layer import set_mode
    from lplr_q.choices import accuracy_columns, encode_items, score_items

    models = {"": e.model_save_path} | ({"base_": e.base_model} if e.base_model else {})
    rows: list[dict[str, Any]] = [{"task": task, "n_shots": e.num_fewshot} for task in sets]
    for prefix, spec in models.items():
        model, tokenizer = run.load_model(spec, what=f"{prefix}model")
        set_mode(model, "cached")
        limit = getattr(model.config, "max_position_embeddings", None) or e.max_length
        for row, (task, found) in zip(rows, sets.items(), strict=True):
            items = found["items"]
            encoded = encode_items(tokenizer, items, max_length=min(limit, e.max_length))
            name = f"{prefix}{task}"
            scores = run.once(
                f"scores/{name}",
                lambda model=model, encoded=encoded, name=name: score_items(
                    model,
                    encoded,
                    batch_size=e.batch_size,
                    progress=lambda batches: run.progress(batches, name),
                ),
            )
            columns = accuracy_columns(items, encoded, scores)
            if prefix:
                row |= {f"{prefix}{k}": columns[k] for k in ("accuracy", "accuracy_normalised")}
            else:
                row |= columns
                run.note(
                    f"{task}: accuracy {columns['accuracy']:.3f}, by bytes "
                    f"{columns['accuracy_normalised']:.3f}, n = {columns['n_items']}"
                )
        del model
    return rows


def _by_harness(run: Run, e: Experiment) -> list[dict[str, Any]]:
    """Rows from lm-evaluation-harness."""
    from lplr_q.activation_aware.quantized_layer import set_mode
    from workbench.integrations.lm_eval import evaluate_tasks

    model, tokenizer = run.load_model(e.model_save_path)
    set_mode(model, "cached")

    def compute() -> dict[str, Any]:
        found = evaluate_tasks(
            model,
            tokenizer,
            list(e.tasks),
            limit=e.limit,
            batch_size=e.batch_size,
            num_fewshot=e.num_fewshot,
            task_folder=e.include_path,
        )
        return {"results": {t: _numbers(v) for t, v in found["results"].items()}}

    results = run.once("lm-eval", compute)["results"]
    return [
        {
            "task": task,
            "n_shots": e.num_fewshot,
            "accuracy": values.get("acc,none", float("nan")),
            "accuracy_normalised": values.get("acc_norm,none"),
        }
        for task, values in results.items()
    ]


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    return {k: float(v) for k, v in values.items() if isinstance(v, (int, float))}


if __name__ == "__main__":
    cli(main, EXPERIMENT)
