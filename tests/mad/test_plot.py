"""Figures of the benchmark from tables made by hand: what is on them, in which order."""

from pathlib import Path

import pytest

from mad.grid import BENCHMARK_TASKS
from mad.plot import (
    Experiment,
    bars_of,
    benchmark_folders,
    heat_map_of,
    in_order,
    main,
    read_benchmarks,
    scaling_rows,
    score_rows,
)
from tests.mad.tables import score_rows as rows_of
from tests.mad.tables import six, write_benchmark
from workbench.errors import ConfigError
from workbench.run import RunOptions
from workbench.storage import write_json
from workbench.tables import read_csv

ROWS = rows_of("low", six(0.1)) + rows_of("high", six(0.6)) + rows_of("middle", six(0.3))


def drawn(root: Path, **changes) -> dict:
    return main(Experiment(run=RunOptions(root=root, device="cpu", threads=1), **changes))


def names(root: Path) -> set[str]:
    return {path.name for path in root.glob("mad/plot-*/figures/*.png")}


def test_models_are_ordered_by_their_mean_and_tasks_as_published():
    stacks, tasks = in_order(ROWS)
    assert stacks == ["high", "middle", "low"]
    assert tasks == [*BENCHMARK_TASKS, "MAD"]
    mixed = [dict(ROWS[6]), *rows_of("low", {"mqar": 0.5, "memorization": 0.4}, "mean of 2 tasks")]
    assert in_order(mixed)[1] == ["memorization", "mqar", "MAD", "mean of 2 tasks"]


def test_every_cell_of_the_heat_map_has_its_number_and_interval():
    (axes, *_) = heat_map_of(ROWS).axes
    texts = [text.get_text() for text in axes.texts]
    assert len(texts) == 3 * 7
    assert texts[0] == "0.600\n0.580 to 0.620"  # best model, compression
    assert texts[-1] == "0.225\n0.205 to 0.245"  # last model, mean of six
    assert [label.get_text() for label in axes.get_yticklabels()] == ["high", "middle", "low"]


def test_the_bars_are_the_numbers_and_a_model_keeps_its_colour():
    figure = bars_of(ROWS)
    shown = [panel for panel in figure.axes if panel.get_visible()]
    assert [panel.get_title(loc="left") for panel in shown] == [*BENCHMARK_TASKS, "MAD"]
    widths = [[bar.get_width() for bar in panel.patches] for panel in shown]
    assert widths[0] == pytest.approx([0.6, 0.3, 0.1])
    assert widths[-1] == pytest.approx([0.725, 0.425, 0.225])
    colours = {tuple(bar.get_facecolor() for bar in panel.patches) for panel in shown}
    assert len(colours) == 1
    assert len(set(*colours)) == 3


def test_without_benchmarks_the_published_points_are_drawn(tmp_path):
    rows = scaling_rows()
    assert [row["mad_score"] for row in rows] == [0.66, 0.732, 0.766, 0.774, 0.783]
    values = drawn(tmp_path)
    assert values["benchmarks"] == 0
    assert values["spearman"] == pytest.approx(-1.0)
    assert -30 < values["slope"] < -15
    assert names(tmp_path) == {"scaling.png"}


def test_designs_never_share_a_figure_and_new_results_make_a_new_folder(tmp_path):
    write_benchmark(tmp_path, "benchmark-1", {"a": six(0.2), "b": six(0.4)})
    write_benchmark(tmp_path, "benchmark-2", {"b": six(0.5), "c": six(0.1)})
    write_benchmark(tmp_path, "benchmark-3", {"d": six(0.3)}, design="ffff0000", preset="mini")
    found = score_rows(read_benchmarks(benchmark_folders(tmp_path)))
    assert {name: {row["stack"] for row in rows} for name, rows in found.items()} == {
        "full-0123abcd": {"a", "b", "c"},
        "mini-ffff0000": {"d"},
    }
    assert len(found["full-0123abcd"]) == 21  # b is in two benchmarks and counts once
    values = drawn(tmp_path, published=False)
    assert values["mini-ffff0000: d"] == pytest.approx(0.425)
    assert names(tmp_path) == {
        f"{kind}-{design}.png"
        for kind in ("heat_map", "bars")
        for design in ("full-0123abcd", "mini-ffff0000")
    }
    (table,) = tmp_path.glob("mad/plot-*/figures/bars-mini-ffff0000.csv")
    assert read_csv(table)[0]["accuracy"] == 0.3
    write_benchmark(tmp_path, "benchmark-4", {"e": six(0.3)}, design="11112222")
    assert drawn(tmp_path, published=False)["benchmarks"] == 4
    assert len(list(tmp_path.glob("mad/plot-*"))) == 2


def test_a_folder_that_is_no_finished_benchmark_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no finished benchmark"):
        drawn(tmp_path, benchmarks=(tmp_path / "nothing",))
    (tmp_path / "other").mkdir()
    write_json(tmp_path / "other/results.json", {"values": {"accuracy": 1.0}})
    with pytest.raises(ConfigError, match=r"not the results of mad\.benchmark"):
        drawn(tmp_path, benchmarks=(tmp_path / "other",))
