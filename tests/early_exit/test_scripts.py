"""The scripts as a user runs them: to the end, twice, after a crash, and with mistakes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import early_exit.inference as inference
import early_exit.sweep_thresholds as sweep
import early_exit.train as train
from workbench import storage
from workbench.cli import parse
from workbench.errors import ConfigError, DataError
from workbench.run import Run, RunOptions

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "early_exit"


def experiment(module, name: str, folder: Path, **changes):
    config = CONFIGS / f"{name}.yaml"
    parsed, _ = parse(module.EXPERIMENT, ["--config", str(config)])
    return replace(parsed, run=RunOptions(root=folder, threads=1), **changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The run folder of the tiny training."""
    root = tmp_path_factory.mktemp("trained")
    results = train.main(experiment(train, "train.tiny", root))
    (folder,) = (root / "early_exit").glob("train-*")
    assert results["tokens"] > 300
    return folder


def test_training_reports_every_exit(trained):
    record = storage.read_json(trained / "results.json")
    assert {"exit_1_agreement", "exit_2_auroc_gate"} <= set(record["values"])
    assert [figure["name"] for figure in record["figures"]] == ["exits", "reliability"]
    for name in ("exits.safetensors", "exit_config.json", "report.md", "figures/exits.svg"):
        assert (trained / name).stat().st_size > 0
    config = storage.read_json(trained / "exit_config.json")
    assert (config["exits"], config["emission"], config["label_topk"]) == ([1, 2], "affine", 1)


@pytest.mark.parametrize("phase", ["translators", "gates"])
def test_a_crash_changes_nothing(trained, tmp_path, monkeypatch, phase):
    class Crash(Exception):
        pass

    log = Run.log

    def crash(self, step, values):
        if self.phase == phase and step >= 20:
            raise Crash
        log(self, step, values)

    given = experiment(train, "train.tiny", tmp_path)
    monkeypatch.setattr(Run, "log", crash)
    with pytest.raises(Crash):
        train.main(given)
    monkeypatch.setattr(Run, "log", log)
    results = train.main(given)
    (folder,) = (tmp_path / "early_exit").glob("train-*")
    assert (folder / "exits.safetensors").read_bytes() == (
        trained / "exits.safetensors"
    ).read_bytes()
    assert results == storage.read_json(trained / "results.json")["values"]
    assert train.main(given) == results  # finished: returns at once


def test_the_backbone_is_not_touched(trained, tmp_path, monkeypatch):
    import workbench.models as models

    kept = []
    load = models.load_model

    def keep(*arguments, **options):
        kept.append(load(*arguments, **options))
        return kept[-1]

    monkeypatch.setattr(models, "load_model", keep)
    train.main(experiment(train, "train.tiny", tmp_path, seed=1))
    model, fresh = kept[0][0], load("tiny:mistral")[0]
    for (name, value), other in zip(model.named_parameters(), fresh.parameters(), strict=True):
        assert value.equal(other), name
        assert value.grad is None, name


def test_sweeping_trained_exits(trained, tmp_path):
    given = experiment(
        sweep, "sweep_thresholds.tiny", tmp_path, exits=trained, accounting="dynamax"
    )
    results = sweep.main(given)
    for policy in ("propagate", "defer"):
        for speed in ("1.1x", "1.3x"):
            for key in ("agreement", "speedup_blocks", "speedup_arithmetic", "speedup_seconds"):
                assert results[f"{policy}_{speed}_{key}"] > 0
    assert results["defer_1.3x_speedup_work"] == 1.0
    assert "propagate_1.1x_speedup_dynamax" in results
    (folder,) = (tmp_path / "early_exit").glob("sweep_thresholds-*")
    for name in ("decoded", "baselines", "criteria", "sources", "curve", "exits"):
        assert (folder / "tables" / f"{name}.csv").stat().st_size > 0
    for name in ("agreement_against_speed", "heat_map"):
        assert (folder / "figures" / f"{name}.png").stat().st_size > 0


def test_sweeping_trains_exits_where_none_are_given(tmp_path):
    given = experiment(
        sweep,
        "sweep_thresholds.tiny",
        tmp_path,
        model="tiny:mamba2",
        emission="affine",
        criterion="margin",
        translator_steps=10,
        policies=("skip", "defer"),
    )
    results = sweep.main(given)
    assert results["simulated_1.1x_speedup_blocks"] >= 1.05
    (folder,) = (tmp_path / "early_exit").glob("sweep_thresholds-*")
    assert (folder / "exits.safetensors").is_file()


