"""Settings from code, YAML and flags: precedence, exact round trip, one message per mistake."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
import tyro
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench import cli as front
from workbench.cli import RunField, RunOptions
from workbench.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DivergedError,
    GateFailed,
    Interrupted,
    MissingExtra,
    unknown_name,
)
from workbench.run import to_plain


@dataclass(frozen=True)
class Optim:
    """How to step."""

    lr: float = 1e-3
    """Step size."""


@dataclass(frozen=True)
class Experiment:
    """Everything a field may be."""

    steps: int = 10
    """Steps."""
    kind: Literal["a", "b"] = "a"
    """Kind."""
    layers: tuple[str, ...] = ("x",)
    """Layers."""
    pair: tuple[int, int] = (1, 2)
    """Pair."""
    ceiling: int | None = None
    """Ceiling."""
    data: Path = Path("d")
    """Data."""
    title: str = "t"
    """Title."""
    loud: bool = False
    """Loud."""
    optim: Optim = Optim()
    """Optimiser."""
    run: RunField = RunOptions()

    def __post_init__(self):
        if self.steps < 1:
            raise ConfigError(f"steps={self.steps}: expected at least 1")


def from_yaml(text: str, tmp_path: Path, default: Experiment | None = None) -> Experiment:
    file = tmp_path / "s.yaml"
    file.write_text(text, encoding="utf-8")
    return front.parse(default or Experiment(), ["--config", str(file)])[0]


def test_later_sources_win(tmp_path):
    default = Experiment(steps=3, title="code")
    a, b = tmp_path / "a.yaml", tmp_path / "b.yaml"
    a.write_text("steps: 4\noptim: {lr: 1e-2}\nname: one\n", encoding="utf-8")
    b.write_text("steps: 5\nrun: {threads: 2}\n", encoding="utf-8")
    parsed, _ = front.parse(default, ["--config", str(a), "--config", str(b), "--loud"])
    assert (parsed.steps, parsed.title, parsed.loud) == (5, "code", True)
    assert parsed.optim.lr == 0.01, "1e-2 is text to YAML and a number to us"
    assert (parsed.run.name, parsed.run.threads) == ("one", 2)
    assert front.parse(default, ["--config", str(a), "--steps", "9"])[0].steps == 9
    assert front.parse(default, ["--optim.lr", "0.5", "--no-wandb"])[0].optim.lr == 0.5


@pytest.mark.parametrize(
    ("word", "field", "expected"),
    [
        ("steps=7", "steps", 7),
        ("kind=b", "kind", "b"),
        ("layers=p,q", "layers", ("p", "q")),
        ("layers=p q", "layers", ("p", "q")),
        ("layers=1,2", "layers", ("1", "2")),
        ("layers=z", "layers", ("z",)),
        ("layers=", "layers", ()),
        ("pair=3, 4", "pair", (3, 4)),
        ("ceiling=-2", "ceiling", -2),
        ("ceiling=None", "ceiling", None),
        ("data=a b/c", "data", Path("a b/c")),
        ("title=12", "title", "12"),
        ("title=a=b", "title", "a=b"),
        ("title=null", "title", "null"),
        ("loud=true", "loud", True),
        ("optim.lr=1e-4", "optim", Optim(1e-4)),
    ],
)
def test_set_gives_one_field_a_value_of_its_type(word, field, expected):
    for words in (["--set", word], [f"--set={word}"]):
        parsed, _ = front.parse(Experiment(ceiling=5), words)
        assert getattr(parsed, field) == expected
        assert type(getattr(parsed, field)) is type(expected)


def test_set_stands_between_files_and_flags(tmp_path):
    file = tmp_path / "s.yaml"
    file.write_text("steps: 4\ntitle: file\n", encoding="utf-8")
    words = ["--set", "steps=5", "--config", str(file), "--title", "flag", "--set", "title=set"]
    words += ["--set", "threads=2", "--set", "optim.lr=0.5", "--set", "run.name=n"]
    parsed, _ = front.parse(Experiment(), words)
    assert (parsed.steps, parsed.title, parsed.optim.lr) == (5, "flag", 0.5)
    assert (parsed.run.threads, parsed.run.name) == (2, "n")
    assert front.parse(Experiment(), ["--set", "steps=5", "--set", "steps=6"])[0].steps == 6


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("stepz=1", r"--set: unknown key 'stepz'; perhaps you meant steps"),
        ("optim.lrr=1", r"optim: unknown key 'lrr'; perhaps you meant lr"),
        ("optm.lr=1", r"unknown key 'optm'; perhaps you meant optim"),
        ("steps=many", r"--set: steps: found 'many', expected int"),
        ("steps=0", r"expected at least 1"),
        ("kind=c", r"expected one of a, b"),
        ("pair=1,2,3", r"pair"),
        ("optim=3", r"optim: found"),
        ("steps", r"--set steps: expected key=value"),
        ("=3", r"expected key=value"),
    ],
)
def test_set_names_its_mistakes_and_ends_with_2(monkeypatch, capsys, word, message):
    with pytest.raises(ConfigError, match=message):
        front.parse(Experiment(), ["--set", word])
    assert run_cli(monkeypatch, lambda experiment: {}, "--set", word) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ")
    assert text.count("\n") == 1
    assert len(text) <= 1100


@dataclass(frozen=True)
class Inner:
    """A block with a block and two names that others have as well."""

    optim: Optim = Optim()
    """Optimiser."""
    steps: int = 1
    """Steps."""
    quick: bool = True
    """Quick."""
    twice: int = 0
    """Twice."""


@dataclass(frozen=True)
class Other:
    """Another block."""

    twice: int = 0
    """Twice."""


@dataclass(frozen=True)
class Nested:
    """Blocks with and without a name."""

    steps: int = 10
    """Steps."""
    inner: Inner = Inner()
    """Named."""
    flat: Annotated[Other, tyro.conf.arg(name="")] = Other()
    """Without a name."""
    third: Other = Other()
    """Named."""


def test_the_last_name_of_a_flag_suffices_where_no_other_has_it(capsys):
    def parsed(*words):
        return front.parse(Nested(), list(words))[0]

    assert parsed("--lr", "0.5").inner.optim.lr == 0.5
    assert parsed("--lr=0.5") == parsed("--inner.optim.lr", "0.5")
    assert parsed("--no-quick") == parsed("--inner.no-quick") == parsed("--no_quick")
    assert parsed("--no-quick").inner.quick is False
    assert parsed("--steps", "3") == Nested(steps=3)  # a name of its own comes first
    assert parsed("--twice", "3") == Nested(flat=Other(3))
    only = front.in_full(Nested, ["--twice", "--quick", "x", "--", "quick", "--unknown"])
    assert only == ["--twice", "--inner.quick", "x", "--", "quick", "--unknown"]
    with pytest.raises(SystemExit):
        parsed("--lrr", "0.5")


TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), max_size=10)


@settings(max_examples=80, deadline=None)
@given(
    steps=st.integers(1, 10**12),
    title=TEXTS | st.sampled_from(["--help", "no", "1e-3", "012", "null", "~", "- x", "{a: b}"]),
    layers=st.lists(TEXTS, max_size=3).map(tuple),
    ceiling=st.none() | st.integers(-9, 9),
    lr=st.floats(allow_nan=False, allow_infinity=False),
    loud=st.booleans(),
)
def test_printed_settings_read_back_exactly(steps, title, layers, ceiling, lr, loud):
    original = Experiment(
        steps=steps, title=title, layers=layers, ceiling=ceiling, loud=loud, optim=Optim(lr)
    )
    text = yaml.safe_dump(to_plain(original), sort_keys=False, allow_unicode=True)
    back = front.apply_settings(Experiment(), yaml.load(text, front._StrictLoader), "file")
    assert back == original


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz: 1", r"unknown key 'stepz'; perhaps you meant steps"),
        ("optim: {lrr: 1}", r"optim: unknown key 'lrr'; perhaps you meant lr"),
        ("steps: many", r"steps: found 'many', expected int"),
        ("steps: 1.5", r"steps: found 1.5, expected int"),
        ("steps: true", r"steps: found True, expected int"),
        ("steps: 0", r"expected at least 1"),
        ("kind: c", r"found 'c', expected one of a, b"),
        ("layers: x", r"layers: found 'x', expected a list"),
        ("layers: [1]", r"layers\[0\]: found 1, expected str"),
        ("pair: [1]", r"1 values, expected 2"),
        ("loud: yes please", r"expected bool"),
        ("optim: 3", r"expected `name: value` lines"),
        ("- 1", r"expected `name: value` lines"),
        ("steps: 1\nsteps: 2", r"line 2: key 'steps' occurs twice"),
        ("1: 2", r"key 1 is no name"),
        ("steps: [", r"line 1|line 2"),
        ("a: &x [1]\nb: *x", r"aliases"),
        ("a: " + "[" * 60 + "]" * 60, r"levels"),
        ("a: [" + "1," * 20_000 + "]", r"more than"),
        ("a: !!python/object/apply:os.system ['true']", r"not valid YAML"),
    ],
)
def test_a_mistake_in_a_settings_file_is_named_with_its_place(tmp_path, text, message):
    begin = time.monotonic()
    with pytest.raises(ConfigError, match=message) as caught:
        from_yaml(text, tmp_path)
    assert "s.yaml" in str(caught.value) or "expected at least" in str(caught.value)
    assert len(str(caught.value)) <= 1000
    assert time.monotonic() - begin < 5


def test_settings_files_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "l.yaml").write_bytes("title: é".encode("latin-1"))
    with pytest.raises(ConfigError, match="not UTF-8 at byte 7"):
        front.read_yaml(tmp_path / "l.yaml")
    (tmp_path / "big.yaml").write_bytes(b"#" * (2**20 + 1))
    with pytest.raises(ConfigError, match="larger than"):
        front.read_yaml(tmp_path / "big.yaml")
    with pytest.raises(ConfigError, match="no such file; nearest: l.yaml"):
        front.read_yaml(tmp_path / "m.yaml")
    (tmp_path / "bom.yaml").write_bytes("﻿steps: 3".encode())
    assert front.read_yaml(tmp_path / "bom.yaml") == {"steps": 3}


def run_cli(monkeypatch, main, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["prog", *arguments])
    main.__module__ = __name__
    with pytest.raises(SystemExit) as caught:
        front.cli(main, Experiment())
    return int(caught.value.code or 0)


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (ConfigError("a wrong flag"), 2, "error: a wrong flag"),
        (DataError("f.jsonl:3: label"), 2, "f.jsonl:3"),
        (CheckpointError("cut"), 2, "cut"),
        (DivergedError("nan"), 2, "nan"),
        (MissingExtra("pip install"), 2, "pip install"),
        (GateFailed("recovery 0.5 < 0.9"), 3, "gate not met: recovery"),
        (Interrupted(15, "saved step 3; run the same command"), 143, "saved step 3"),
        (Interrupted(2, "saved step 3"), 130, "interrupted"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (FileNotFoundError(2, "No such file or directory", "x.txt"), 2, "x.txt: No such file"),
        (MemoryError(), 2, "out of memory"),
        (BrokenPipeError(), 0, ""),
    ],
)
def test_every_end_has_its_exit_status_and_one_line(monkeypatch, capsys, error, status, words):
    def main(experiment):
        raise error

    if isinstance(error, BrokenPipeError):
        monkeypatch.setattr(front.os, "dup2", lambda *a: None)
    assert run_cli(monkeypatch, main) == status
    text = capsys.readouterr().err
    assert words in text
    assert "Traceback" not in text
    assert len(text) <= 1100


def test_a_defect_of_ours_keeps_its_traceback(monkeypatch):
    def main(experiment):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_cli(monkeypatch, main)

    def wrong(experiment):
        raise ConfigError("x")

    with pytest.raises(ConfigError):
        run_cli(monkeypatch, wrong, "--traceback")


def test_results_are_shown_and_flags_reach_main(monkeypatch, capsys):
    def main(experiment):
        return {"accuracy": 0.98765, "steps": experiment.steps, "curve": [1, 2]}

    assert run_cli(monkeypatch, main, "--steps", "7") == 0
    assert capsys.readouterr().out.splitlines() == ["accuracy  0.9877", "steps     7"]


def test_a_sweep_that_does_not_exist_is_refused(monkeypatch, capsys):
    assert run_cli(monkeypatch, lambda e: {}, "--sweep") == 2
    assert "no list of experiments" in capsys.readouterr().err


def test_unknown_names_get_their_nearest():
    message = str(unknown_name("layer", "atention", ["attention", "mlp", "hyena"]))
    assert "nearest: attention" in message
    assert json.dumps(message)
