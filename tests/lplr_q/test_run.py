import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lplr_q.evaluate import load_blocks, perplexity_columns
from lplr_q.report import curve_figure, curve_rows
from lplr_q.run import EXPERIMENT, main
from lplr_q.toy import train_toy
from workbench.errors import ConfigError
from workbench.evaluate import token_nats
from workbench.run import Run, RunOptions
from workbench.storage import read_json
from workbench.tables import read_csv, read_published
from workbench.tiny import byte_tokenizer

ROOT = Path(__file__).resolve().parents[2]
TINY = replace(
    EXPERIMENT,
    model="tiny:mistral",
    include=r"layers\.0\.mlp",
    bits=(2.5,),
    calibration=("microworld:world",),
    evaluation=("microworld:world",),
    calibration_tokens=256,
    evaluation_tokens=256,
    length=32,
    inner_iterations=1,
    sweeps=0,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    experiment = replace(TINY, run=RunOptions(root=root, name="tiny", threads=1, device="cpu"))
    return experiment, root / "lplr_q" / "tiny", main(experiment)


def test_every_stage_leaves_its_artefact(finished):
    _, folder, results = finished
    methods = [(r["method"], r["bits"]) for r in results["rows"]]
    assert methods == [("16 bit", 16), ("RTN", 2.5), ("GPTQ", 2.5), ("LPLR-LDLQ", 2.5)]
    for row in results["rows"]:
        assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
    assert results["rows"][0]["ratio"] == 1
    for row in results["rows"][1:]:
        assert 2 <= row["true_bits"] <= 2.5 + EXPERIMENT.overhead + 1e-9
    spent = {row["method"]: row["true_bits"] for row in results["rows"]}
    assert spent["LPLR-LDLQ"] <= spent["GPTQ"] == spent["RTN"]
    assert results["stored"]["2.5"]["reload_difference"] == 0
    for name in ("models/lplr-2.5/config.json", "figures/perplexity.svg", "report.md"):
        assert (folder / name).is_file()
    layers = read_csv(folder / "tables" / "layers.csv")
    assert {row["kind"] for row in layers} == {"gate_proj", "up_proj", "down_proj"}
    errors = {row["method"]: [r["error"] for r in layers if r["method"] == row["method"]]
              for row in layers}  # fmt: skip
    pairs = list(zip(errors["LPLR-LDLQ"], errors["GPTQ"], errors["RTN"], strict=True))
    assert all(ours < gptq and ours < rtn for ours, gptq, rtn in pairs)
    config = read_json(folder / "models" / "lplr-2.5" / "config.json")
    assert config["quantization_config"]["quant_method"] == "lplr_q"


def test_a_finished_run_returns_at_once_and_a_lost_unit_comes_back_equal(finished):
    import shutil

    experiment, folder, results = finished
    before = (folder / "metrics.jsonl").read_bytes()
    assert main(experiment) == results
    weights = (folder / "models" / "lplr-2.5" / "model.safetensors").read_bytes()
    (folder / "results.json").unlink()
    for unit in ("lplr-2.5_model.layers.0.mlp.down_proj", "evaluate_gptq-2.5"):
        shutil.rmtree(folder / "units" / unit)
    again = main(experiment)
    assert again["rows"] == results["rows"]
    assert (folder / "models" / "lplr-2.5" / "model.safetensors").read_bytes() == weights
    assert len((folder / "metrics.jsonl").read_bytes().splitlines()) == len(before.splitlines())


def test_other_weights_under_the_same_name_are_refused(finished, monkeypatch):
    import workbench.models

    experiment, folder, _ = finished
    (folder / "results.json").unlink(missing_ok=True)
    load = workbench.models.load_model

    def changed(*args, **kwargs):
        model, tokenizer = load(*args, **kwargs)
        model.get_input_embeddings().weight.data[5, 0] += 1
        return model, tokenizer

    monkeypatch.setattr(workbench.models, "load_model", changed)
    with pytest.raises(ConfigError, match="use --fresh to begin anew"):
        main(experiment)


@pytest.fixture(scope="module")
def allocated(tmp_path_factory):
    root = tmp_path_factory.mktemp("allocated")
    run = RunOptions(root=root, name="auto", threads=1, device="cpu")
    methods = ("gptq", "quip-sharp", "lplr-ldlq")
    experiment = replace(TINY, methods=methods, allocation="auto", run=run)
    return experiment, root / "lplr_q" / "auto", main(experiment)


def test_an_automatic_allocation_spends_the_same_and_says_what_it_foretold(allocated):
    _, folder, results = allocated
    rows = {row["method"]: row for row in results["rows"]}
    assert list(rows) == ["16 bit", "GPTQ", "QuIP#-style", "LPLR-LDLQ, allocated"]
    spent = rows["LPLR-LDLQ, allocated"]["true_bits"]
    assert 0.97 * rows["GPTQ"]["true_bits"] <= spent <= rows["GPTQ"]["true_bits"] + 1e-9
    written = read_json(folder / "allocation-lplr-2.5.json")
    assert written["cost"] <= written["uniform_cost"]
    assert written["bits_per_weight"] == pytest.approx(spent)
    layers = read_csv(folder / "tables" / "layers.csv")
    ours = [row for row in layers if row["method"].startswith("LPLR")]
    assert {row["layer"] for row in ours} == set(written["modules"])
    for row in ours:
        assert row["rank"] == written["modules"][row["layer"]]["rank"]
        assert row["error"] == pytest.approx(row["predicted"], rel=0.3)
    assert all(row["predicted"] in (None, "") for row in layers if row not in ours)
    for name in ("foretold", "error_by_step", "error_by_layer"):
        assert (folder / "figures" / f"{name}.svg").is_file()
    worst = read_csv(folder / "tables" / "worst.csv")
    assert [row["error"] for row in worst] == sorted((r["error"] for r in ours), reverse=True)
    assert results["stored"]["quip-2.5"]["reload_difference"] == 0


def test_an_allocation_file_is_followed_and_a_foreign_one_refused(allocated, tmp_path):
    _, folder, results = allocated
    path = folder / "allocation-lplr-2.5.json"
    run = RunOptions(root=tmp_path, threads=1, device="cpu")
    given = replace(TINY, methods=("lplr-ldlq",), allocation=str(path), run=run)
    again = main(given)["rows"][-1]
    before = results["rows"][-1]
    assert again["true_bits"] == before["true_bits"]
    assert again["ratio"] == pytest.approx(before["ratio"], rel=1e-6)
    with pytest.raises(ConfigError, match="no entry for model.layers.0.self_attn"):
        main(replace(given, include=r"layers\.0\.self_attn", run=replace(run, name="foreign")))


def test_a_total_budget_replaces_bits_and_overhead():
    experiment = replace(TINY, target_bpw=2.4)
    assert experiment.budgets == (2.4,)
    assert experiment.allowance == 0
    assert TINY.budgets == (2.5,)
    assert TINY.allowance == TINY.overhead


def test_the_toy_model_learns_and_is_compressed(tmp_path):
    run = RunOptions(root=tmp_path, threads=1, device="cpu")
    with Run.open("lplr_q.run", replace(TINY, tiny=True, run=run)) as opened:
        model, tokenizer = train_toy(opened, steps=24, length=32, rows=4, hidden=32, layers=2)
        block = load_blocks(tokenizer, "microworld:doc", tokens=512, length=64, split="test")
        nats = token_nats(model, block.tokens)[block.counted[:, 1:]].mean()
    assert not any(p.requires_grad for p in model.parameters())
    assert float(nats) < 0.95 * math.log(len(tokenizer))
    with Run.open("lplr_q.run", replace(TINY, tiny=True, run=run)) as opened:
        again, _ = train_toy(opened, steps=24, length=32, rows=4, hidden=32, layers=2)
    for first, second in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.slow
def test_the_whole_pipeline_on_a_model_trained_on_the_spot(tmp_path):
    run = RunOptions(root=tmp_path, threads=1, device="cpu")
    results = main(
        replace(
            EXPERIMENT,
            tiny=True,
            tiny_steps=60,
            bits=(2.0,),
            calibration_tokens=4096,
            evaluation_tokens=4096,
            length=128,
            codebook="tcq",
            run=run,
        )
    )
    rows = {(r["text"], r["method"]): r for r in results["rows"]}
    for text in ("documents", "library text"):  # a model so blunt loses little by any method
        ours, gptq = (rows[text, name] for name in ("LPLR-LDLQ", "GPTQ"))
        assert ours["ratio_low"] <= gptq["ratio_high"]
        assert ours["true_bits"] <= gptq["true_bits"]
    layers = read_csv(next(tmp_path.glob("lplr_q/run-*")) / "tables" / "layers.csv")
    errors = {name: {r["layer"]: r["error"] for r in layers if r["method"] == name}
              for name in ("LPLR-LDLQ", "GPTQ")}  # fmt: skip
    lower = [e < errors["GPTQ"][name] for name, e in errors["LPLR-LDLQ"].items()]
    assert sum(lower) >= 0.95 * len(lower)
    adapter = results["stored"]["adapter"]
    assert adapter["loss_after"] < adapter["loss_before"]
    nats = math.log(rows["documents", "LPLR-LDLQ"]["perplexity"])
    assert adapter["loss_before"] == pytest.approx(nats, rel=0.2)  # padding is not learnt
    assert results["stored"]["2"]["reload_difference"] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": ()}, "bits is empty"),
        ({"bits": (9.0,)}, "choose budgets from 1 to 8"),
        ({"overhead": -1.0}, "overhead"),
        ({"rounds": 0}, "nothing would be decomposed"),
        ({"length": 2}, "too small"),
        ({"target_bpw": 0.5}, "target_bpw=0.5"),
        ({"tiny_steps": 0}, "nothing would be trained"),
    ],
)
def test_settings_that_cannot_work(change, message):
    with pytest.raises(ConfigError, match=message):
        replace(TINY, **change)


