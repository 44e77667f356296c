"""Make, verify and show the data sets of the synthetic tasks.   [arXiv 2403.17844, MAD]

    python -m mad.data make --workers 2                        # all 66 published settings
    python -m mad.data make --tasks compression mqar --no-grid # two tasks, baselines only
    python -m mad.data --config configs/mad/tasks/compression.yaml
    python -m mad.data verify                                  # hash every array again
    python -m mad.data verify --zenodo DIR --hashes FILE.json  # the published files
    python -m mad.data show --tasks fuzzy-in-context-recall --split test --row 3

What is there already is kept, so an interrupted `make` goes on where it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from mad.dataset import DataSet, data_set
from mad.published import load_published, verify_published
from mad.registry import TASKS, task_spec
from mad.store import leakage_warning, make, verify
from mad.tasks.task import IGNORE, Rows, Split, Task, generate
from workbench.cli import RunField, RunOptions, cli
from workbench.errors import ConfigError, DataError
from workbench.run import Run
from workbench.storage import read_json, write_json

if TYPE_CHECKING:
    from rich.text import Text


@dataclass(frozen=True)
class Baseline:
    """Options every setting starts from; none means the task's registered baseline."""

    vocab_size: int | None = None
    """Number of tokens, special ones included."""
    seq_len: int | None = None
    """Sequence length."""
    num_train_examples: int | None = None
    """Training rows."""
    multi_query: bool | None = None
    """Recall: score every repeated key, not only the last."""
    noise_vocab_size: int | None = None
    """Number of noise tokens."""
    frac_noise: float | None = None
    """Probability of noise."""
    k_motif_size: int | None = None
    """Fuzzy recall: largest number of tokens of a key."""
    v_motif_size: int | None = None
    """Fuzzy recall: largest number of tokens of a value."""
    num_tokens_to_copy: int | None = None
    """Copying: number of content tokens."""
    slot: str | None = None
    """Selective copying: blanks `before` content tokens or in `all` slots."""
    map_seed: int | None = None
    """Memorization: seed of the key-value map."""
    num_kv_pairs: int | None = None
    """MQAR: pairs shown and asked."""
    power_a: float | None = None
    """MQAR: exponent of the gaps."""
    filler_vocab_size: int | None = None
    """MQAR: number of filler tokens."""
    group: str | None = None
    """State tracking: permutation group, S3, A4, S4, A5 or S5."""
    max_depth: int | None = None
    """Dyck: largest number of open brackets."""


@dataclass(frozen=True)
class Changes:
    """Values each option takes, one at a time; nothing given means the registered grid."""

    vocab_size: tuple[int, ...] = ()
    """Numbers of tokens."""
    seq_len: tuple[int, ...] = ()
    """Sequence lengths."""
    num_train_examples: tuple[int, ...] = ()
    """Training rows."""
    frac_noise: tuple[float, ...] = ()
    """Probabilities of noise."""
    num_tokens_to_copy: tuple[int, ...] = ()
    """Numbers of content tokens."""
    num_kv_pairs: tuple[int, ...] = ()
    """Numbers of pairs."""


@dataclass(frozen=True)
class Experiment:
    """Which data sets, and what to do with them."""

    action: tyro.conf.Positional[Literal["make", "verify", "show"]] = "make"
    """Make what is missing, hash what is there again, or show one row."""
    tasks: tuple[str, ...] = ()
    """Task names or module:Class; none means the six of the published benchmark."""
    grid: bool = True
    """Every setting of the grid; otherwise the baselines only."""
    baseline: Baseline = field(default_factory=Baseline)
    """Options over the registered baselines."""
    changes: Changes = field(default_factory=Changes)
    """Another grid than the registered one."""
    num_test_examples: int = 1280
    """Rows of the test split, and of the validation split."""
    seed: int = 12345
    """Seed of the generators."""
    legacy: bool = False
    """Rows in the published order of random calls, from one stream."""
    data_path: Path | None = None
    """Folder of the data sets; none means mad/data below --root."""
    workers: int = 1
    """Processes that make shards; the bytes do not depend on it."""
    zenodo: Path | None = None
    """Verify or show the published data sets of this folder instead."""
    hashes: Path | None = None
    """With --zenodo: JSON file of SHA-256 digests to compare with; written when it is missing."""
    split: Literal["train", "val", "test"] = "test"
    """Split of the row to show."""
    row: int = 0
    """Number of the row to show."""
    run: RunField = RunOptions()
    """Where and how."""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ConfigError(f"workers={self.workers}: at least one has to work")
        if self.row < 0:
            raise ConfigError(f"row={self.row} is negative; rows count from 0")
        if self.zenodo is not None and self.action == "make":
            raise ConfigError("--zenodo reads published data: use it with verify or show")
        if self.hashes is not None and self.zenodo is None:
            raise ConfigError("--hashes holds the digests of published data: give --zenodo too")
        data_sets(self)


