import inspect
import math
import subprocess
import sys

import pytest
import torch

import lplr_q
from lplr_q.activation_aware import dataclasses as parameters
from lplr_q.activation_aware.dataclasses import (
    DEVSETS,
    INITS,
    DataParameters,
    LPLRParams,
    ModelParameters,
    QuipArgs,
    SubLayerInfo,
)
from lplr_q.activation_aware.decompose import Decomposition, decompose, prepare_hessian
from lplr_q.utils.enums import CalibSet, InitKind
from tests.conftest import child_environment
from workbench.errors import ConfigError


def test_published_defaults():
    params = LPLRParams()
    assert (params.rank, params.iters, params.lplr_iters) == (64, 20, 5)
    assert (params.Q_bits, params.L_bits, params.R_bits) == (2, 2, 2)
    assert params.activation_aware_Q
    assert params.activation_aware_LR
    assert not params.hadamard_transform
    assert not params.Q_hessian_downdate
    assert params.order == ("LR", "Q")  # defect 1: an empty default decomposed nothing
    assert params.quip_args.sigma_reg == params.quip_args.sigma_reg2 == 1e-2
    data = DataParameters()
    assert (data.devset_size, data.context_length, data.batch_size) == (256, 4096, 2)
    assert parameters.Decomposition is Decomposition


def test_the_settings_are_arguments_of_decompose_and_the_defaults_decompose_something():
    params = LPLRParams(rank=2, iters=1)
    settings = params.to_settings((16, 24))
    assert set(settings) <= set(inspect.signature(decompose).parameters)
    weight = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
    result = decompose(weight, prepare_hessian(None, 24, generator=None), **settings)
    assert 0.05 < result.error < 0.6
    assert result.rank == 2
    assert result.q_codes


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"update_order": ()}, "update_order is empty"),
        ({"update_order": ("LR", "LR")}, "at most once"),
        ({"update_order": ("LR", "Q", "S")}, "LR and Q"),
        ({"update_order": ("LR",)}, "Q is to be computed"),
        ({"rank": -1}, "rank=-1"),
        ({"ft_rank": 65}, "ft_rank=65 of only rank=64"),
        ({"iters": 0}, "iters=0"),
        ({"lplr_iters": -1}, "lplr_iters=-1"),
        ({"Q_bits": 5}, "5-bit"),
        ({"Q_bits": 9, "lattice_quant_Q": False}, "9-bit"),
        ({"codebook": "e9p"}, "unknown codebook 'e9p'; nearest: e8p"),
        ({"factor_codebook": "nope", "L_bits": 4, "R_bits": 4}, "unknown codebook 'nope'"),
        ({"method": "lplr_ldlq"}, "nearest: lplr-ldlq"),
        ({"init": "odrli"}, "unknown init"),
        ({"q_hessian": "down"}, "unknown q_hessian"),
        ({"L_bits": 12}, "L_bits=12; choose from"),
        ({"R_bits": 0}, "R_bits=0; choose from"),
        ({"L_bits": 4, "R_bits": 5, "factor_codebook": "e8p"}, "choose from 2, 3, 4"),
        ({"compute_quantized_component": False, "rank": 0}, "nothing would be left"),
        ({"method": "lplr", "compute_low_rank_factors": False}, "nothing would be left"),
        ({"method": "lplr", "full_quip_sharp": True}, "full_quip_sharp"),
        ({"Q_hessian_downdate": True, "q_hessian": "projq"}, "give one"),
        ({"target_bpw": 0.0}, "target_bpw"),
    ],
)
def test_parameters_that_cannot_work_are_refused_when_made(wrong, words):
    with pytest.raises(ConfigError, match=words) as caught:
        LPLRParams(**wrong)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"sigma_reg": 0.0}, "sigma_reg"),
        ({"sigma_reg": math.nan}, "sigma_reg"),
        ({"sigma_reg2": 0.1}, "only 0.01"),
        ({"quip_tune_iters": -1}, "quip_tune_iters"),
        ({"resid_scale_override": 0.9}, "decoded with another scale"),  # defect 2
        ({"scale_override": 0.0}, "scale_override"),
        ({"incoh_mode": "hda"}, "unknown incoh_mode"),
        ({"lora_rank": 8}, "LPLRParams.rank"),
    ],
)
def test_settings_of_the_q_step_are_checked(wrong, words):
    with pytest.raises(ConfigError, match=words):
        QuipArgs(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [{"devset_size": 0}, {"context_length": 2}, {"batch_size": 0}, {"devset": ()},
     {"devset": "file"}, {"data_file": "a.txt"}],
)  # fmt: skip
def test_data_parameters_are_checked(wrong):
    with pytest.raises(ConfigError):
        DataParameters(**wrong)


