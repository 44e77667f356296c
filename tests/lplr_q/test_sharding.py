"""Parts of gradients and moments on several processes against one AdamW of everything."""

import copy

import pytest
import torch
from torch import nn

from lplr_q import distributed
from lplr_q.sharding import JoinedAdamW, ShardedAdamW
from tests.conftest import ROOT
from tests.lplr_q.test_distributed import run_two
from workbench.errors import ConfigError


def parameters():
    """Seven and six numbers in two groups: neither is cut evenly into two parts."""
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(size, generator=generator) for size in ((5,), (2, 1), (3, 2)))
    one, two, three = nn.Parameter(a), nn.Parameter(b), nn.Parameter(c)
    return [{"params": [one, two], "lr": 0.1, "weight_decay": 0.01}, {"params": [three], "lr": 0.2}]


def gradients(groups, step, rank):
    """Of one process; the second parameter has none in the second process."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    for number, p in enumerate(p for g in groups for p in g["params"]):
        grad = torch.randn(p.shape, generator=generator)
        p.grad = None if (number, rank) == (1, 1) else grad


def alone(steps, max_norm, state=None, start=0):
    """Values, norms and state by one plain AdamW that sees the sum of both gradients."""
    groups = parameters()
    listed = [p for g in groups for p in g["params"]]
    optimizer = torch.optim.AdamW(groups)
    norms = []
    for step in range(start, steps):
        total = [torch.zeros_like(p) for p in listed]
        for rank in (0, 1):
            gradients(groups, step, rank)
            total = [
                t if p.grad is None else t + p.grad for t, p in zip(total, listed, strict=True)
            ]
        for p, t in zip(listed, total, strict=True):
            p.grad = t
        bound = max_norm or float("inf")
        norms.append(float(torch.nn.utils.clip_grad_norm_(listed, bound)))
        optimizer.param_groups[1]["lr"] = 0.2 / (step + 1)
        optimizer.step()
    return [p.detach() for p in listed], norms, optimizer.state_dict()


def train(kind, max_norm, steps=4, optimizer=None, start=0):
    """The same by both processes together, as the loop drives it; rank 0 leads."""
    groups = parameters()
    if distributed.rank() == 1:  # what rank 0 has counts
        for p in (p for g in groups for p in g["params"]):
            p.data.add_(1.0)
    optimizer = kind(groups)
    norms = []

    def work(step):
        optimizer.prepare()
        gradients(groups, step, distributed.rank())
        loss, norm = optimizer.reduce(torch.tensor(1.0 + step), max_norm)
        assert float(loss) == 2.0 * (1 + step)
        norms.append(float(norm))

    state = {}
    if distributed.rank() == 0:
        assert not optimizer.state_dict()["state"]
        for step in range(start, steps):
            distributed.announce(step + 1)
            work(step)
            optimizer.inner.param_groups[1]["lr"] = 0.2 / (step + 1)
            optimizer.step()
            if step == 1:  # one step too far, then back to what was saved
                saved = copy.deepcopy(optimizer.state_dict())
                listed = [p for g in groups for p in g["params"]]
                values = [p.detach().clone() for p in listed]
                for kept in saved["state"].values():
                    assert set(kept) == {"step", "exp_avg", "exp_avg_sq"}
                distributed.announce(100)
                work(99)
                norms.pop()
                optimizer.step()
                for p, value in zip(listed, values, strict=True):
                    p.data.copy_(value)
                optimizer.load_state_dict(saved)
        state = optimizer.state_dict()
        distributed.announce(0)
    else:
        while (said := distributed.announce(0)) != 0:
            work(said - 1) if said > 0 else optimizer.help(said)
    optimizer.share()
    return [p.detach() for g in groups for p in g["params"]], norms, state


def both_kinds():
    """Run in each of two processes."""
    with distributed.group():
        for kind in (JoinedAdamW, ShardedAdamW):
            for max_norm in (0.0, 1.5, 50.0):  # never, always, never reached
                values, norms, state = train(kind, max_norm)
                expected, wanted, whole = alone(4, max_norm)
                exact = {"rtol": 0, "atol": 0} if max_norm != 1.5 else {"rtol": 1e-5, "atol": 1e-6}
                for value, right in zip(values, expected, strict=True):
                    torch.testing.assert_close(value, right, **exact)
                if distributed.rank():
                    continue
                assert norms == pytest.approx(wanted, rel=1e-5)
                assert [g["params"] for g in state["param_groups"]] == [[0, 1], [2]]
                for index, kept in whole["state"].items():
                    assert float(state["state"][index]["step"]) == 4
                    for name in ("exp_avg", "exp_avg_sq"):
                        found = state["state"][index][name]
                        assert found.shape == kept[name].shape
                        torch.testing.assert_close(found, kept[name], **exact)
                again = torch.optim.AdamW(parameters())
                again.load_state_dict(state)  # any number of processes can go on from it
        world = ShardedAdamW(parameters())
        assert [p.numel() for p in world.own] == [4, 3]


def test_parts_on_two_processes_are_one_adamw_of_all():
    run_two(["-c", "from tests.lplr_q.test_sharding import both_kinds; both_kinds()"])


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "zero2"])
def test_the_launcher_reads_its_files(kind):
    from accelerate.commands.config.config_args import load_config_from_file

    file = ROOT / "configs" / "lplr_q" / f"accelerate.{kind}.yaml"
    read = load_config_from_file(str(file))
    assert read.num_processes == 2
    named = {"ddp": "MULTI_GPU", "fsdp": "FSDP", "zero2": "DEEPSPEED"}
    assert read.distributed_type == named[kind]


@pytest.mark.parametrize(
    ("said", "stage"),
    [
        ({}, False),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, True),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, False),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, None),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_SHARDING_STRATEGY": "SHARD_GRAD_OP"}, True),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_SHARDING_STRATEGY": "NO_SHARD"}, False),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_SHARDING_STRATEGY": "FULL_SHARD"}, None),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, None),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2",
             "FSDP_RESHARD_AFTER_FORWARD": "false"},
            True,
        ),
    ],
    ids=str,
)  # fmt: skip
def test_what_accelerate_was_told(said, stage, monkeypatch):
    for key, value in said.items():
        monkeypatch.setenv(key, value)
    assert not distributed.sharded()  # alone there is nothing to spread
    monkeypatch.setattr(distributed, "world", lambda: 2)
    if stage is None:
        with pytest.raises(ConfigError, match="use ZeRO stage 2"):
            distributed.sharded()
    else:
        assert distributed.sharded() is stage