def data_sets(experiment: Experiment) -> list[DataSet]:
    """The chosen tasks' baselines and, with `grid`, each change of them alone."""
    given = {key: one for key, one in asdict(experiment.baseline).items() if one is not None}
    changed = {key: values for key, values in asdict(experiment.changes).items() if values}
    names = experiment.tasks or tuple(name for name, spec in TASKS.items() if spec.benchmark)
    chosen = []
    for name in names:
        spec = task_spec(name)
        settings = [{}]
        if experiment.grid:
            grid = changed or spec.changes
            settings += [{key: one} for key, values in grid.items() for one in values]
        for setting in settings:
            one = data_set(
                name,
                given | setting,
                num_test_examples=experiment.num_test_examples,
                seed=experiment.seed,
                legacy=experiment.legacy,
            )
            chosen.append(one)
    return list(dict.fromkeys(chosen))


EXPERIMENT = Experiment()  # edit me


def folder_of(experiment: Experiment) -> Path:
    """Where the data sets are."""
    return experiment.data_path or experiment.run.root / "mad" / "data"


def main(experiment: Experiment) -> dict[str, Any]:
    """Do what `action` says; returns counts and, after `make`, a digest of all data."""
    if experiment.action == "show":
        return show(experiment)
    if experiment.action == "verify":
        return verify_all(experiment)
    root, sets = folder_of(experiment), data_sets(experiment)
    with Run.open("mad.data", experiment) as run:
        if run.finished:
            for _ in make(root, sets, workers=experiment.workers):  # if they were removed since
                pass
            return run.results
        found: dict[DataSet, dict[str, Any]] = {}
        made = 0
        pieces = make(root, sets, workers=experiment.workers)
        for data, manifest, new in run.progress(pieces, "data sets", total=len(sets)):
            found[data] = manifest
            made += new
            if warning := leakage_warning(data, manifest):
                run.note(f"leakage: {warning}")
        run.note(f"{made} data sets made, {len(sets) - made} were there; {root}")
        rows = [describe(data, found[data]) for data in sets]
        run.table("data_sets", rows, caption="Data sets, their sizes, bounds and leakage")
        total = round(sum(row["megabytes"] for row in rows), 3)
        worst = max(
            (row["test_in_train"] for row in rows if not row["repeats_by_design"]), default=0.0
        )
        results = {
            "data_sets": len(rows),
            "rows": sum(sum(data.sizes.values()) for data in sets),
            "megabytes": total,
            "largest_test_in_train": worst,
            "smallest_answerable": min(row["answerable"] for row in rows),
            "sha256": digest_of_all([found[data] for data in sets]),
        }
        return run.finish(
            results,
            title="Data sets of the synthetic tasks",
            question="Which rows do the models see, and are the splits apart?",
            summary=(
                f"{len(rows)} data sets, {total:.1f} MB in {root.name}; at most {worst:.2%} of the "
                "test rows of a task that should not repeat rows occur in training."
            ),
        )


def describe(data: DataSet, manifest: dict[str, Any]) -> dict[str, Any]:
    """One line of the table: a data set, its sizes and bounds."""
    sizes = {"<i2": 2, "<i4": 4}
    files = manifest["files"].values()
    size = sum(sizes[one["dtype"]] * one["shape"][0] * one["shape"][1] for one in files)
    return {
        "task": data.task,
        "vocab_size": data.setting.vocab_size,
        "seq_len": data.setting.seq_len,
        "num_train_examples": data.num_train_examples,
        "megabytes": round(size / 1e6, 3),
        "expected_scored": manifest["expected_scored"],
        "chance": manifest["chance"],
        "ceiling": manifest["ceiling"],
        "answerable": manifest["answerable"]["test"],
        "test_in_train": manifest["leakage"]["test_in_train"],
        "repeats_by_design": data.setting.repeats_rows,
        "folder": data.name,
    }


