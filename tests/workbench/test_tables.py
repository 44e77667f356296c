from __future__ import annotations

import csv
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.errors import ConfigError, DataError
from workbench.tables import (
    beside_published,
    columns_of,
    format_value,
    read_csv,
    read_published,
    to_markdown,
    write_csv,
)

TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12)


def stays(text: str) -> bool:
    """Whether text is told apart from a number, a truth value and nothing."""
    if text in ("", "true", "false"):
        return False
    try:
        float(text)
    except ValueError:
        return True
    return False


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "name": TEXT.filter(stays),
                "n": st.integers(-(10**12), 10**12),
                "x": st.floats(allow_nan=False),
                "ok": st.booleans(),
                "maybe": st.none() | st.integers(),
            }
        ),
        min_size=1,
        max_size=6,
    )
)
def test_rows_round_trip(tmp_path_factory, rows):
    path = write_csv(tmp_path_factory.mktemp("t") / "t.csv", rows)
    assert read_csv(path) == rows


@pytest.mark.parametrize("text", ['=cmd|"/c calc"!A1', "+1+1", "-1-1", "@SUM(A1)", "\t=1", "'=1"])
def test_formulas_are_inert_and_come_back(tmp_path, text):
    path = write_csv(tmp_path / "t.csv", [{"name": text, "=evil": 1}])
    with open(path, encoding="utf-8", newline="") as handle:
        header, row = list(csv.reader(handle))
    assert row[0].startswith("'")
    assert header[1] == "'=evil"
    assert read_csv(path) == [{"name": text, "=evil": 1}]


def test_a_negative_number_is_no_formula(tmp_path):
    path = write_csv(tmp_path / "t.csv", [{"a": -1, "b": -0.5, "c": float("-inf")}])
    assert path.read_text(encoding="utf-8") == "a,b,c\n-1,-0.5,-inf\n"
    assert read_csv(path) == [{"a": -1, "b": -0.5, "c": -math.inf}]


def test_arrays_missing_cells_and_leading_zeros(tmp_path):
    rows = [{"a": np.float64(0.5), "b": torch.tensor(3)}, {"c": "007", "a": None}]
    assert columns_of(rows) == ["a", "b", "c"]
    path = write_csv(tmp_path / "t.csv", rows)
    assert read_csv(path) == [{"a": 0.5, "b": 3, "c": None}, {"a": None, "b": None, "c": "007"}]


def test_damaged_csv_is_named(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("a,b\n1,2\n3\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"t\.csv:3: 1 cells, expected 2"):
        read_csv(path)
    path.write_bytes(b"a\n\xe9\n")
    with pytest.raises(DataError, match="UTF-8"):
        read_csv(path)
    with pytest.raises(DataError, match="no such file"):
        read_csv(tmp_path / "none.csv")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.98765, "0.9877"),
        (3.6041, "3.604"),
        (12.0, "12"),
        (0.0, "0"),
        (123456.7, "123457"),
        (0.00012345, "1.23e-04"),
        (-0.05, "-0.05"),
        (math.nan, "–"),
        (None, "–"),
        (math.inf, "∞"),
        (True, "yes"),
        (7, "7"),
    ],
)
def test_values_are_short_and_true(value, shown):
    assert format_value(value) == shown


def test_markdown_aligns_numbers_and_escapes():
    text = to_markdown([{"method": "a|b\nc", "x": 1.5}, {"method": "d", "x": None}])
    assert text.splitlines() == [
        "| method | x |",
        "| --- | ---: |",
        "| a\\|b c | 1.5 |",
        "| d | – |",
    ]
    assert to_markdown([{"a": 1, "b": 2}], ["b"]).splitlines()[0] == "| b |"
    assert to_markdown([]) == "(no rows)"


def test_published_beside_ours(tmp_path):
    path = tmp_path / "published.csv"
    path.write_text(
        "table,row,column,value,unit,source\n1,RTN,2 bit,8.0,perplexity,paper Table 1\n"
        "1,ours,2 bit,4.0,perplexity,paper Table 1\n2,x,y,0,share,paper Table 2\n",
        encoding="utf-8",
    )
    rows = beside_published(read_published(path), "1", {("ours", "2 bit"): 5.0})
    assert [(r["published"], r["ours"], r["ratio"]) for r in rows] == [
        (8.0, None, None),
        (4.0, 5.0, 1.25),
    ]
    assert beside_published(read_published(path), "2", {("x", "y"): 1.0})[0]["ratio"] is None
    with pytest.raises(ConfigError, match="known: 1, 2"):
        beside_published(read_published(path), "3", {})
    path.write_text("table,row,column,value,unit,source\n1,a,b,many,u,s\n", encoding="utf-8")
    with pytest.raises(DataError, match=r":2:value: found 'many'"):
        read_published(path)
    path.write_text("table,row\n1,2\n", encoding="utf-8")
    with pytest.raises(DataError, match="column: missing|missing column"):
        read_published(path)


MARKED = "# T\n\n<!-- table: t.csv columns=b,a digits=2 -->\nold\n<!-- end table -->\n\ntext\n"


def test_tables_in_markdown_are_written_and_checked(run_module, tmp_path):
    write_csv(tmp_path / "t.csv", [{"a": 1.234, "b": "x"}])
    readme = tmp_path / "README.md"
    readme.write_text(MARKED, encoding="utf-8")
    stale = run_module("workbench.tables", "README.md", "--check")
    assert stale.returncode == 3, stale.stderr
    assert "python -m workbench.tables README.md" in stale.stderr
    assert readme.read_text(encoding="utf-8") == MARKED
    assert run_module("workbench.tables", "README.md").returncode == 0
    text = readme.read_text(encoding="utf-8")
    assert "| b | a |\n| --- | ---: |\n| x | 1.2 |\n<!-- end table -->\n\ntext\n" in text
    assert run_module("workbench.tables", "README.md", "--check").returncode == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- table: t.csv -->\n", "closed"),
        (MARKED.replace("t.csv", "u.csv"), "no such file"),
        (MARKED.replace("b,a", "b,z"), "no column 'z'"),
        (MARKED.replace("digits=2", "digit=2"), "expected PATH"),
    ],
)
def test_bad_markers_are_named(tmp_path, text, message):
    from workbench.tables import Experiment, main

    write_csv(tmp_path / "t.csv", [{"a": 1.234, "b": "x"}])
    file = tmp_path / "README.md"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        main(Experiment(files=(file,)))
    assert file.read_text(encoding="utf-8") == text
