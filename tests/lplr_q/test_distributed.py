import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch

from lplr_q import distributed
from tests.conftest import ROOT, child_environment
from workbench.cli import RunOptions
from workbench.errors import ConfigError

TWO = """
import sys, torch
from lplr_q import distributed
with distributed.group() as rank:
    total = distributed.all_reduce_sum(torch.tensor([1.0 + rank]))
    agreed = distributed.all_agree(True), distributed.all_agree(rank == 0)
    sent = distributed.broadcast(torch.tensor([7 * (1 - rank)]))
    distributed.barrier()
    mine = distributed.mine(list("abcde"))
    if rank == 1:  # while the other goes on
        with distributed.by_itself():
            assert (distributed.rank(), distributed.world()) == (0, 1)
            assert float(distributed.all_reduce_sum(torch.tensor(5.0))) == 5
            distributed.barrier()
    print(rank, distributed.world(), float(total), agreed, int(sent), "".join(mine), flush=True)
assert not distributed.active()
"""


def test_alone_it_is_rank_zero_of_one():
    assert not distributed.init()
    assert (distributed.rank(), distributed.world(), distributed.local_rank()) == (0, 1, 0)
    x = torch.arange(3.0)
    assert distributed.all_reduce_sum(x) is x
    assert distributed.mine([1, 2, 3]) == [1, 2, 3]
    assert distributed.all_agree(True)
    assert not distributed.all_agree(False)
    with distributed.group() as rank:
        assert rank == 0
        assert not distributed.active()


def test_half_an_environment_is_one_line(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ConfigError, match="start with torchrun"):
        distributed.init()


def test_every_rank_records_into_a_folder_of_its_own(monkeypatch, tmp_path):
    @dataclass(frozen=True)
    class Experiment:
        seed: int = 0
        run: RunOptions = RunOptions()

    experiment = Experiment(run=RunOptions(root=tmp_path))
    assert distributed.own_run("lplr_q.x", experiment) is experiment
    monkeypatch.setattr(distributed, "rank", lambda: 3)
    name = distributed.own_run("lplr_q.x", experiment).run.name
    assert name.startswith("x-")
    assert name.endswith(".rank3")


def test_two_processes_add_up():
    done = run_two(["-c", TWO])
    lines = sorted(line for _, out, _ in done for line in out.splitlines())
    assert lines == ["0 2 3.0 (True, False) 7 ace", "1 2 3.0 (True, False) 7 bd"]


def run_two(arguments, cwd=ROOT, port=None):
    """Two python processes with torchrun's environment; (status, stdout, stderr) of each."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, *arguments],
            cwd=cwd,
            env=child_environment(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port), OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME=loopback(),
            ),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [p.communicate(timeout=120) for p in processes]
    done = [(p.returncode, *out) for p, out in zip(processes, outputs, strict=True)]
    assert all(status == 0 for status, _, _ in done), done
    return done


def loopback():
    return "lo0" if sys.platform == "darwin" else "lo" if os.name == "posix" else ""