def test_a_budget_below_the_codes_says_what_to_raise(tmp_path):
    run = RunOptions(root=tmp_path, threads=1, device="cpu")
    with pytest.raises(ConfigError, match="raise --bits or --overhead"):
        main(replace(TINY, bits=(1.5,), methods=("lplr-ldlq",), run=run))


def test_the_curve_is_that_of_our_method_and_relative_to_its_first_whole_state():
    def steps(method, layer, errors):
        return [
            {"bits": 2.0, "method": method, "layer": layer, "step": i, "error": e}
            for i, e in enumerate(errors, 1)
        ]

    curves = steps("QuIP#-style", "a", (9.0, 9.0)) + steps("LPLR-LDLQ", "a", (0.8, 0.4, 0.2))
    curves += steps("LPLR-LDLQ", "b", (0.6, 0.2, 0.2)) + steps("LPLR-LDLQ", "no rank", (0.1,))
    rows = curve_rows(curves)
    assert [r["error"] for r in rows] == pytest.approx([0.7, 0.3, 0.2])
    assert [r["over_first_whole"] for r in rows] == pytest.approx([2.5, 1.0, 0.75])
    assert [(r["least"], r["largest"], r["sublayers"]) for r in rows][1] == (0.2, 0.4, 2)
    figure, drawn = curve_figure(curves)
    assert drawn == rows
    assert [list(axes.get_xticks()) for axes in figure.axes] == [[1, 2, 3], [2, 3]]
    (alone,) = curve_rows(steps("LPLR-LDLQ", "no rank", (0.1,)))
    assert (alone["error"], alone["over_first_whole"], alone["sublayers"]) == (0.1, None, 1)
    curve_figure(steps("LPLR-LDLQ", "no rank", (0.1,)))


def test_blocks_mark_padding():
    tokenizer = byte_tokenizer()
    blocks = load_blocks(tokenizer, "microworld:world", tokens=2048, length=512, split="test")
    assert blocks.tokens.shape == (4, 512)
    assert torch.equal(blocks.counted, blocks.tokens != tokenizer.pad_token_id)
    assert blocks.n_tokens == int(blocks.counted.sum())
    nats = torch.rand(4, 511)
    columns = perplexity_columns(blocks, nats, nats)
    assert columns["ratio"] == 1
    assert columns["n_tokens"] == int(blocks.counted[:, 1:].sum())
    with pytest.raises(ConfigError, match="one row already has"):
        load_blocks(tokenizer, "microworld:world", tokens=10, length=512, split="test")


def test_published_figures_are_readable():
    rows = read_published(ROOT / "lplr_q" / "published.csv")
    assert {row["table"] for row in rows} == {
        "bits", "caldera-finetune", "caldera-ppl", "gaussian-mse", "odlri-ppl", "qtip-ppl",
        "throughput", "zero-shot",
    }  # fmt: skip
    keys = [(row["table"], row["row"], row["column"]) for row in rows]
    assert len(set(keys)) == len(keys)
