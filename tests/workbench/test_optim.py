from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.errors import ConfigError
from workbench.optim import (
    clip,
    constant_schedule,
    cosine_schedule,
    linear_schedule,
    parameter_groups,
    wsd_schedule,
)
from workbench.tiny import tiny_model


def rates(make, steps: int, **options) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = make(optimizer, **options)
    result = []
    for _ in range(steps):
        result.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return result


def test_cosine_passes_through_its_known_points():
    lr = rates(cosine_schedule, 14, total_steps=12, warmup_steps=4, floor=0.1)
    assert lr[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert lr[4] == pytest.approx(2.0)
    assert lr[8] == pytest.approx(2.0 * 0.55)  # half way: the mean of 1 and the floor
    assert lr[6] == pytest.approx(2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2))
    assert lr[12] == lr[13] == pytest.approx(0.2)


def test_linear_and_stable_decay_pass_through_their_known_points():
    lr = rates(linear_schedule, 11, total_steps=10)
    assert lr == pytest.approx([2.0 * (1 - k / 10) for k in range(11)])
    lr = rates(wsd_schedule, 11, total_steps=10, decay_fraction=0.5, floor=0.2)
    assert lr[:6] == pytest.approx([2.0] * 6)
    assert lr[10] == pytest.approx(0.4)
    assert lr[8] == pytest.approx(2.0 * (1 - 0.8 * 0.6))
    assert rates(constant_schedule, 4, warmup_steps=2) == pytest.approx([1.0, 2.0, 2.0, 2.0])


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([cosine_schedule, linear_schedule, wsd_schedule]),
    st.integers(1, 30),
    st.integers(0, 30),
    st.floats(0, 1),
)
def test_any_schedule_rises_then_falls_between_floor_and_one(make, total, warmup, floor):
    warmup = min(warmup, total)
    lr = rates(make, total + 3, total_steps=total, warmup_steps=warmup, floor=floor)
    assert all(0 <= value <= 2.0 + 1e-9 for value in lr)
    assert all(a <= b + 1e-9 for a, b in pairwise(lr[:warmup]))
    after = lr[warmup:]
    assert all(a >= b - 1e-9 for a, b in pairwise(after))
    if warmup < total:
        assert lr[-1] == pytest.approx(2.0 * floor, abs=1e-9)


def test_a_schedule_continues_from_its_state():
    def make():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        return optimizer, cosine_schedule(optimizer, 20, warmup_steps=3)

    optimizer, schedule = make()
    for _ in range(7):
        optimizer.step()
        schedule.step()
    other, resumed = make()
    resumed.load_state_dict(schedule.state_dict())
    other.load_state_dict(optimizer.state_dict())
    for _ in range(7):
        for o, s in ((optimizer, schedule), (other, resumed)):
            o.step()
            s.step()
        assert optimizer.param_groups[0]["lr"] == other.param_groups[0]["lr"]


@pytest.mark.parametrize(
    "options",
    [{"total_steps": 0}, {"total_steps": 5, "warmup_steps": 6}, {"total_steps": 5, "floor": 2.0}],
)
def test_nonsense_is_refused(options):
    with pytest.raises(ConfigError):
        rates(cosine_schedule, 1, **options)


@pytest.mark.parametrize("family", ["mistral", "mamba2", "gpt2"])
def test_every_trained_parameter_is_in_one_group(family):
    model = tiny_model(family)
    frozen = next(model.parameters())
    frozen.requires_grad_(False)
    groups = parameter_groups(model, 0.3)
    listed = [p for group in groups for p in group["params"]]
    assert len(listed) == len({id(p) for p in listed})
    assert {id(p) for p in listed} == {id(p) for p in model.parameters() if p.requires_grad}
    names = {id(p): name for name, p in model.named_parameters()}
    for group in groups:
        for parameter in group["params"]:
            exempt = parameter.ndim < 2 or names[id(parameter)].endswith(("A_log", ".D"))
            assert (group["weight_decay"] == 0.0) == exempt, names[id(parameter)]


def test_embeddings_can_be_left_without_decay_and_nothing_to_train_is_an_error():
    model = tiny_model("mistral")
    plain = parameter_groups(model, decay_embeddings=False)[1]["params"]
    assert any(p is model.get_input_embeddings().weight for p in plain)
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match="frozen"):
        parameter_groups(model)


def test_clip_scales_the_joint_norm_and_reports_the_old_one():
    a, b = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1))
    a.grad, b.grad = torch.tensor([0.0, 3.0]), torch.tensor([4.0])
    assert float(clip([a, b], 0.0)) == pytest.approx(5.0)
    assert b.grad.item() == 4.0
    assert float(clip([a, b], 1.0)) == pytest.approx(5.0)
    assert a.grad.tolist() == pytest.approx([0.0, 0.6], abs=1e-5)
    assert b.grad.item() == pytest.approx(0.8, abs=1e-5)
    assert float(clip([torch.nn.Parameter(torch.zeros(1))])) == 0.0
