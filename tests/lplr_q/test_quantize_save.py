import json
from dataclasses import replace

import pytest
import torch

from lplr_q.activation_aware.dataclasses import DataParameters
from lplr_q.activation_aware.quantized_layer import quantised_layers
from lplr_q.hf import save_compressed
from lplr_q.quantize_save import EXPERIMENT, PARAMETERS, main, settings_of
from workbench.cli import RunOptions, parse
from workbench.errors import ConfigError, DataError
from workbench.models import load_model
from workbench.storage import read_json
from workbench.tables import read_csv

QUIP = replace(PARAMETERS.quip_args, quip_tune_iters=0)
TINY = replace(
    EXPERIMENT,
    base_model="tiny:mistral",
    include=r"layers\.[01]\.mlp",
    params=replace(PARAMETERS, rank=4, lplr_iters=1, quip_args=QUIP),
    data=DataParameters(devset="microworld:world", devset_size=4, context_length=48, batch_size=2),
)
PROBE = torch.randint(3, 200, (2, 16), generator=torch.Generator().manual_seed(0))


def options(root, name="tiny"):
    return RunOptions(root=root, name=name, threads=1, device="cpu")


def logits(model):
    with torch.no_grad():
        return model(input_ids=PROBE).logits


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    e = replace(TINY, run=options(root))
    return e, root / "lplr_q" / "tiny", main(e)


def test_the_model_loads_plainly_and_its_bits_are_those_of_the_file(finished):
    e, folder, results = finished
    model, _ = load_model(folder / "model")
    assert len(list(quantised_layers(model))) == results["layers"] == 6
    assert results["packed"]
    counted = results["counted_bits_per_weight"]
    assert results["bits_per_weight"] == pytest.approx(counted, rel=5e-3)
    report = read_json(folder / "model" / "lplr_q_report.json")
    assert set(report["modules"]) == {name for name, _ in quantised_layers(model)}
    assert bool(torch.isfinite(logits(model)).all())
    rows = read_csv(folder / "tables" / "layers.csv")
    assert {row["rank"] for row in rows} == {4}
    assert not (folder / "hessians").exists()
    assert main(e) == results


def test_layer_ranges_into_one_folder_add_up_to_the_whole(finished, tmp_path):
    _, folder, _ = finished
    target = tmp_path / "model"
    first = replace(TINY, model_save_path=target, stop_layer=1, run=options(tmp_path, "a"))
    second = replace(TINY, model_save_path=target, start_layer=1, run=options(tmp_path, "b"))
    assert main(first)["layers"] == 3
    assert main(second)["layers"] == 6
    ours, theirs = (
        (place / "model.safetensors").read_bytes() for place in (target, folder / "model")
    )
    assert ours == theirs
    assert len(list((tmp_path / "model.work" / "work").glob("*.json"))) == 6


@pytest.mark.parametrize(("method", "packed"), [("quip-sharp", True), ("gptq", False)])
def test_other_methods(method, packed, tmp_path):
    params = replace(TINY.params, method=method, target_bpw=2.9)
    e = replace(TINY, params=params, include=r"layers\.0\.mlp\.up", run=options(tmp_path))
    results = main(e)
    assert results["packed"] == packed
    assert 2 < results["bits_per_weight"] <= 2.9
    model, _ = load_model(tmp_path / "lplr_q" / "tiny" / "model")
    weight = model.get_submodule("model.layers.0.mlp.up_proj").weight.detach()
    original, _ = load_model("tiny:mistral")
    other = original.get_submodule("model.layers.0.mlp.up_proj").weight.detach()
    ratio = float((weight - other).norm() / other.norm())
    assert 0.1 < ratio < 0.7
    assert hasattr(model.config, "quantization_config") == packed