def test_text_with_exits(trained, tmp_path):
    given = replace(
        inference.EXPERIMENT,
        exits=trained,
        prompt="The key is <b>",
        max_new_tokens=12,
        threshold=(0.5,),
        accounting="dynamax",
        run=RunOptions(root=tmp_path, threads=1),
    )
    results = inference.main(given)
    assert results["tokens"] <= 12
    assert results["speedup_work"] == 1.0
    (folder,) = (tmp_path / "early_exit").glob("inference-*")
    page = (folder / "heat_map.html").read_text(encoding="utf-8")
    assert page.count("<span") == results["tokens"]
    assert (folder / "figures" / "heat_map.svg").stat().st_size > 0
    neutral = inference.main(replace(given, threshold=(1.0,)))
    assert neutral["identical_positions"] == 1.0
    assert neutral["speedup_blocks"] == 1.0


def test_text_with_untrained_exits_and_a_criterion_that_needs_none(tmp_path):
    results = inference.main(experiment(inference, "inference.tiny", tmp_path))
    assert results["speedup_blocks"] >= 1.0
    assert "speedup_dynamax" not in results


def test_mistakes_are_named(trained, tmp_path):
    options = RunOptions(root=tmp_path, threads=1)
    with pytest.raises(ConfigError, match="--exits is missing"):
        inference.main(replace(inference.EXPERIMENT, run=options))
    with pytest.raises(ConfigError, match="--prompt is empty"):
        replace(inference.EXPERIMENT, prompt=" ")
    with pytest.raises(DataError, match="no exit_config.json"):
        inference.main(replace(inference.EXPERIMENT, exits=tmp_path, run=options))
    with pytest.raises(ConfigError, match="exits .1, 3.: expected ascending"):
        train.main(experiment(train, "train.tiny", tmp_path, exits=(1, 3)))
    with pytest.raises(ConfigError, match="learning_rate=0"):
        replace(train.EXPERIMENT, learning_rate=0.0)
    with pytest.raises(ConfigError, match="steps=0"):
        replace(train.EXPERIMENT, steps=0)
    with pytest.raises(ConfigError, match="oracle"):
        replace(sweep.EXPERIMENT, criterion="oracle")
    with pytest.raises(ConfigError, match="each ≥ 1"):
        replace(sweep.EXPERIMENT, speedups=(0.5,))
    tiny = experiment(sweep, "sweep_thresholds.tiny", tmp_path, exits=trained)
    with pytest.raises(ConfigError, match="out of reach"):
        sweep.main(replace(tiny, speedups=(3.0,)))
    with pytest.raises(ConfigError, match="unknown criterion 'magrin'; nearest: margin"):
        sweep.main(replace(tiny, criterion="magrin"))
    with pytest.raises(DataError, match="lower --prompt-tokens"):
        sweep.main(replace(tiny, prompt_tokens=900))
    with pytest.raises(ConfigError, match="copy_layer"):
        sweep.main(replace(tiny, model="tiny:mamba2", exits=None, policies=("copy_layer",)))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_configuration_parses(path):
    modules = {"train": train, "inference": inference}
    module = modules.get(path.stem.partition(".")[0], sweep)
    parse(module.EXPERIMENT, ["--config", str(path)])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["micro-mistral", "micro-mamba2"])
def test_exits_of_a_trained_model_beat_one_exit_for_all(name, tmp_path):
    from workbench.models import built_in_names
    from workbench.tables import read_csv

    if name not in built_in_names():
        pytest.skip(f"{name} is not shipped")
    given = replace(
        sweep.EXPERIMENT,
        model=name,
        at=(3, 5),
        train_tokens=6000,
        choose_tokens=2000,
        test_tokens=3000,
        steps=100,
        translator_steps=60,
        speedups=(1.25,),
        decode_documents=3,
        new_tokens=24,
        run=RunOptions(root=tmp_path, threads=1),
    )
    results = sweep.main(given)
    (folder,) = (tmp_path / "early_exit").glob("sweep_thresholds-*")
    rows = read_csv(folder / "tables" / "baselines.csv")
    fixed = next(row for row in rows if row["method"] == "fixed exit 5")  # 8/6 = 1.33×
    assert results["simulated_1.25x_agreement"] > float(fixed["agreement"]) + 0.02
    assert results["mean_auroc_gate"] > 0.7


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train", "inference", "sweep_thresholds"])
def test_help_and_typos(script, run_module):
    shown = run_module(f"early_exit.{script}", "--help")
    assert shown.returncode == 0
    assert "--traceback" in shown.stdout
    wrong = run_module(f"early_exit.{script}", "--max-lenght", "3")
    assert wrong.returncode == 2
