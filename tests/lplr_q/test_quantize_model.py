import json
import multiprocessing
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from lplr_q.activation_aware.hessian import (
    collect_hessians,
    linear_weight,
    save_hessians,
    stream_blocks,
)
from lplr_q.activation_aware.quantized_layer import quantised_layers
from lplr_q.bits import layer_bits
from lplr_q.hf import save_compressed
from lplr_q.interleaved import _weights as corrected_weights
from lplr_q.interleaved import compress_in_turns
from lplr_q.quantize_model import (
    METHODS,
    CompressionSettings,
    assemble,
    candidates,
    compress_model,
    groups_of,
)
from lplr_q.weights import FolderWeights
from tests.conftest import ROOT, child_environment
from tests.lplr_q.families import family_model
from workbench.errors import ConfigError, DataError

QUICK = CompressionSettings(bits=3.0, rounds=1, inner_iterations=1, sweeps=0)
TOKENS = torch.randint(3, 200, (8, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model():
    return family_model("mistral")


@pytest.fixture(scope="module")
def calibration(model):
    return collect_hessians(model, TOKENS)


@pytest.fixture(scope="module")
def done(model, calibration, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, compress_model(model, calibration, QUICK, folder, threads=1)


def unit_bytes(folder):
    """Tensors as bytes, records without what is measured."""
    found = {p.name: p.read_bytes() for p in (folder / "work").glob("*.safetensors")}
    for path in (folder / "work").glob("*.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        found[path.name] = {
            k: v for k, v in record.items() if "seconds" not in k and "peak" not in k
        }
    return {**found, "manifest": (folder / "manifest.json").read_bytes()}


def test_every_sublayer_becomes_one_unit_within_the_budget(done, calibration):
    folder, records = done
    assert list(records) == list(calibration.key_of)
    assert len(records) == 14
    for record in records.values():
        assert 2 <= record["bits_per_weight"] <= 3 + 1e-9
        assert 0 < record["error"] < 0.4
        assert {h["component"] for h in record["history"]} == {"LR", "Q"}
        assert record["seconds"] >= 0
        assert record["peak_bytes"] > 0
        assert record["inputs_seen"] == TOKENS.numel()
    assert not list(folder.rglob(".tmp*"))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_makes_a_model_near_the_original(method, model, calibration, tmp_path):
    settings = replace(QUICK, method=method)
    name = "model.layers.0.mlp.up_proj"
    records = compress_model(model, calibration, settings, tmp_path, names=[name])
    assert list(records) == [name]
    changed = family_model("mistral")
    assemble(changed, tmp_path)
    weight = changed.get_submodule(name).weight.detach().float()
    original = model.get_submodule(name).weight.detach()
    ratio = float((weight - original).norm() / original.norm())
    assert ratio == pytest.approx(records[name]["frobenius"], rel=1e-4)
    assert 0.05 < ratio < 0.6
    untouched = "model.layers.0.mlp.down_proj"
    assert changed.get_submodule(untouched).weight.equal(model.get_submodule(untouched).weight)


@pytest.mark.slow
def test_workers_folders_and_files_change_nothing(done, model, calibration, tmp_path):
    """Two processes that read weights and Hessians from files = one process with both in memory."""
    folder, _ = done
    model.save_pretrained(tmp_path / "model")
    save_hessians(calibration, tmp_path / "hessians", {"from": "test"})
    compress_model(
        tmp_path / "model", tmp_path / "hessians", QUICK, tmp_path / "out", workers=2, threads=1
    )
    ours, theirs = unit_bytes(tmp_path / "out"), unit_bytes(folder)
    assert ours.pop("manifest") != theirs.pop("manifest")  # files have digests of their own
    assert ours == theirs


def test_finished_units_are_kept_and_damaged_ones_made_again(done, model, calibration, tmp_path):
    import shutil

    shutil.copytree(done[0], tmp_path / "copy")
    work = tmp_path / "copy" / "work"
    before = unit_bytes(tmp_path / "copy")
    cut = work / "model.layers.1.mlp.up_proj.safetensors"
    cut.write_bytes(cut.read_bytes()[:-7])
    (work / "model.layers.0.self_attn.k_proj.json").unlink()
    kept = work / "model.layers.1.self_attn.o_proj.safetensors"
    stamp = kept.stat().st_mtime_ns
    compress_model(model, calibration, QUICK, tmp_path / "copy", threads=1)
    assert unit_bytes(tmp_path / "copy") == before
    assert kept.stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    ("change", "key"),
    [({"bits": 2.5}, "settings.bits: 3.0 → 2.5"), ({"seed": 1}, "settings.seed: 0 → 1")],
)
def test_a_folder_of_another_origin_is_refused_with_the_difference(
    change, key, done, model, calibration
):
    with pytest.raises(ConfigError, match="of another origin") as error:
        compress_model(model, calibration, replace(QUICK, **change), done[0])
    assert key in str(error.value)


def test_another_model_or_calibration_is_refused(done, model, calibration):
    other = family_model("mistral", seed=1)
    with pytest.raises(ConfigError, match=r"weights: '\w+' → '\w+'"):
        compress_model(other, calibration, QUICK, done[0])
    less = collect_hessians(model, TOKENS[:4])
    with pytest.raises(ConfigError, match=r"calibration: '\w+' → '\w+'"):
        compress_model(model, less, QUICK, done[0])


def test_an_allocation_says_codebook_bits_and_rank_of_each(model, calibration, tmp_path):
    names = [n for n in calibration.key_of if n.endswith(("0.mlp.up_proj", "0.mlp.down_proj"))]
    entries = {
        names[0]: {"codebook": "e8p", "q_bits": 2, "rank": 3, "factor_bits": [3, 5]},
        names[1]: {"codebook": "lloyd-max", "q_bits": 3, "rank": 0, "factor_bits": 4},
    }
    allocation = {"target_bpw": 2.7, "modules": entries}
    records = compress_model(
        model, calibration, QUICK, tmp_path, allocation=allocation, names=names
    )
    for name, entry in entries.items():
        form = records[name]["settings"]
        assert (form["codebook"], form["q_bits"], form["rank"]) == (
            entry["codebook"], entry["q_bits"], entry["rank"],
        )  # fmt: skip
    form = records[names[0]]["settings"]
    assert (form["l_bits"], form["r_bits"]) == (3, 5)
    with pytest.raises(ConfigError, match="no entry for"):
        compress_model(model, calibration, QUICK, tmp_path / "b", allocation=allocation)
    wrong = {"modules": {names[0]: {"bits": 2}}}
    with pytest.raises(ConfigError, match="expected codebook, q_bits, rank, factor_bits"):
        compress_model(model, calibration, QUICK, tmp_path / "c", allocation=wrong, names=names[:1])


KILLED = """
import os, sys, torch
from lplr_q import quantize_model, manifest
from lplr_q.activation_aware.hessian import load_hessians
from tests.lplr_q.test_quantize_model import QUICK
strike, workers = int(sys.argv[1]), int(sys.argv[2])
if __name__ == "__main__":
    from workbench import storage
    real, count = storage.atomic_write, [0]
    def write(path, act):
        count[0] += 1
        if count[0] == strike:
            act(path.with_name(f".tmp-{os.getpid()}-{path.name}") if strike % 2 else path)
            os.kill(os.getpid(), 9)
        return real(path, act)
    storage.atomic_write = write
    quantize_model.compress_model(
        sys.argv[3], sys.argv[4], QUICK, sys.argv[5], workers=workers, threads=1
    )
"""


def killed(folder, strike, model, hessians):
    process = subprocess.run(
        [sys.executable, "-c", KILLED, *map(str, (strike, 1, model, hessians, folder))],
        cwd=ROOT, env=child_environment(OMP_NUM_THREADS="1"), check=False, capture_output=True,
    )  # fmt: skip
    return process.returncode


@pytest.mark.slow
@pytest.mark.parametrize("strike", [1, 2, 3, 12, 13, 28])
def test_killed_at_any_sublayer_it_ends_with_the_same_bytes(
    strike, done, model, calibration, tmp_path
):
    """P12; whole writes are torn in place on even strikes."""
    model.save_pretrained(tmp_path / "model")
    save_hessians(calibration, tmp_path / "hessians", {"from": "test"})
    places = tmp_path / "model", tmp_path / "hessians"
    assert killed(tmp_path / "out", strike, *places) == -signal.SIGKILL
    compress_model(*places, QUICK, tmp_path / "out", threads=1)
    ours, theirs = unit_bytes(tmp_path / "out"), unit_bytes(done[0])
    assert ours.pop("manifest")
    theirs.pop("manifest")
    assert ours == theirs


@pytest.mark.slow
def test_workers_end_with_their_parent(model, calibration, tmp_path):
    import time

    model.save_pretrained(tmp_path / "model")
    save_hessians(calibration, tmp_path / "hessians", {})
    code = KILLED.replace("QUICK, sys", "__import__('dataclasses').replace(QUICK, rounds=20), sys")
    script = tmp_path / "job.py"
    script.write_text(code, encoding="utf-8")
    arguments = [0, 2, tmp_path / "model", tmp_path / "hessians", tmp_path / "out"]
    process = subprocess.Popen(
        [sys.executable, str(script), *map(str, arguments)],
        cwd=ROOT, env=child_environment(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT)),
        start_new_session=True,
    )  # fmt: skip
    work = tmp_path / "out" / "work"
    limit = time.monotonic() + 60
    while not list(work.glob("*.json")) and time.monotonic() < limit:
        time.sleep(0.05)
    process.kill()
    process.wait()
    limit, left = time.monotonic() + 20, b"unknown"
    while time.monotonic() < limit:
        left = subprocess.run(
            ["ps", "-o", "pid=", "-g", str(process.pid)], capture_output=True, check=False
        ).stdout
        if not left.strip():
            break
        time.sleep(0.2)
    assert not left.strip()


def test_two_processes_share_one_folder(done, model, calibration, tmp_path):
    """A group that another process holds is left to it, and waited for."""
    from filelock import FileLock

    from lplr_q.quantize_model import Job
    from lplr_q.weights import ModuleWeights

    (tmp_path / "work" / ".locks").mkdir(parents=True)
    group = groups_of(calibration)[0]
    job = Job(tmp_path, QUICK)
    with FileLock(tmp_path / "work" / ".locks" / f"{group.key}.lock"):
        context = multiprocessing.get_context("fork")
        child = context.Process(
            target=lambda: os._exit(
                0 if not job.compress(group, ModuleWeights(model), calibration) else 1
            )
        )
        child.start()
        child.join()
    assert child.exitcode == 0
    assert not list((tmp_path / "work").glob("*.json"))


@pytest.mark.parametrize("family", ["gpt2", "mamba2", "mixtral", "phi3"])
def test_other_families_compress_save_and_load(family, tmp_path):
    """P10: logits of the saved model, loaded by plain from_pretrained, are the same to the bit."""
    from workbench.models import quiet_transformers

    model = family_model(family)
    from lplr_q.activation_aware.discovery import unfuse_experts

    unfuse_experts(model)
    calibration = collect_hessians(model, TOKENS)
    settings = replace(QUICK, bits=3.5)
    records = compress_model(model, calibration, settings, tmp_path, threads=1)
    biases = {n: model.get_submodule(n).bias for n in records}
    assemble(model, tmp_path)
    assert len(list(quantised_layers(model))) == len(records)
    for name, bias in biases.items():
        layer = model.get_submodule(name)
        assert (bias is None) == (layer.bias is None)
        assert bias is None or torch.equal(layer.bias, bias)
    with torch.no_grad():
        before = model(input_ids=TOKENS[:2]).logits
    assert bool(torch.isfinite(before).all())
    with quiet_transformers():
        from transformers import AutoModelForCausalLM

        save_compressed(model, None, tmp_path / "saved")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    with torch.no_grad():
        after = loaded.eval()(input_ids=TOKENS[:2]).logits
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


def test_weights_are_read_from_files_as_the_model_has_them(tmp_path):
    for family in ("gpt2", "qwen2"):
        model = family_model(family)
        model.save_pretrained(tmp_path / family)
        weights = FolderWeights.open(tmp_path / family)
        from lplr_q.activation_aware.hessian import linear_names, linear_weight

        for name in (n for block in linear_names(model).values() for n in block):
            assert torch.equal(weights(name), linear_weight(model.get_submodule(name)))
        with pytest.raises(DataError, match=r"no weight of model\.layers\.9"):
            weights("model.layers.9.mlp.up_proj")


def test_more_bits_and_more_rank_mean_less_error(model, calibration, tmp_path):
    """P10, on the errors that make it up."""
    names = ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"]
    errors = {}
    for rank in (0, 4, 16):
        settings = replace(QUICK, bits=None, q_bits=2, rank=rank)
        records = compress_model(
            model, calibration, settings, tmp_path / f"r{rank}", names=names, threads=1
        )
        errors[rank] = sum(r["error"] for r in records.values())
    assert errors[0] > errors[4] > errors[16]
    by_bits = []
    for bits in (2.2, 3.2, 4.2):
        records = compress_model(
            model, calibration, replace(QUICK, bits=bits), tmp_path / f"b{bits}", names=names
        )
        by_bits.append(sum(r["error"] for r in records.values()))
    assert by_bits[0] > by_bits[1] > by_bits[2]


def test_blocks_in_turns_see_the_compressed_ones_and_make_up_for_them(tmp_path):
    errors = {}
    original = family_model("mistral")
    with torch.no_grad():
        target = original.model(input_ids=TOKENS).last_hidden_state
    settings = replace(QUICK, bits=2.6)
    for alpha in (0.0, 0.5):
        model = family_model("mistral")
        records = compress_in_turns(
            model, TOKENS, settings, tmp_path / str(alpha), fingerprint={}, alpha=alpha
        )
        assert len(records) == 14
        with torch.no_grad():
            hidden = model.model(input_ids=TOKENS).last_hidden_state
        errors[alpha] = float((hidden - target).norm() / target.norm())
    assert errors[0.5] < errors[0.0]
    again = family_model("mistral")  # everything is found, nothing computed
    before = unit_bytes(tmp_path / "0.5")
    compress_in_turns(again, TOKENS, settings, tmp_path / "0.5", fingerprint={}, alpha=0.5)
    assert unit_bytes(tmp_path / "0.5") == before
    with torch.no_grad():
        assert torch.equal(again.model(input_ids=TOKENS).last_hidden_state, hidden)


@pytest.mark.parametrize(
    ("family", "left"),
    [("gpt2", "transformer.h.1.mlp.c_proj"), ("mistral", "model.layers.1.mlp.down_proj")],
)
def test_all_but_the_last_layer_of_the_mlp_make_up_for_errors(family, left):
    """attn.c_proj of GPT-2 is the output of the attention and is corrected."""
    model = family_model(family)
    for block in stream_blocks(model, TOKENS, inputs="compressed", cross=True):
        for group in groups_of(block.calibration):
            weights = corrected_weights(model, block, group, 0.5, 1e-2)
            for name in group.names:
                own = linear_weight(model.get_submodule(name)).detach()
                if block.index == 1:
                    assert torch.equal(weights(name), own) == (name == left), name
        for name in block.calibration.key_of:
            model.get_submodule(name).weight.data *= 0.7


def test_budgets_ranks_and_widths():
    fixed = CompressionSettings(bits=None, q_bits=2, rank=64)
    assert candidates(512, 512, fixed) == [(2, 64)]
    assert candidates(32, 512, fixed) == [(2, 32)]
    assert candidates(512, 512, replace(fixed, method="quip-sharp")) == [(2, 0)]
    assert candidates(512, 512, replace(fixed, compute_q=False)) == [(0, 64)]
    assert candidates(512, 512, CompressionSettings(bits=3.5))[0][0] == 3
    assert len(candidates(512, 512, CompressionSettings(bits=4.5, try_widths=3))) == 3
    with pytest.raises(ConfigError, match="raise --bits"):
        candidates(512, 512, CompressionSettings(bits=1.5))
    with pytest.raises(ConfigError, match="unknown method 'lplr_ldlq'"):
        CompressionSettings(method="lplr_ldlq")
    with pytest.raises(ConfigError, match="give a budget"):
        CompressionSettings(bits=None)
    with pytest.raises(ConfigError, match="needs group"):
        CompressionSettings(bits=None, q_bits=2, method="rtn")


@pytest.mark.parametrize(
    "options",
    [{"rescale": True}, {"factor_codebook": "e8p"}, {"rht": False}, {"codebook": "tcq-8"},
     {"compute_q": False}, {"q_group": 64}],
    ids=str,
)  # fmt: skip
def test_no_option_exceeds_the_budget(options, model, calibration, tmp_path):
    """Divisors of the inputs, scales of coded factors and signs are paid from it."""
    name = "model.layers.0.self_attn.q_proj"
    settings = replace(QUICK, bits=2.6, **options)
    records = compress_model(model, calibration, settings, tmp_path, names=[name], threads=1)
    spent, rank = records[name]["bits_per_weight"], records[name]["settings"]["rank"]
    one_more = layer_bits(
        64, 64, rank=rank + 1, codebook=settings.codebook, rotated=settings.rht,
        q_bits=2 if settings.compute_q else 0, factor_codebook=settings.factor_codebook,
        rescaled=settings.rescale, q_group=settings.q_group,
    )  # fmt: skip
    assert spent <= 2.6 < one_more.per_weight


def test_bad_input(model, calibration, tmp_path):
    with pytest.raises(DataError, match=r"no Hessian for lm_head"):
        compress_model(model, calibration, QUICK, tmp_path, names=["lm_head"])
    with pytest.raises(ConfigError, match="workers=0"):
        compress_model(model, calibration, QUICK, tmp_path / "w", workers=0)
    with pytest.raises(ConfigError, match=r"--device cuda:99: .*CUDA device"):
        compress_model(model, calibration, QUICK, tmp_path / "w", devices=("cpu", "cuda:99"))
    wide = family_model("mistral")
    name = "model.layers.0.self_attn.q_proj"
    wide.get_submodule(name).weight = torch.nn.Parameter(torch.zeros(64, 32))
    with pytest.raises(DataError, match="64x32 weight with a Hessian of width 64"):
        compress_model(wide, calibration, QUICK, tmp_path / "x", names=[name])
    broken = family_model("mistral")
    broken.get_submodule(name).weight.data[3, 5] = float("nan")
    with pytest.raises(DataError, match=r"q_proj: weight has 1 non-finite entries.*\(3, 5\)"):
        compress_model(broken, calibration, QUICK, tmp_path / "y", names=[name])
    with pytest.raises(DataError, match="holds no compressed sublayer"):
        assemble(model, tmp_path / "empty")


@pytest.mark.slow
def test_perplexity_of_a_trained_model_rises_as_bits_fall(tmp_path):
    """P10."""
    from lplr_q.activation_aware.quantized_layer import set_mode
    from lplr_q.evaluate import load_blocks, nats_by_source, perplexity_columns
    from workbench.models import load_model

    model, tokenizer = load_model("micro-mistral")
    place = {"tokens": 4096, "length": 256}
    train = load_blocks(tokenizer, "microworld:doc", split="train", **place)
    test = load_blocks(tokenizer, "microworld:doc", split="test", **place)
    calibration = collect_hessians(model, train.tokens, mask=train.counted)

    def perplexity(subject):
        nats = nats_by_source(subject, [test])[test.name]
        return perplexity_columns(test, nats)["perplexity"]  # padding is not counted

    found = [perplexity(model)]
    for bits in (4.1, 3.1, 2.1):
        settings = replace(QUICK, bits=bits)
        compress_model(model, calibration, settings, tmp_path / str(bits))
        compressed, _ = load_model("micro-mistral")
        assemble(compressed, tmp_path / str(bits))
        found.append(perplexity(set_mode(compressed, "cached")))
    original, four, three, two = found
    assert four < three < two
    assert four == pytest.approx(original, rel=0.02)
