"""The choice of device, dtype and threads, and what is refused."""

from __future__ import annotations

import pytest
import torch

from workbench import device
from workbench.errors import ConfigError


def test_auto_is_float32_where_there_is_no_accelerator(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    chosen = device.choose(threads=1)
    assert (chosen.device.type, chosen.dtype, chosen.threads) == ("cpu", torch.float32, 1)
    assert chosen.describe() == "cpu, float32, 1 threads"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "cuad"}, "nearest: cuda"),
        ({"device": "cuda"}, "no CUDA device"),
        ({"dtype": "float31"}, "nearest: float32"),
        ({"threads": -1}, "--threads -1"),
    ],
)
def test_what_is_not_there_is_refused_with_a_hint(monkeypatch, arguments, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=message):
        device.choose(**arguments)


def test_threads_follow_omp_num_threads(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert device.choose("cpu").threads == 1