def test_hessians_of_a_folder_and_an_allocation(finished, tmp_path):
    from lplr_q.save_hessians import EXPERIMENT as HESSIANS
    from lplr_q.save_hessians import main as save

    save(
        replace(
            HESSIANS,
            base_model="tiny:mistral",
            include=TINY.include,
            data=TINY.data,
            hessian_save_path=tmp_path / "h",
            run=options(tmp_path, "h"),
        )
    )
    e = replace(TINY, hessian_save_path=tmp_path / "h", run=options(tmp_path))
    assert main(e)["mean_error"] == finished[2]["mean_error"]
    assert (tmp_path / "h" / "000.json").is_file()  # what the user made is never deleted
    name = "model.layers.0.mlp.up_proj"
    entry = {"codebook": "lloyd-max", "q_bits": 3, "rank": 0, "factor_bits": 4}
    file = tmp_path / "allocation.json"
    file.write_text(json.dumps({"modules": {name: entry}}), encoding="utf-8")
    e = replace(e, allocation=file, include=r"0\.mlp\.up", run=options(tmp_path, "allocated"))
    results = main(e)
    assert (results["layers"], results["worst_layer"]) == (1, name)
    assert results["bits_per_weight"] > 3
    missing = replace(e, include=r"0\.mlp\.gate", run=options(tmp_path, "missing"))
    with pytest.raises(ConfigError, match="no entry for model.layers.0.mlp.gate_proj"):
        main(missing)
    lacking = replace(TINY, include="self_attn", hessian_save_path=tmp_path / "h")
    with pytest.raises(DataError, match="no Hessian for"):
        main(replace(lacking, run=options(tmp_path, "lacking")))


def test_left_and_right_in_widths_of_their_own(tmp_path):
    """--L_bits 3 --R_bits 16 within a budget: stored, counted and loaded as such."""
    params = replace(TINY.params, L_bits=3, R_bits=16, target_bpw=3.2)
    results = main(replace(TINY, params=params, run=options(tmp_path)))
    assert results["bits_per_weight"] == pytest.approx(results["counted_bits_per_weight"])
    assert 2.5 < results["bits_per_weight"] <= 3.2
    folder = tmp_path / "lplr_q" / "tiny"
    model, tokenizer = load_model(folder / "model")
    layers = dict(quantised_layers(model))
    assert len(layers) == results["layers"] == 6
    for name, layer in layers.items():
        assert (layer.form.l_bits, layer.form.r_bits) == (3, 16)
        assert layer.rank > 0
        assert layer.stored_bits().per_weight <= 3.2
        record = json.loads((folder / "work" / f"{name}.json").read_text(encoding="utf-8"))
        assert layer.settings() == record["settings"]
    save_compressed(model, tokenizer, tmp_path / "again")
    again, _ = load_model(tmp_path / "again")
    assert torch.equal(logits(again), logits(model))


def test_in_turns_with_error_propagation(tmp_path):
    e = replace(TINY, inputs="compressed", error_propagation=0.5, run=options(tmp_path))
    results = main(e)
    assert results["layers"] == 6
    model, _ = load_model(tmp_path / "lplr_q" / "tiny" / "model")
    assert bool(torch.isfinite(logits(model)).all())


def test_the_published_flags_are_understood():
    words = (
        "--method lplr-ldlq --base_model tiny:llama --hessian_save_path h --model_save_path m "
        "--devices cpu --ft_rank 8 --start_layer 1 --stop_layer 2 --random_seed 7 --Q_bits 2 "
        "--L_bits 4 --R_bits 4 --rank 128 --iters 20 --lplr_iters 50 --activation_aware_Q "
        "--activation_aware_LR --no-lattice_quant_Q --lattice_quant_LR --hadamard_transform "
        "--no-full_quip_sharp --update_order Q LR --rand_svd --Q_hessian_downdate "
        "--lattice_quant_block_size 32000 --q_hessian downdate --init odlri --codebook tcq "
        "--target_bpw 2.4 --allocation a.json --sigma_reg 1e-3 --sigma_reg2 1e-2 "
        "--scale_override 0.9 --resid_scale_override -1 --quip_tune_iters 3 --use_fp64 "
        "--lowmem_ldlq --incoh_mode had --rescale_WH --lora_rank 0 --full_svd --rht strict"
    )
    e, _ = parse(EXPERIMENT, words.split())
    params = e.params
    assert (e.base_model, e.devices, e.seed, e.rht) == ("tiny:llama", ("cpu",), 7, "strict")
    assert (str(e.hessian_save_path), str(e.model_save_path)) == ("h", "m")
    assert (e.start_layer, e.stop_layer, str(e.allocation)) == (1, 2, "a.json")
    assert (params.method, params.Q_bits, params.L_bits, params.R_bits) == ("lplr-ldlq", 2, 4, 4)
    assert (params.rank, params.ft_rank, params.iters, params.lplr_iters) == (128, 8, 20, 50)
    assert (params.codebook, params.lr_codebook, params.init) == ("tcq", "e8p", "odlri")
    assert (params.update_order, params.target_bpw) == (("Q", "LR"), 2.4)
    assert params.Q_hessian_downdate
    assert params.hadamard_transform
    quip = params.quip_args
    assert (quip.sigma_reg, quip.scale_override, quip.quip_tune_iters) == (1e-3, 0.9, 3)
    assert quip.rescale_WH
    assert quip.full_svd


