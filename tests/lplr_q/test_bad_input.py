"""What is refused, and with which words: one test for each kind of bad input."""

import importlib
import json
import re
import shutil
from dataclasses import replace

import pytest
import torch

from lplr_q import eval_zeroshot, native, quantize_save
from lplr_q.activation_aware.dataclasses import DataParameters, LPLRParams, ModelParameters
from lplr_q.activation_aware.decompose import decompose, fitting_rank, prepare_hessian
from lplr_q.activation_aware.hessian import collect_hessians, load_hessians, save_hessians
from lplr_q.activation_aware.moments import COMMAND, SecondMomentAccumulator
from lplr_q.activation_aware.weight_compression import ActivationAwareWeightCompressor
from lplr_q.baselines import gptq, round_to_nearest
from lplr_q.codebooks.base import make_codebook
from lplr_q.hf import save_compressed
from lplr_q.interleaved import compress_in_turns
from lplr_q.linalg.ldl import cholesky, regularise
from lplr_q.quantize_model import CompressionSettings, assemble, compress_model
from tests.conftest import ROOT
from workbench.cli import cli, parse
from workbench.errors import ConfigError, DataError, MissingExtra
from workbench.models import load_model
from workbench.run import RunOptions
from workbench.tiny import byte_tokenizer, tiny_model

NAME = "model.layers.0.mlp.down_proj"
TOKENS = torch.randint(3, 259, (4, 16), generator=torch.Generator().manual_seed(0))
QUICK = CompressionSettings(bits=2.6, rounds=1, inner_iterations=1, sweeps=0)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def model():
    return tiny_model("mistral", num_hidden_layers=1)


@pytest.fixture(scope="module")
def calibration(model):
    return collect_hessians(model, TOKENS)


@pytest.fixture(scope="module")
def compressed(model, calibration, tmp_path_factory):
    work = tmp_path_factory.mktemp("work")
    compress_model(model, calibration, QUICK, work, names=[NAME])
    folder = tmp_path_factory.mktemp("saved")
    small = tiny_model("mistral", num_hidden_layers=1)
    assemble(small, work)
    save_compressed(small, byte_tokenizer(), folder)
    return work, folder


# ---------------------------------------------------------------- Hessians


def test_a_missing_hessian_names_layer_key_path_and_command(calibration, tmp_path):
    save_hessians(calibration, tmp_path, {"seed": 0})
    (tmp_path / "000.mlp.down_proj.safetensors").unlink()
    with pytest.raises(DataError) as error:
        load_hessians(tmp_path).of(NAME)
    for words in ("layer 0", "mlp.down_proj", str(tmp_path), "python -m lplr_q.save_hessians"):
        assert words in str(error.value)
    script = importlib.import_module("lplr_q.save_hessians")
    words = COMMAND.split()
    assert words[:3] == ["python", "-m", script.__name__]
    assert parse(script.EXPERIMENT, words[3:])[0].base_model == "MODEL"  # it can be run so


@pytest.mark.parametrize("kept", [-9, 0])
def test_a_damaged_hessian_is_named(calibration, tmp_path, kept):
    save_hessians(calibration, tmp_path, {"seed": 0})
    file = tmp_path / "000.mlp.down_proj.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(DataError) as error:
        load_hessians(tmp_path).of(NAME)
    for words in ("layer 0", "mlp.down_proj", str(file), COMMAND):
        assert words in str(error.value)


def test_an_asymmetric_hessian_warns_and_then_is_refused():
    hessian = torch.eye(8)
    hessian[0, 1] = 1e-3
    with pytest.warns(
        UserWarning, match=r"\|H - H\^T\| / \|H\| = 0.0005; \(H \+ H\^T\) / 2 is used"
    ):
        mended = regularise(hessian, sigma=0)
    assert float(mended[0, 1]) == float(mended[1, 0]) == pytest.approx(5e-4)
    hessian[0, 1] = 1.0
    with pytest.raises(DataError, match="not symmetric"):
        regularise(hessian)


@pytest.mark.parametrize("shape", [(8,), (0, 8), (2, 2, 8)])
def test_a_weight_that_is_no_matrix(shape):
    with pytest.raises(DataError, match="expected a matrix with entries"):
        decompose(torch.zeros(shape), prepare_hessian(None, 8, generator=None))


@pytest.mark.parametrize(
    "options",
    [
        {"inner_iterations": -1},
        {"sweeps": -1},
        {"refinements": -1},
        {"scale_multiplier": 0.0},
        {"scale_multiplier": float("nan")},
    ],
)
def test_counts_and_multipliers_out_of_range(options):
    prepared = prepare_hessian(None, 8, generator=None)
    with pytest.raises(ConfigError, match=next(iter(options))):
        decompose(torch.randn(4, 8), prepared, rank=1, **options)


