import json
from enum import Enum

import pytest
import torch

from lplr_q.activation_aware.dataclasses import LPLRParams, SubLayerInfo
from lplr_q.activation_aware.layer_quantization import (
    FIELDS,
    ActivationAwareLayerQuant,
    find_sublayer,
)
from lplr_q.activation_aware.moments import SecondMomentAccumulator
from lplr_q.linalg.ldl import regularise
from lplr_q.linalg.ldlq import weighted_loss
from workbench.errors import ConfigError, DataError

WIDTH = {"self_attn.q_proj": 32, "self_attn.k_proj": 32, "mlp.down_proj": 24}
PARAMS = LPLRParams(
    rank=4, iters=2, lplr_iters=1, L_bits=4, R_bits=4, hadamard_transform=True, ft_rank=1
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moment(width):
    sums = SecondMomentAccumulator(width)
    sums.add(normal(200, width, seed=width) * torch.linspace(2, 0.2, width) + 0.3)
    return sums.finish()


@pytest.fixture
def parts():
    """Weights, moments (counting how often each was read) and the block's object."""
    weights = {f"m.0.{s}": normal(16, n, seed=i) for i, (s, n) in enumerate(WIDTH.items())}
    moments = {width: moment(width) for width in set(WIDTH.values())}
    reads: list[str] = []

    def moment_of(name):
        reads.append(name)
        return moments[weights[name].shape[1]]

    quantizer = ActivationAwareLayerQuant(
        0,
        [SubLayerInfo(0, s, f"m.0.{s}", f"key-{n}", (16, n), tokens=200) for s, n in WIDTH.items()],
        PARAMS,
        weight_of=weights.__getitem__,
        moment_of=moment_of,
        bias_of=lambda name: torch.ones(16) if name.endswith("down_proj") else None,
    )
    return quantizer, weights, moments, reads


def test_the_error_is_that_of_the_decoded_matrix(parts):
    quantizer, weights, moments, _ = parts
    result = quantizer.compress_sublayer("mlp.down_proj")
    weight = weights["m.0.mlp.down_proj"].double()
    hessian = regularise(moments[24].matrix(), sigma=1e-2)
    difference = weight - result.dequantize().double()
    error = (weighted_loss(difference, hessian) / weighted_loss(weight, hessian)) ** 0.5
    assert quantizer.min_error("down_proj") == pytest.approx(float(error), rel=1e-5)
    assert quantizer.min_error("down_proj") == pytest.approx(
        min(step["error"] for step in result.history[1:]), rel=1e-4
    )
    assert quantizer.info("down_proj").error == result.error


def test_layers_with_the_same_input_share_one_hessian(parts):
    quantizer, _, _, reads = parts
    done = quantizer.compress()
    assert len(done) == 3
    assert all(info.decomposition is not None for info in done)
    assert reads == ["m.0.self_attn.q_proj", "m.0.mlp.down_proj"]
    q, k = (quantizer.info(s).decomposition for s in ("q_proj", "k_proj"))
    assert torch.equal(q.signs_in, k.signs_in)
    quantizer.compress()  # nothing is left to do
    assert len(reads) == 2


def test_the_quantised_layer_computes_with_the_codes(parts):
    quantizer, weights, _, _ = parts
    result = quantizer.compress_sublayer("mlp.down_proj")
    layer = quantizer.get_quantized_linear_layer("mlp.down_proj")
    x = normal(5, 24, seed=9)
    expected = x @ result.dequantize().T + 1
    # the component that stays trainable is stored in 16 bits
    assert torch.allclose(layer(x), expected, atol=2e-2 * float(expected.abs().max()))
    assert layer.lora_L.shape == (16, 1)
    codes = quantizer.get_quantized_linear_layer("mlp.down_proj", ft_rank=0)
    assert torch.allclose(codes(x), expected, atol=1e-4)
    assert weights["m.0.mlp.down_proj"].shape == (codes.out_features, codes.in_features)
    with pytest.raises(ConfigError, match="ft_rank=5, but layer 0, mlp.down_proj has 4"):
        quantizer.get_quantized_linear_layer("mlp.down_proj", ft_rank=5)


def test_the_quip_sharp_baseline_has_no_factors(parts):
    quantizer, weights, moments, _ = parts
    baseline = ActivationAwareLayerQuant(
        0, [SubLayerInfo(0, "down", "m.0.mlp.down_proj", "k", (16, 24))],
        LPLRParams(method="quip-sharp"), weight_of=weights.__getitem__,
        moment_of=lambda _: moments[24],
    )  # fmt: skip
    result = baseline.compress_sublayer("down")
    assert result.rank == 0
    assert result.signs_in is not None
    assert result.error > quantizer.compress_sublayer("down_proj").error


def test_nothing_can_be_asked_of_what_was_not_compressed(parts):
    quantizer = parts[0]
    for ask in (
        quantizer.min_error,
        quantizer.get_quantized_linear_layer,
        quantizer.plot_errors,
        lambda s: quantizer.export_errors_json(s, "x.json"),
    ):
        with pytest.raises(ConfigError, match="has not been compressed"):
            ask("q_proj")
    with pytest.raises(ConfigError, match="nothing has been compressed"):
        quantizer.plot_errors()
    with pytest.raises(ConfigError, match="nothing has been compressed"):
        quantizer.export_errors_json(None, "folder")


def test_clean_up_forgets_the_result_and_keeps_a_hessian_that_is_waited_for(parts):
    quantizer, _, _, reads = parts
    quantizer.compress_sublayer("q_proj")
    quantizer.clean_up_sublayer("q_proj")
    assert quantizer.info("q_proj").decomposition is None
    quantizer.compress_sublayer("k_proj")
    assert len(reads) == 1
    quantizer.clean_up_sublayer("k_proj")
    quantizer.compress_sublayer("q_proj")  # q was cleaned up: k and q both wait
    assert len(reads) == 1
    quantizer.compress_sublayer("k_proj")
    quantizer.clean_up_sublayer("k_proj")  # q is done: nobody waits
    quantizer.compress_sublayer("k_proj")
    assert len(reads) == 2


def test_errors_as_files(parts, tmp_path):
    quantizer = parts[0]
    quantizer.compress_sublayer("q_proj")
    (file,) = quantizer.export_errors_json("q_proj", tmp_path / "errors")
    assert file.name == "errors.json"
    record = json.loads(file.read_text(encoding="utf-8"))
    assert set(FIELDS) <= set(record)
    history = quantizer.info("q_proj").decomposition.history
    assert len(history) >= 4  # two rounds of two sub-steps
    assert record["per_iter_errors"] == {
        component: [step["error"] for step in history if step["component"] == component]
        for component in ("LR", "Q")
    }
    assert record["error"] == quantizer.min_error("q_proj")
    assert (record["layer_idx"], record["sublayer"]) == (0, "self_attn.q_proj")
    assert record["params"]["rank"] == 4
    assert record["params"]["quip_args"]["sigma_reg"] == 0.01
    assert record["hessian"] == {"key": "key-32", "tokens": 200}
    quantizer.compress()
    files = quantizer.export_errors_json(None, tmp_path / "all")
    assert [f.name for f in files] == [f"layer_000.{name}.json" for name in WIDTH]


def test_figures_show_every_sub_step_on_a_log_axis(parts, tmp_path):
    quantizer = parts[0]
    result = quantizer.compress_sublayer("q_proj")
    axes = quantizer.plot_errors("q_proj", savefile=tmp_path / "e.png").axes[0]
    assert (tmp_path / "e.png").stat().st_size > 1000
    assert axes.get_yscale() == "log"
    drawn = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert drawn == {
        f"after {component}": [h["error"] for h in result.history if h["component"] == component]
        for component in ("LR", "Q")
    }
    later = quantizer.plot_errors("q_proj", plot_first_iter=False).axes[0]
    assert [list(line.get_ydata()) for line in later.lines] == [v[1:] for v in drawn.values()]
    other = quantizer.compress_sublayer("k_proj")
    lines = quantizer.plot_errors().axes[0].lines
    assert [len(line.get_ydata()) for line in lines] == [len(result.history), len(other.history)]
    quantizer.export_errors_json(None, tmp_path / "all")
    both = quantizer.plot_errors_json(tmp_path / "all").axes[0]
    assert [line.get_label() for line in both.lines] == ["0 self_attn.k_proj", "0 self_attn.q_proj"]
    one = quantizer.plot_errors_json(tmp_path / "all" / "layer_000.self_attn.q_proj.json").axes[0]
    assert {line.get_label(): list(line.get_ydata()) for line in one.lines} == drawn


def test_files_that_are_no_errors(tmp_path):
    with pytest.raises(DataError, match="no file of errors"):
        ActivationAwareLayerQuant.plot_errors_json(tmp_path)
    file = tmp_path / "x.json"
    file.write_text('{"layer_idx": 1}', encoding="utf-8")
    with pytest.raises(DataError, match=r"x\.json: no per_iter_errors, sublayer"):
        ActivationAwareLayerQuant.plot_errors_json(file)


def test_bad_weights_and_hessians_are_named(parts):
    quantizer, weights, _, _ = parts
    weights["m.0.self_attn.q_proj"][3, 4] = torch.nan
    with pytest.raises(DataError, match=r"layer 0, self_attn\.q_proj: .*\(3, 4\)"):
        quantizer.compress_sublayer("q_proj")
    weights["m.0.self_attn.k_proj"] = normal(16, 31)
    with pytest.raises(DataError, match=r"layer 0, self_attn\.k_proj: weight of shape"):
        quantizer.compress_sublayer("k_proj")


class Member(Enum):
    QUERY = "q_proj"


def test_a_sublayer_by_any_of_its_names():
    known = ["self_attn.q_proj", "mlp.down_proj", "mlp.shared.down_proj"]
    assert find_sublayer("self_attn.q_proj", known) == "self_attn.q_proj"
    assert find_sublayer("q_proj", known) == "self_attn.q_proj"
    assert find_sublayer(Member.QUERY, known) == "self_attn.q_proj"
    assert find_sublayer("shared.down_proj", known) == "mlp.shared.down_proj"
    with pytest.raises(ConfigError, match=r"mlp\.down_proj, mlp\.shared\.down_proj; give more"):
        find_sublayer("down_proj", known)
    with pytest.raises(ConfigError, match=r"unknown sublayer 'self_attn\.p_proj'; nearest: self"):
        find_sublayer("self_attn.p_proj", known)


def test_the_members_of_the_enum_name_real_layers():
    from lplr_q.utils.enums import SubLayer

    known = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
             "mlp.up_proj", "mlp.gate_proj", "mlp.down_proj"]  # fmt: skip
    found = [
        find_sublayer(SubLayer[name], known)
        for name in ("QUERY", "KEY", "VALUE", "O", "UP", "GATE", "DOWN")
    ]
    assert found == known
