"""The steps of an architecture: which they are, what is drawn of them, that nothing is repeated."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from mad.architecture_improvement import (
    STEPS,
    TABLE,
    Experiment,
    benchmark_of,
    figure_of,
    main,
    wide_rows,
)
from mad.benchmark import main as run_benchmark
from mad.grid import BENCHMARK_TASKS, split_stack
from tests.mad.tables import score_rows, six
from workbench.errors import ConfigError
from workbench.run import RunOptions
from workbench.storage import read_json
from workbench.tables import read_csv

TINY = Experiment(
    stacks=("base: mlp", "other: swiglu"),
    settings=("memorization,vocab_size=16,seq_len=8,num_train_examples=64",),
    lrs=(1e-2,),
    weight_decays=(0.0,),
    seeds=(0,),
    dim=8,
    batch_size=32,
    epochs=3,
    num_test_examples=32,
    executor="serial",
)
MODELS = [
    {"stack": name, "layers": ["mlp"], "scores": score_rows(name, six(start))}
    for name, start in (("one", 0.1), ("two", 0.5), ("three", 0.3))
]


def at(folder: Path, **changes) -> Experiment:
    return replace(TINY, run=RunOptions(root=folder, device="cpu", threads=1), **changes)


def test_the_published_steps_change_one_kind_of_layer_at_a_time():
    layers = [split_stack(step)[1] for step in STEPS]
    assert layers[2] == ("mh-hyena", "swiglu", "mh-attention", "swiglu")
    changed = [
        {(a, b) for a, b in zip(one, other, strict=True) if a != b}
        for one, other in itertools.pairwise(layers)
    ]
    assert changed == [
        {("hyena", "mh-hyena")},
        {("mh-hyena", "mh-attention")},
        {("swiglu", "moe-mlp")},
    ]
    work = main(Experiment(dry_run=True))
    assert (work["settings"], work["runs"]) == (66, 4 * 396)


def test_lines_and_bars_ascend_and_carry_the_numbers():
    lines = wide_rows(MODELS)
    assert [line["model"] for line in lines] == ["one", "three", "two"]
    assert list(lines[0])[2:9] == [*BENCHMARK_TASKS, "MAD"]
    assert lines[-1]["MAD"] == pytest.approx(0.625)
    assert (lines[-1]["low"], lines[-1]["high"]) == pytest.approx((0.605, 0.645))
    left, right = figure_of(MODELS).axes
    assert [t.get_text() for t in left.get_yticklabels()] == ["one", "three", "two"]
    assert [bar.get_width() for bar in left.patches] == pytest.approx([0.225, 0.425, 0.625])
    assert [t.get_text() for t in right.get_yticklabels()] == list(BENCHMARK_TASKS)
    assert len(right.patches) == 18
    assert right.patches[0].get_width() == pytest.approx(0.1)
    assert left.patches[1].get_facecolor() == right.patches[6].get_facecolor()  # "three"


def test_variants_are_benchmarked_once_and_copied_where_asked(tmp_path):
    values = main(at(tmp_path))
    assert values["mean"] == "mean of 1 task"
    trained = list(tmp_path.glob("mad/train-*/results.json"))
    assert len(trained) == 2
    seen = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("results.json")}
    folders = {"results_path": tmp_path / "r", "figures_path": tmp_path / "f"}
    assert main(at(tmp_path, **folders)) == values
    scores = run_benchmark(benchmark_of(at(tmp_path)))  # the same benchmark, found again
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("results.json")} == seen
    (table,) = (tmp_path / "r").iterdir()
    assert table.name == f"{TABLE}.csv"
    rows = {row["model"]: row for row in read_csv(table)}
    for name in ("base", "other"):
        assert rows[name]["mean of 1 task"] == scores[f"{name}: mean of 1 task"] == values[name]
    assert {path.name for path in (tmp_path / "f").iterdir()} == {f"{TABLE}.png", f"{TABLE}.svg"}
    (record,) = tmp_path.glob("mad/architecture_improvement-*/results.json")
    assert [one["name"] for one in read_json(record)["figures"]] == [TABLE]


def test_unknown_layers_are_refused():
    with pytest.raises(ConfigError, match="nearest: mh-hyena"):
        replace(TINY, stacks=("mh-hyna mlp",))