def test_a_hessian_of_another_width():
    with pytest.raises(DataError, match=r"Hessian of shape \(8, 8\) for a weight with 16 inputs"):
        prepare_hessian(torch.eye(8), 16, generator=None)
    prepared = prepare_hessian(torch.eye(8), 8, generator=None)
    with pytest.raises(DataError, match="Hessian of width 8 for 16 inputs"):
        decompose(torch.randn(4, 16), prepared)


def test_a_hessian_that_is_not_positive_definite_says_its_smallest_eigenvalue():
    bad = torch.diag(torch.tensor([1.0, 2.0, -0.5]))
    with pytest.raises(DataError, match=r"smallest eigenvalue -0\.5; raise sigma_reg"):
        cholesky(bad)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_placed(value):
    weight = torch.randn(4, 8)
    weight[2, 3] = value
    prepared = prepare_hessian(None, 8, generator=None)
    for call in (
        lambda: decompose(weight, prepared),
        lambda: round_to_nearest(weight, bits=2),
        lambda: gptq(weight, torch.eye(8), bits=2),
    ):
        with pytest.raises(DataError, match=r"1 non-finite entries, the first at \(2, 3\)"):
            call()
    hessian = torch.eye(8)
    hessian[5, 1] = value
    with pytest.raises(DataError, match=r"the first at \(5, 1\)"):
        regularise(hessian)
    with pytest.raises(DataError, match="1 non-finite inputs after 0 tokens"):
        SecondMomentAccumulator(8).add(weight)


def test_too_little_text_warns_and_none_is_an_error(model, calibration):
    widths = {len(moment.mean) for moment in calibration.moments.values()}
    assert max(widths) > TOKENS.numel() >= min(widths)
    assert [line.partition(":")[2] for line in calibration.warnings()] == [
        " 64 tokens for width 172; the Hessian is rank deficient and held up by --sigma-reg only"
    ]
    with pytest.raises(DataError, match="no calibration token"):
        SecondMomentAccumulator(8).finish()
    with pytest.raises(DataError, match="expected rows x length"):
        collect_hessians(model, TOKENS[:0])


# ---------------------------------------------------------------- settings


def test_unknown_names_list_the_choices():
    with pytest.raises(ConfigError, match="unknown codebook 'e8'.*e8p"):
        make_codebook("e8", 2)
    with pytest.raises(ConfigError, match="unknown method 'lplr_ldlq'.*lplr-ldlq"):
        replace(QUICK, method="lplr_ldlq")


def test_bits_a_codebook_lacks():
    with pytest.raises(ConfigError, match="e8p has no 5-bit version; choose from 2, 3, 4"):
        make_codebook("e8p", 5)


@pytest.mark.parametrize("rank", [-1, 9])
def test_ranks_that_do_not_fit(rank):
    prepared = prepare_hessian(None, 8, generator=None)
    with pytest.raises(ConfigError, match=rf"rank={rank} does not fit a 16x8 matrix; use 0 to 8"):
        decompose(torch.randn(16, 8), prepared, rank=rank)


def test_a_rank_for_all_matrices_is_clipped_with_a_warning():
    with pytest.warns(UserWarning, match=r"rank=9 exceeds min\(16, 8\) of q_proj"):
        assert fitting_rank(9, (16, 8), name="q_proj") == 8


@pytest.mark.parametrize(
    ("order", "words"),
    [((), "update_order"), (("LR", "LR"), "update_order"), (("LR", "X"), "update_order")],
)
def test_orders_of_update_that_decompose_nothing_or_something_else(order, words):
    prepared = prepare_hessian(None, 8, generator=None)
    with pytest.raises(ConfigError, match=words):
        decompose(torch.randn(4, 8), prepared, rank=1, update_order=order)
    with pytest.raises(ConfigError, match=words):
        LPLRParams(update_order=order)


def test_more_tuned_components_than_there_are():
    with pytest.raises(ConfigError, match="ft_rank"):
        LPLRParams(rank=8, ft_rank=9)


def test_widths_without_a_hadamard_matrix_when_asked_strictly():
    with pytest.raises(ConfigError, match="no Hadamard matrix of order 13"):
        prepare_hessian(torch.eye(13), 13, generator=generator(), strict=True)
    prepare_hessian(torch.eye(13), 13, generator=generator())  # the Hartley transform


def test_the_strict_flag_names_the_layer_before_any_work(tmp_path):
    strict = replace(
        quantize_save.EXPERIMENT, base_model="tiny:mistral", rht="strict",
        run=RunOptions(root=tmp_path, name="strict", threads=1, device="cpu"),
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"layers\.0\.mlp\.gate_proj: no Hadamard .* order 172"):
        quantize_save.main(strict)
    assert not list(tmp_path.rglob("*.safetensors"))


# ---------------------------------------------------------------- folders