def test_sources_of_the_calibration_sets():
    assert DataParameters("wikitext").sources()[0].startswith("Salesforce/wikitext")
    assert DataParameters("file", data_file="a.jsonl").sources() == ("a.jsonl",)
    assert DataParameters(("stdlib", "rp1t")).sources()[0] == "stdlib"
    assert set(DEVSETS) | {"file"} == set(CalibSet)
    assert DataParameters(CalibSet.FALCON).sources() == (DEVSETS["falcon"],)
    assert set(INITS) == set(InitKind)


def test_each_published_flag_reaches_decompose():
    params = LPLRParams(
        quip_args=QuipArgs(scale_override=0.9, quip_tune_iters=3, full_svd=True, rescale_WH=True),
        Q_hessian_downdate=True,
        activation_aware_LR=False,
        lattice_quant_LR=True,
        L_bits=4,
        R_bits=4,
        update_order=("Q", "LR"),
    )
    settings = params.to_settings()
    assert settings["scale_multiplier"] == pytest.approx(0.9 / 1.03)
    assert settings["sweeps"] == 3
    assert settings["randomised_svd"] is False
    assert settings["rescale"]
    assert settings["q_hessian"] == "downdate"
    assert not settings["activation_aware_lr"]
    assert settings["factor_codebook"] == "e8p"
    assert settings["update_order"] == ("Q", "LR")
    assert settings["factor_bits"] == 4
    assert LPLRParams(L_bits=3, R_bits=16).to_settings()["factor_bits"] == (3, 16)
    plain = LPLRParams(activation_aware_Q=False, lattice_quant_Q=False, Q_bits=3).to_settings()
    assert plain["feedback"] is False
    assert plain["sweeps"] == 0
    assert (plain["codebook"], plain["q_bits"]) == ("lloyd-max", 3)
    alone = LPLRParams(method="lplr").to_settings()
    assert not alone["compute_q"]
    assert alone["compute_lr"]
    baseline = LPLRParams(full_quip_sharp=True)
    assert baseline.effective_method == "quip-sharp"
    assert baseline.rotated
    assert baseline.rank_for((64, 64)) == 0


def test_rank_on_small_matrices_and_for_a_budget():
    with pytest.warns(UserWarning, match="clipped to 16"):
        assert LPLRParams(rank=64).rank_for((16, 128)) == 16
    params = LPLRParams(target_bpw=2.5, L_bits=4, R_bits=4, hadamard_transform=True)
    rank = params.rank_for((256, 256))
    spent = lplr_q.layer_bits(256, 256, rank=rank).per_weight
    more = lplr_q.layer_bits(256, 256, rank=rank + 1).per_weight
    assert spent <= 2.5 < more
    apart = LPLRParams(target_bpw=2.5, L_bits=3, R_bits=5, hadamard_transform=True)
    wide = apart.rank_for((64, 256))
    fits, exceeds = (
        lplr_q.layer_bits(64, 256, rank=r, factor_bits=(3, 5)).per_weight for r in (wide, wide + 1)
    )
    assert fits <= 2.5 < exceeds
    rescaled = LPLRParams(**{**vars(params), "quip_args": QuipArgs(rescale_WH=True)})
    found = rescaled.rank_for((256, 256))
    assert found < rank
    assert lplr_q.layer_bits(256, 256, rank=found, rescaled=True).per_weight <= 2.5
    with pytest.raises(ConfigError, match="raise it or lower Q_bits"):
        LPLRParams(target_bpw=1.5).rank_for((64, 64))
    with pytest.raises(ConfigError, match="ft_rank=40"):
        LPLRParams(target_bpw=2.5, ft_rank=40).rank_for((64, 64))


def test_the_token_is_found_and_never_shown(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    model = ModelParameters("micro-mistral", token="hf_secret")
    assert "secret" not in repr(model)
    assert model.access_token() == "hf_secret"
    other = ModelParameters("micro-mistral")
    assert other.access_token(tmp_path) is None
    (tmp_path / "hf_access_token.txt").write_text("hf_file\n", encoding="utf-8")
    assert other.access_token(tmp_path) == "hf_file"
    monkeypatch.setenv("HF_TOKEN", "hf_env")
    assert other.access_token(tmp_path) == "hf_env"
    with pytest.raises(ConfigError, match="base_model is empty"):
        ModelParameters(" ")
    with pytest.raises(ConfigError, match="nearest: float16"):
        ModelParameters("x", dtype="float1")


def test_a_sublayer_without_result_has_no_error():
    info = SubLayerInfo(0, "mlp.up_proj", "model.layers.0.mlp.up_proj", "0.mlp.gate_proj", (4, 4))
    assert math.isnan(info.error)


def test_parameters_cost_no_torch():
    code = (
        "import sys; from lplr_q.activation_aware.dataclasses import LPLRParams, DataParameters;"
        "LPLRParams(rank=8); DataParameters(); assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=child_environment(), capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
