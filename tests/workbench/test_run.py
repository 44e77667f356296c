"""The run's folder: key, record, phases, units, figures, and what it refuses."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import yaml

from workbench.errors import CheckpointError, ConfigError, DivergedError, Interrupted
from workbench.run import (
    REPORT_ROWS,
    Run,
    RunOptions,
    finite_or_null,
    settings_key,
    settings_of,
)
from workbench.tables import read_csv
from workbench.tiny import byte_tokenizer, tiny_model


@dataclass(frozen=True)
class Experiment:
    width: int = 3
    data: Path = Path("a/b")
    seed: int = 1
    run: RunOptions = RunOptions()


def at(folder: Path, **changes) -> Experiment:
    return Experiment(run=RunOptions(root=folder, threads=1, **changes))


def test_the_key_depends_on_settings_and_script_but_not_on_where_it_runs(tmp_path):
    a = Run("p.s", at(tmp_path))
    assert a.key == settings_key("p.s", {"width": 3, "data": "a/b", "seed": 1})
    assert Run("p.s", at(tmp_path / "x", device="cpu", name="n")).key == a.key
    assert Run("p.other", at(tmp_path)).key != a.key
    assert Run("p.s", replace(at(tmp_path), width=4)).key != a.key
    assert a.directory == tmp_path / "p" / f"s-{a.key[:8]}"


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "x" * 200, "a\0b"])
def test_names_cannot_leave_the_root(tmp_path, name):
    with pytest.raises(ConfigError, match="--name"):
        Run("p.s", at(tmp_path, name=name or " "))


def test_a_finished_run_holds_its_record_and_returns_at_once(tmp_path):
    from matplotlib.figure import Figure

    with Run.open("p.s", at(tmp_path)) as run:
        assert not run.finished
        run.log(1, {"loss": torch.tensor(2.0), "bad": float("nan")})
        run.table("scores", [{"a": 1, "b": "x"}], caption="Scores.")
        figure = Figure()
        figure.add_subplot().plot([0, 1])
        run.figure("curve", figure, [{"x": 0, "y": 1}], caption="A curve, n = 2.", alt="It rises.")
        run.save_tensors("w.safetensors", {"w": torch.zeros(1)})
        values = run.finish({"loss": 2.0, "nan": float("nan")}, title="T", summary="S.")
    assert values == {"loss": 2.0, "nan": None}
    folder = run.directory
    assert yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")) == settings_of(
        at(tmp_path)
    )
    line = json.loads((folder / "metrics.jsonl").read_text(encoding="utf-8"))
    assert line["loss"] == 2.0
    assert line["bad"] is None
    assert line["non_finite"] == ["bad"]
    record = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert record["figures"] == [
        {"name": "curve", "caption": "A curve, n = 2.", "alt": "It rises."}
    ]
    assert {p.suffix for p in (folder / "figures").iterdir()} == {".svg", ".png", ".csv"}
    svg = (folder / "figures" / "curve.svg").read_text(encoding="utf-8")
    assert "A curve, n = 2." in svg
    report = (folder / "report.md").read_text(encoding="utf-8")
    assert "# T" in report
    assert "figures/curve.png" in report
    environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    assert environment["packages"]["torch"]
    with Run.open("p.s", at(tmp_path)) as again:
        assert again.finished
        assert again.results == values


def test_a_long_table_is_cut_in_the_report_and_whole_in_the_file(tmp_path):
    with Run.open("p.s", at(tmp_path)) as run:
        run.table("short", [{"i": i} for i in range(REPORT_ROWS)])
        run.table("long", [{"i": 1000 + i} for i in range(REPORT_ROWS + 3)])
        run.finish({})
    report = (run.directory / "report.md").read_text(encoding="utf-8")
    assert f"| {REPORT_ROWS - 1} |" in report
    assert f"| {1000 + REPORT_ROWS - 1} |" in report
    assert f"| {1000 + REPORT_ROWS} |" not in report
    assert report.count("more rows") == 1
    assert "3 more rows: tables/long.csv" in report
    assert len(read_csv(run.directory / "tables" / "long.csv")) == REPORT_ROWS + 3


def test_the_console_is_told_where_the_report_is_but_not_by_runs_within_a_run(tmp_path, capsys):
    for _ in range(2):
        with Run.open("p.outer", at(tmp_path)) as run:
            with Run.open("p.inner", at(tmp_path)) as inner:
                if not inner.finished:
                    inner.finish({"x": 1})
            if not run.finished:
                run.finish({"x": 1})
    told = [line for line in capsys.readouterr().err.splitlines() if "report.md" in line]
    report = run.directory / "report.md"
    assert told == [f"report: {report}", f"finished before: {report} (--fresh computes again)"]


def test_a_finished_run_tells_that_its_model_folder_is_another_by_now(tmp_path, capsys):
    folder = tmp_path / "model"
    tiny_model("gpt2").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    with Run.open("p.s", at(tmp_path)) as run:
        run.load_model(folder)
        run.load_model("tiny:gpt2", what="base")
        run.finish({"x": 1})

    def told():
        with Run.open("p.s", at(tmp_path)) as again:
            assert again.finished
        return capsys.readouterr().err.splitlines()[-1]

    usual = f"finished before: {run.directory / 'report.md'} (--fresh computes again)"
    assert told() == usual
    tiny_model("gpt2", seed=1).save_pretrained(folder)
    assert told() == f"{usual}; {folder} has changed since"
    shutil.rmtree(folder)
    assert told() == usual
    (run.directory / "environment.json").write_text("[]", encoding="utf-8")
    assert told() == usual


def test_fresh_puts_the_old_run_aside(tmp_path):
    with Run.open("p.s", at(tmp_path)) as run:
        run.finish({"x": 1})
    with Run.open("p.s", at(tmp_path, fresh=True)) as run:
        assert not run.finished
    (old,) = (tmp_path / "p").glob("s-*.old-*")
    assert (old / "results.json").is_file()


def test_a_unit_is_computed_once(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return {"x": torch.arange(3), "n": (1, None)}

    for _ in range(2):
        with Run.open("p.s", at(tmp_path)) as run:
            unit = run.once("a/b c", compute)
            assert unit["n"] == (1, None)
            assert unit["x"].tolist() == [0, 1, 2]
    assert len(calls) == 1
    assert [p.name for p in (run.directory / "units").iterdir()] == ["a_b_c"]


def test_only_the_last_two_checkpoints_of_a_phase_are_kept(tmp_path):
    model = torch.nn.Linear(2, 2)
    with Run.open("p.s", at(tmp_path)) as run:
        for phase in ("a", "b"):
            for step in run.steps(10, {"model": model}, save_every=3, phase=phase):
                run.log(step, {"x": step})
    for phase in ("a", "b"):
        names = sorted(p.name for p in (run.directory / "checkpoints" / phase).iterdir())
        assert names == ["step_00000009", "step_00000010"]
    lines = (run.directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 20


def test_a_checkpoint_never_holds_a_nan(tmp_path):
    model = torch.nn.Linear(2, 2)
    with Run.open("p.s", at(tmp_path)) as run, pytest.raises(DivergedError, match=r"model\.weight"):
        for step in run.steps(4, {"model": model}, save_every=1):
            if step == 3:
                with torch.no_grad():
                    model.weight[0, 0] = float("nan")
    names = sorted(p.name for p in (run.directory / "checkpoints" / "train").iterdir())
    assert names == ["step_00000001", "step_00000002"]


def test_artefacts_stay_inside_the_folder(tmp_path):
    with (
        Run.open("p.s", at(tmp_path)) as run,
        pytest.raises(ConfigError, match="outside"),
    ):
        run.save_text("../../evil.txt", "x")


def test_non_finite_values_become_null_and_are_named():
    assert finite_or_null({"a": float("inf"), "b": 1, "c": torch.tensor(0.5)}) == {
        "a": None, "b": 1, "c": 0.5, "non_finite": ["a"],
    }  # fmt: skip


def test_too_little_space_is_refused_before_any_work(tmp_path, monkeypatch):
    import shutil

    monkeypatch.setattr("workbench.run.SPARE_BYTES", shutil.disk_usage(tmp_path).total * 2)
    with pytest.raises(ConfigError, match="bytes free"), Run.open("p.s", at(tmp_path)):
        raise AssertionError("must not begin")


class Counted:
    """State that is one number."""

    def __init__(self, value: float):
        self.value = value

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


@pytest.mark.parametrize(("higher", "best"), [(True, 4), (False, 2)])
def test_the_best_checkpoint_stays_beside_the_last_two(tmp_path, higher, best):
    scores = {1: 0.5, 2: 0.1, 3: 0.5, 4: 0.9, 5: 0.9, 6: 0.2}
    state = {"thing": Counted(0)}
    with Run.open("p.s", at(tmp_path)) as run:
        for step in run.steps(6, state, save_every=1):
            state["thing"].value = step
            beaten = run.keep_best(step, state, scores[step], higher=higher)
            assert beaten == (step in ({1, 4} if higher else {1, 2}))
        assert run.load_best(state) == best
        assert state["thing"].value == best
    names = sorted(p.name for p in (run.directory / "checkpoints" / "train").iterdir())
    assert names == ["best", "step_00000005", "step_00000006"]
    with Run.open("p.s", at(tmp_path)) as again:  # a resumed run meets the same scores again
        assert not again.keep_best(best, state, scores[best], higher=higher)
        manifest = run.directory / "checkpoints" / "train" / "best" / "tree.json"
        manifest.write_bytes(manifest.read_bytes()[:-9])
        with pytest.raises(CheckpointError, match="no good checkpoint"):
            again.load_best(state)


def test_another_input_under_the_same_name_is_refused(tmp_path):
    with Run.open("p.s", at(tmp_path)) as run:
        run.require_same("features", "a" * 64)
        run.require_same("labels", "c" * 64)
    with Run.open("p.s", at(tmp_path)) as run:
        run.require_same("features", "a" * 64)
        with pytest.raises(ConfigError, match="labels has changed since this run began"):
            run.require_same("labels", "b" * 64)
    with Run.open("p.s", at(tmp_path, fresh=True)) as run:
        run.require_same("labels", "b" * 64)


def test_a_model_with_one_changed_weight_is_another_model(tmp_path, monkeypatch):
    from workbench import models

    with Run.open("p.s", at(tmp_path, device="cpu")) as run:
        run.load_model("tiny:mistral")
    load = models.load_model

    def changed(*arguments, **options):
        model, tokenizer = load(*arguments, **options)
        with torch.no_grad():
            list(model.parameters())[-1].view(-1)[-1] += 1e-6
        return model, tokenizer

    with Run.open("p.s", at(tmp_path, device="cpu")) as run:
        run.load_model("tiny:mistral")
        monkeypatch.setattr(models, "load_model", changed)
        with pytest.raises(ConfigError, match="model has changed"):
            run.load_model("tiny:mistral")


def test_a_run_inside_a_run_that_was_told_to_stop_does_one_step_and_saves_it(tmp_path):
    begun = []
    with (
        pytest.raises(Interrupted, match="saved step 1"),
        Run.open("p.outer", at(tmp_path)),
    ):
        signal.raise_signal(signal.SIGTERM)
        with Run.open("p.inner", at(tmp_path)) as inner:
            for step in inner.steps(50, {"model": torch.nn.Linear(2, 2)}):
                begun.append(step)
    assert begun == [1]


def test_a_signal_that_a_finishing_inner_run_met_stops_the_outer_one(tmp_path):
    with pytest.raises(Interrupted), Run.open("p.outer", at(tmp_path)) as outer:
        with Run.open("p.inner", at(tmp_path)) as inner:
            inner.finish({})
            signal.raise_signal(signal.SIGTERM)
        outer.check_interrupt()
