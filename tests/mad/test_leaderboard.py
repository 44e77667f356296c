"""Tables of finished benchmarks: ranked, never of two designs, published rows marked."""

from pathlib import Path

import pytest

from mad.leaderboard import Experiment, leaderboards, main, published_lines
from mad.plot import benchmark_folders, read_benchmarks
from tests.mad.tables import six, write_benchmark
from workbench.errors import ConfigError
from workbench.run import RunOptions
from workbench.tables import read_csv


def board(root: Path, **changes) -> dict:
    return main(Experiment(run=RunOptions(root=root, device="cpu", threads=1), **changes))


def two_designs(root: Path) -> None:
    write_benchmark(root, "benchmark-1", {"a": six(0.2), "b": six(0.5)})
    write_benchmark(root, "benchmark-2", {"b": six(0.5), "c": six(0.615)})
    write_benchmark(root, "benchmark-3", {"d": six(0.8)}, design="ffff0000", preset="mini")
    write_benchmark(root, "benchmark-4", {"e": {"mqar": 0.9}}, design="eeee0000",
                    preset="custom", mean="mean of 1 task")  # fmt: skip


def test_published_scores_are_fractions_of_seven_columns():
    lines = {line["model"]: line for line in published_lines()}
    assert lines["Transformer"]["MAD"] == pytest.approx(0.745)
    assert lines["DeltaNet"]["memorization"] == pytest.approx(0.528)
    assert len(lines) == 6
    assert all(len(line) == 9 and line["source"].startswith("published") for line in lines.values())


def test_designs_stand_apart_and_published_rows_have_no_rank(tmp_path):
    two_designs(tmp_path)
    tables = leaderboards(read_benchmarks(benchmark_folders(tmp_path)), published=True)
    assert set(tables) == {"full-0123abcd", "mini-ffff0000", "custom-eeee0000"}
    full = tables["full-0123abcd"]
    assert [line["MAD"] for line in full] == sorted((line["MAD"] for line in full), reverse=True)
    assert [(line["rank"], line["model"]) for line in full if line["rank"]] == [
        (1, "c"), (2, "b"), (3, "a"),
    ]  # fmt: skip
    others = [line for line in full if line["rank"] is None]
    assert len(others) == 6
    assert all("published" in line["source"] and line["low"] is None for line in others)
    assert [line["model"] for line in full][:2] == ["Transformer", "c"]  # 0.745 and 0.74
    assert [line["model"] for line in tables["mini-ffff0000"]] == ["d"]
    assert tables["custom-eeee0000"][0]["mean"] == pytest.approx(0.9)
    assert "MAD" not in tables["custom-eeee0000"][0]


def test_new_results_make_a_new_folder_and_equal_ones_do_not(tmp_path):
    values = board(tmp_path)
    assert values["benchmarks"] == 0
    (table,) = tmp_path.glob("mad/leaderboard-*/tables/*.csv")
    assert table.name == "leaderboard-published.csv"
    assert [row["model"] for row in read_csv(table)][:2] == ["Transformer", "MH Hyena"]
    two_designs(tmp_path)
    values = board(tmp_path)
    assert board(tmp_path) == values
    assert len(list(tmp_path.glob("mad/leaderboard-*"))) == 2
    assert values["mini-ffff0000: d (here, benchmark-3)"] == pytest.approx(0.925)
    assert board(tmp_path, published=False)["benchmarks"] == 4
    found = list(tmp_path.glob("mad/leaderboard-*/tables/leaderboard-full-0123abcd.csv"))
    assert sorted(len(read_csv(path)) for path in found) == [3, 9]


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no finished benchmark"):
        board(tmp_path, benchmarks=(tmp_path / "nothing",))