def test_a_rank_below_a_hundredth_of_the_inputs_is_noted(finished, tmp_path):
    e = replace(
        TINY,
        include=r"layers\.0\.mlp",  # 64, 64 and 172 inputs
        params=replace(TINY.params, rank=1),
        run=options(tmp_path),
    )
    main(e)
    log = (tmp_path / "lplr_q" / "tiny" / "log.txt").read_text(encoding="utf-8")
    assert "1 layers have a rank below 1% of their inputs, e.g. model.layers.0.mlp.down_proj" in log
    assert "with 1 of 172" in log
    assert "below 1%" not in (finished[1] / "log.txt").read_text(encoding="utf-8")
    rows = read_csv(finished[1] / "tables" / "layers.csv")
    assert {float(row["rank_over_inputs"]) for row in rows} == {4 / 64, 4 / 172}


def test_flags_become_settings():
    params = replace(PARAMETERS, rank=256, iters=20, Q_hessian_downdate=True, ft_rank=64)
    s = settings_of(replace(EXPERIMENT, params=params, seed=7))
    assert (s.method, s.q_bits, s.rank, s.factor_bits, s.rounds) == ("lplr-ldlq", 2, 256, 4, 20)
    assert (s.q_hessian, s.ft_rank, s.rht, s.seed, s.bits) == ("downdate", 64, True, 7, None)
    budget = settings_of(replace(EXPERIMENT, params=replace(PARAMETERS, target_bpw=2.4)))
    assert (budget.bits, budget.rank, budget.q_bits) == (2.4, None, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"start_layer": 3, "stop_layer": 3}, "no block in between"),
        ({"workers": 0}, "workers=0"),
        ({"error_propagation": 0.5}, "needs --inputs compressed"),
        ({"inputs": "compressed", "workers": 2}, "use one worker"),
        ({"inputs": "compressed", "error_propagation": 2.0}, "use 0 to 1"),
    ],
)
def test_settings_that_cannot_work(change, message):
    with pytest.raises(ConfigError, match=message):
        replace(TINY, **change)


def test_methods_that_lack_something(tmp_path):
    absent = replace(TINY, devices=("cuda:99",), run=options(tmp_path, "absent"))
    with pytest.raises(ConfigError, match=r"--device cuda:99: .*CUDA device"):
        main(absent)
    assert not list(tmp_path.rglob("*.safetensors"))  # before any Hessian is collected
    with pytest.raises(ConfigError, match="needs --target-bpw or --group"):
        replace(PARAMETERS, method="rtn")
    with pytest.raises(ConfigError, match="update_order is empty"):
        replace(PARAMETERS, update_order=())
    with pytest.raises(ConfigError, match="has 4 decoder blocks"):
        main(replace(TINY, stop_layer=5, run=options(tmp_path)))


def test_a_compressed_model_is_not_compressed_again(finished, tmp_path):
    again = replace(TINY, base_model=str(finished[1] / "model"), run=options(tmp_path))
    with pytest.raises(ConfigError, match="already quantised"):
        main(again)