def digest_of_all(manifests: list[dict[str, Any]]) -> str:
    """SHA-256 over the names and digests of all arrays."""
    whole = hashlib.sha256()
    for manifest in manifests:
        for name, one in sorted(manifest["files"].items()):
            whole.update(f"{manifest['key']} {name} {one['sha256']}\n".encode())
    return whole.hexdigest()


def verify_all(experiment: Experiment) -> dict[str, Any]:
    """Verify every chosen data set; the error names the first that fails and counts the others."""
    root, sets = folder_of(experiment), data_sets(experiment)
    known: dict[str, str] = {}
    if experiment.hashes is not None and experiment.hashes.is_file():
        known = read_json(experiment.hashes)
    digests: dict[str, str] = {}
    problems: list[str] = []
    arrays = 0
    for data in sets:
        try:
            if experiment.zenodo is not None:
                digests |= verify_published(experiment.zenodo, data, known)
                arrays += 4
            else:
                arrays += len(verify(root, data)["files"])
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError(f"{len(problems)} of {len(sets)} data sets fail; first: {problems[0]}")
    if experiment.hashes is not None and not known:
        write_json(experiment.hashes, digests)
    return {"verified": len(sets), "arrays": arrays, "known_hashes": len(known)}


STYLES = {
    "key": "bold cyan",
    "value": "bold green",
    "content": "bold cyan",
    "noise": "dim",
    "filler": "dim",
    "blank": "dim",
    "padding": "dim",
}


def show(experiment: Experiment) -> dict[str, Any]:
    """Print one row of each chosen task's baseline with its answers below the inputs."""
    from rich.console import Console

    console = Console()
    seen: set[str] = set()
    for data in data_sets(experiment):
        if data.task in seen:
            continue
        seen.add(data.task)
        rows, task = one_row(experiment, data), data.setting
        console.print(f"{data.task}, {experiment.split} row {experiment.row}: {task}", style="bold")
        for line in lines_of(task, rows, max(console.width - 12, 20)):
            console.print(line, soft_wrap=True)
        console.print(legend(task))
    return {"shown": len(seen)}


def one_row(experiment: Experiment, data: DataSet) -> Rows:
    """The row to show, drawn afresh or read from the published files."""
    split: Split = experiment.split
    if experiment.row >= data.sizes[split]:
        raise ConfigError(f"row={experiment.row}: split {split} has {data.sizes[split]} rows")
    at = slice(experiment.row, experiment.row + 1)
    if experiment.zenodo is not None:
        return Rows(*(part[at] for part in load_published(experiment.zenodo, data, split)))
    return generate(
        data.setting,
        1,
        split,
        data.seed,
        experiment.row,
        legacy=data.legacy,
        train_rows=data.num_train_examples,
    )


def lines_of(task: Task, rows: Rows, width: int) -> Iterator[Text]:
    """Inputs above answers, cut into lines of that many columns."""
    from rich.text import Text

    cell = len(str(task.vocab_size - 1)) + 1
    kinds = task.token_kinds()

    def styled(token: int) -> str:
        return next((STYLES.get(k, "magenta") for k, r in kinds.items() if token in r), "red")

    inputs, answers = rows.inputs[0].tolist(), rows.answers[0].tolist()
    per_line = max(width // cell, 1)
    for start in range(0, len(inputs), per_line):
        part = slice(start, start + per_line)
        line = Text("inputs   ")
        for token in inputs[part]:
            line.append(f"{token:>{cell}}", style=styled(token))
        yield line
        line = Text("answers  ")
        for token in answers[part]:
            text = "·" if token == IGNORE else str(token)
            line.append(f"{text:>{cell}}", style="dim" if token == IGNORE else "bold yellow")
        yield line


def legend(task: Task) -> Text:
    """What the colours mean: the tokens of each kind."""
    from rich.text import Text

    text = Text("tokens   ")
    for name, kind in task.token_kinds().items():
        if len(kind):
            span = f"{kind[0]}" if len(kind) == 1 else f"{kind[0]}–{kind[-1]}"
            text.append(f" {name} {span}", style=STYLES.get(name, "magenta"))
    return text


if __name__ == "__main__":
    cli(main, EXPERIMENT)
