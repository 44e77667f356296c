"""Multiple-choice tasks as pairs of context and continuation, from local records or the hub.

Every item becomes ``{"contexts": […], "continuations": […], "gold": int}``: one pair per choice,
scored by ln p(continuation | context). Winogrande puts the options into the *context* and scores
the common end of the sentence [partial scoring, Trinh & Le 2018]; the other tasks share one context
and score the choices. Records may have the fields of the public data sets or be prepared already:
``{query, choices, gold}`` or ``{context_options, continuation, gold}``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.errors import DataError, unknown_name

Item = dict[str, Any]

BUILT_IN = "microworld"
"""The task that needs no file: questions on documents of the built-in world."""


@dataclass(frozen=True)
class ChoiceTask:
    """Where a task's records are and how one becomes an item."""

    hub: str
    """Data set ``owner/name:configuration`` on the hub."""
    split: str
    """Split with labels."""
    convert: Callable[[dict[str, Any]], Item]
    """Record of the public data set → item."""


def choice_item(context: str, continuations: Iterable[str], gold: int) -> Item:
    """One context, several continuations."""
    endings = list(continuations)
    return {"contexts": [context] * len(endings), "continuations": endings, "gold": gold}


def _winogrande(record: dict[str, Any]) -> Item:
    before, _, after = record["sentence"].partition("_")
    options = (record["option1"], record["option2"])
    return {
        "contexts": [before + option for option in options],
        "continuations": [" " + after.strip()] * 2,
        "gold": int(record["answer"]) - 1,
    }


def _rte(record: dict[str, Any]) -> Item:
    premise = record.get("sentence1", record.get("premise"))
    claim = record.get("sentence2", record.get("hypothesis"))
    label = record["label"]
    if label in ("entailment", "not_entailment"):
        label = int(label == "not_entailment")
    text = f"{premise}\nQuestion: {claim} True or False?\nAnswer:"
    return choice_item(text, (" True", " False"), int(label))


def _piqa(record: dict[str, Any]) -> Item:
    text = f"Question: {record['goal']}\nAnswer:"
    return choice_item(text, (" " + record["sol1"], " " + record["sol2"]), int(record["label"]))


def _arc(record: dict[str, Any]) -> Item:
    choices = record["choices"]
    gold = list(choices["label"]).index(record["answerKey"])
    text = f"Question: {record['question']}\nAnswer:"
    return choice_item(text, [" " + choice for choice in choices["text"]], gold)


TASKS: dict[str, ChoiceTask] = {
    "winogrande": ChoiceTask("allenai/winogrande:winogrande_xl", "validation", _winogrande),
    "rte": ChoiceTask("nyu-mll/glue:rte", "validation", _rte),
    "piqa": ChoiceTask("ybisk/piqa", "validation", _piqa),
    "arc_easy": ChoiceTask("allenai/ai2_arc:ARC-Easy", "test", _arc),
    "arc_challenge": ChoiceTask("allenai/ai2_arc:ARC-Challenge", "test", _arc),
}
"""Tasks that the built-in scorer knows, beside the built-in one."""


def to_item(record: dict[str, Any], task: str, where: str) -> Item:
    """The item of a record, prepared or in the public form; checked.

    Raises:
        DataError: a field is missing or wrong, the gold answer is out of range.
    """
    try:
        if "query" in record and "choices" in record:
            item = _prepared(record)
        elif "context_options" in record:
            options = list(record["context_options"])
            ending = " " + record["continuation"].strip()
            item = {
                "contexts": options,
                "continuations": [ending] * len(options),
                "gold": int(record["gold"]),
            }
        elif {"contexts", "continuations", "gold"} <= set(record):
            item = {key: record[key] for key in ("contexts", "continuations", "gold")}
        elif task in TASKS:
            item = TASKS[task].convert(record)
        else:
            raise KeyError("query")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{where}: no item of {task} ({type(error).__name__}: {error}); expected "
            "{query, choices, gold}, {context_options, continuation, gold} or the fields of the "
            f"public data set; found {', '.join(map(str, record))[:200]}"
        ) from None
    n = len(item["contexts"])
    texts = [*item["contexts"], *item["continuations"]]
    if n < 2 or len(item["continuations"]) != n or not all(isinstance(t, str) for t in texts):
        raise DataError(f"{where}: expected at least two choices, each a text; found {n}")
    if not 0 <= item["gold"] < n:
        raise DataError(f"{where}: gold answer {item['gold']}, expected 0 to {n - 1}")
    return item


def _prepared(record: dict[str, Any]) -> Item:
    """{query, choices, gold}: a question that lacks its "Answer:" gets it, a choice its space."""
    query = record["query"]
    if query.startswith("Question:") and not query.rstrip().endswith("Answer:"):
        query = query.rstrip() + "\nAnswer:"
    joined = query.endswith((" ", "\n"))
    choices = [c if joined or c[:1].isspace() else " " + c for c in record["choices"]]
    return choice_item(query, choices, int(record["gold"]))


def read_items(path: Path | str, task: str, n: int | None = None) -> list[Item]:
    """Items of a local .jsonl file (.gz too)."""
    from workbench.text import read_jsonl

    records = read_jsonl(path, n=n)
    return [to_item(record, task, f"{path}: item {i}") for i, record in enumerate(records, 1)]


def load_items(
    task: str, folder: Path | None = None, *, n: int | None = None, split: str | None = None
) -> list[Item]:
    """Items of ``task``: built in, from ``folder/<task>.jsonl[.gz]``, or from the hub.

    Raises:
        ConfigError: the task is unknown and no file of ``folder`` has its name.
        DataError: bad records, or the hub cannot be reached.
    """
    if task == BUILT_IN:
        from workbench.microworld import World

        rows = World().choices(n or 200, "train" if split == "train" else "test")
        return [to_item(row, task, task) for row in rows]
    path = local_file(task, folder)
    if path is not None:
        return read_items(path, task, n)
    if task not in TASKS:
        raise unknown_name("task", task, [*TASKS, BUILT_IN])
    source = TASKS[task]
    return hub_items(task, source.hub, split or source.split, n)


def local_file(task: str, folder: Path | None) -> Path | None:
    """``folder/<task>.jsonl[.gz]`` if there is one; with a folder given, it must be there."""
    if folder is None:
        return None
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; expected one with {task}.jsonl")
    for ending in (".jsonl", ".jsonl.gz"):
        if (folder / f"{task}{ending}").is_file():
            return folder / f"{task}{ending}"
    if task in TASKS:
        raise DataError(f"{folder}: no {task}.jsonl or {task}.jsonl.gz in it")
    return None


def hub_items(task: str, source: str, split: str, n: int | None) -> list[Item]:
    """Items of a data set on the hub."""
    rows = hub_rows(source, split, n)
    return [to_item(row, task, f"{source}: item {i}") for i, row in enumerate(rows, 1)]


def hub_rows(source: str, split: str, n: int | None = None, **options: Any) -> list[dict[str, Any]]:
    """Rows of ``owner/name`` or ``owner/name:configuration``; ``n`` of them or all."""
    import datasets

    from workbench.models import hub_error

    name, _, configuration = source.partition(":")
    try:
        stream = datasets.load_dataset(
            name, configuration or None, split=split, streaming=True, **options
        )
        return list(stream if n is None else stream.take(n))
    except Exception as error:
        raise hub_error("data set", source, error) from error