def test_a_folder_of_other_settings_shows_the_difference(model, calibration, compressed):
    with pytest.raises(ConfigError, match=r"settings\.bits: 2\.6 → 3\.1"):
        compress_model(model, calibration, replace(QUICK, bits=3.1), compressed[0], names=[NAME])


def test_a_checkpoint_of_a_newer_version(compressed, tmp_path):
    newer = tmp_path / "newer"
    shutil.copytree(compressed[1], newer)
    config = json.loads((newer / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"]["version"] += 1
    (newer / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(DataError, match=r"format version \d+, this is \d+; update"):
        load_model(newer)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("run", ["--model", "MODEL"]),
        ("quantize_save", ["--base-model", "MODEL"]),
        ("quantize_save", ["--base-model", "MODEL", "--hessian-save-path", "HESSIANS"]),
        ("quantize_save", ["--base-model", "MODEL", "--inputs", "compressed"]),
        ("fro_norm_experiment", ["--model", "MODEL"]),
        ("fro_norm_experiment", ["--model", "MODEL", "--hessians", "HESSIANS"]),
        ("sv_profile", ["--model", "MODEL", "--hessians", "HESSIANS"]),
    ],
)
def test_a_model_that_is_compressed_already(
    script, words, compressed, calibration, tmp_path, monkeypatch, capsys
):
    """Every script that compresses says so in one line, whatever else is given."""
    save_hessians(calibration, tmp_path / "hessians", {})
    places = {"MODEL": str(compressed[1]), "HESSIANS": str(tmp_path / "hessians")}
    module = importlib.import_module(f"lplr_q.{script}")
    given = [places.get(word, word) for word in words]
    with pytest.raises(SystemExit) as caught:
        cli(module.main, module.EXPERIMENT, arguments=[*given, "--root", str(tmp_path / "runs")])
    assert caught.value.code == 2
    text = capsys.readouterr().err.splitlines()
    (said,) = [line for line in text if line.startswith("error: ")]
    assert re.search(
        r"compressed already; compress the orig|already quantised; give the orig", said
    )


def test_a_compressed_model_is_refused_by_every_function(compressed, calibration, tmp_path):
    again, tokenizer = load_model(compressed[1])
    refused = pytest.raises(ConfigError, match=f"{NAME} is compressed already; compress the orig")
    with refused:
        compress_model(again, calibration, QUICK, tmp_path)
    with pytest.raises(DataError, match="already quantised; compress the original"):
        compress_model(compressed[1], calibration, QUICK, tmp_path)
    with refused:
        compress_in_turns(again, TOKENS, QUICK, tmp_path, fingerprint={})
    assert not list(tmp_path.iterdir())  # nothing was begun
    save_hessians(calibration, tmp_path, {})
    compressor = ActivationAwareWeightCompressor(
        ModelParameters(), DataParameters(), LPLRParams(), tmp_path, compute_hessians=False,
        model=again, tokenizer=tokenizer,
    )  # fmt: skip
    with refused:
        compressor.get_layer_quantizer(0)


# ---------------------------------------------------------------- what is not installed


def test_tasks_only_lm_eval_knows(monkeypatch):
    monkeypatch.setattr(eval_zeroshot, "available", lambda name: False)
    with pytest.raises(MissingExtra, match="unknown task 'hellaswag'.*need lm-eval"):
        eval_zeroshot.choose_scorer(replace(eval_zeroshot.EXPERIMENT, tasks=("hellaswag",)))


def test_no_kernels_is_one_line_and_the_same_codes(monkeypatch):
    """Without a compiler or CUDA the plain form runs; a line says so."""
    x = torch.randn(16, 16, generator=generator())
    book = make_codebook("tcq-8", 2)
    usual = book.encode(x)
    monkeypatch.setenv("FIVEFOLD_NATIVE", "0")
    assert native.status() == "C kernels of lplr_q: switched off by FIVEFOLD_NATIVE=0 → torch"
    assert native.library() is None
    assert torch.equal(book.encode(x), usual)


@pytest.mark.parametrize(
    ("script", "methods"),
    [
        ("run", "rtn"),
        ("quantize_save", None),
        ("fro_norm_experiment", "rtn"),
        ("finetune_wikitext", None),
    ],
)
def test_a_log_says_that_there_is_no_compiler(script, methods, tmp_path, monkeypatch):
    module = importlib.import_module(f"lplr_q.{script}")
    words = ["--config", str(ROOT / f"configs/lplr_q/{script}.tiny.yaml"), "--root", str(tmp_path)]
    words += ["--methods", methods] if methods else []
    experiment, _ = parse(module.EXPERIMENT, words)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    native.load.cache_clear()
    try:
        module.main(experiment)
    finally:
        native.load.cache_clear()
    (log,) = tmp_path.glob("lplr_q/*/log.txt")
    assert "C kernels of lplr_q: no C compiler found → torch" in log.read_text(encoding="utf-8")
    assert native.status(torch.device("cuda")) == "C kernels of lplr_q: not for cuda → torch"
