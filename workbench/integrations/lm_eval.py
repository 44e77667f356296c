"""Zero-shot tasks through the public API of lm-evaluation-harness, for any loaded model.

    evaluate_tasks(model, tokenizer, ["arc_easy"], limit=200)         # tasks of the harness
    evaluate_items(model, tokenizer, items, folder=run.path("lm_eval"))  # our own choice items

The second writes the items as a local task, so the same items are scored by the harness and by
`workbench.evaluate.choice_scores`, and the two can be compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from workbench import storage
from workbench.engines import need
from workbench.errors import DataError

TASK = "fivefold_choices"


def evaluate_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = 8,
    task_folder: Path | str | None = None,
    samples: bool = False,
    num_fewshot: int | None = None,
) -> dict[str, Any]:
    """The harness's result for `tasks`: {"results": {task: {metric: value}}, "samples": …}.

    Args:
        model: a causal language model of transformers, already loaded.
        tokenizer: its tokenizer.
        tasks: names known to the harness, or of YAML files in `task_folder`.
        limit: items per task (all of them by default).
        batch_size: sequences per forward pass.
        task_folder: folder with further task definitions.
        samples: keep the per-item log-likelihoods.
        num_fewshot: solved items before each question; None leaves it to the task.

    Raises:
        MissingExtra: lm-eval is not installed.
        DataError: a task is unknown or its data set cannot be reached.
    """
    need("lm-eval", feature="tasks of lm-evaluation-harness")
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    include = str(task_folder) if task_folder else None
    manager = TaskManager(include_path=include, include_defaults=include is None)
    if include is not None and not set(tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=include)  # the harness's own too: thousands of files
    try:
        result = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=list(tasks),
            limit=limit,
            num_fewshot=num_fewshot,
            task_manager=manager,
            log_samples=samples,
            bootstrap_iters=0,
        )
    except (KeyError, ValueError, ConnectionError, OSError) as error:
        raise DataError(
            f"lm-eval could not run {', '.join(tasks)} ({type(error).__name__}: {str(error)[:300]})"
        ) from error
    if result is None:
        raise DataError(f"lm-eval gave no result for {', '.join(tasks)}")
    kept = ("results", "samples", "n-samples", "configs", "versions")
    return {key: result[key] for key in kept if key in result}


def write_choice_task(items: Sequence[Mapping[str, Any]], folder: Path | str) -> Path:
    """Writes items {query, choices, gold} as local task `fivefold_choices`; returns the folder."""
    import json

    folder = Path(folder).absolute()
    lines = [
        json.dumps({key: item[key] for key in ("query", "choices", "gold")}, ensure_ascii=False)
        for item in items
    ]
    data = storage.write_text(folder / "items.jsonl", "\n".join(lines) + "\n")
    task = {
        "task": TASK,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "query",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    storage.write_json(folder / f"{TASK}.yaml", task)  # JSON is YAML
    return folder


def evaluate_items(
    model: Any,
    tokenizer: Any,
    items: Sequence[Mapping[str, Any]],
    *,
    folder: Path | str,
    batch_size: int = 8,
) -> dict[str, Any]:
    """Our choice items scored by the harness: accuracy, accuracy_normalised, log_likelihoods."""
    result = evaluate_tasks(
        model,
        tokenizer,
        [TASK],
        batch_size=batch_size,
        task_folder=write_choice_task(items, folder),
        samples=True,
    )
    scores = result["results"][TASK]
    samples = sorted(result["samples"][TASK], key=lambda sample: sample["doc_id"])
    return {
        "accuracy": float(scores["acc,none"]),
        "accuracy_normalised": float(scores["acc_norm,none"]),
        "log_likelihoods": [
            [float(answer[0]) for answer in sample["filtered_resps"]] for sample in samples
        ],
    }
