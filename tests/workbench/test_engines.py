from __future__ import annotations

import sys
import types

import pytest

from workbench import engines
from workbench.errors import ConfigError, MissingExtra
from workbench.lazy import lazy_exports


def test_a_missing_engine_names_its_install_line_and_what_runs_instead(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert not engines.available("wandb")
    with pytest.raises(MissingExtra) as caught:
        engines.need("wandb", feature="--wandb")
    text = str(caught.value)
    assert 'pip install -e ".[wandb]"' in text
    assert "--wandb" in text
    assert "metrics.jsonl alone" in text


@pytest.mark.parametrize("name", sorted(engines.ENGINES))
def test_every_engine_can_be_hidden(monkeypatch, name):
    engine = engines.ENGINES[name]
    monkeypatch.setitem(sys.modules, engine.module, None)
    monkeypatch.setitem(sys.modules, engine.module.partition(".")[0], None)
    found = engines.status(name)
    assert not found.found
    assert engine.fallback in str(found)
    with pytest.raises(MissingExtra, match="install"):
        engines.need(name)
    with pytest.raises(MissingExtra):  # also by the name of its module
        engines.need(engine.module)


@pytest.mark.parametrize("error", [OSError("libcuda.so: not found"), RuntimeError(), SystemError()])
def test_an_importable_but_broken_package_counts_as_missing(monkeypatch, tmp_path, error):
    (tmp_path / "ray.py").write_text(f"raise {error!r}\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if _is_standard(f)])
    found = engines.status("ray")
    assert not found.found
    assert type(error).__name__ in found.reason
    with pytest.raises(MissingExtra, match="broken"):
        engines.need("ray")


def _is_standard(finder) -> bool:
    return getattr(finder, "__module__", "").startswith(("_frozen", "importlib"))


def test_a_package_whose_own_dependency_is_missing_says_which(monkeypatch, tmp_path):
    (tmp_path / "wandb.py").write_text("import surely_not_there\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if _is_standard(f)])
    assert "surely_not_there" in engines.status("wandb").reason


def test_a_present_engine_is_returned(monkeypatch):
    module = types.ModuleType("wandb")
    module.__version__ = "9.9"
    monkeypatch.setitem(sys.modules, "wandb", module)
    assert engines.need("wandb") is module
    assert engines.available("wandb")


def test_cuda_engines_are_not_available_without_a_device(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    assert engines.status("flash-attn").found
    assert not engines.available("flash-attn")


def test_unknown_engine_suggests():
    with pytest.raises(ConfigError, match="flash-attn"):
        engines.available("flash-atn")


def test_record_writes_one_line_per_engine():
    lines: list[str] = []
    engines.record(["faiss", "wandb"], lines.append)
    assert len(lines) == 2
    assert lines[1].startswith("engine wandb: ")


def test_kernels_fall_back_and_say_why(monkeypatch):
    from workbench.integrations.kernels import KERNELS, fused_kernel

    for name, (engine, _) in KERNELS.items():
        monkeypatch.setitem(sys.modules, engines.ENGINES[engine].module, None)
        function, why = fused_kernel(name)
        assert function is None
        assert "not installed" in why
        with pytest.raises(MissingExtra, match="cuda"):
            fused_kernel(name, "fused")
        assert fused_kernel(name, "reference")[0] is None


def test_lazy_exports_import_on_use_only(monkeypatch):
    package = types.ModuleType("lazy_demo")
    monkeypatch.setitem(sys.modules, "lazy_demo", package)
    getter, listing, names = lazy_exports(
        "lazy_demo", {"Fraction": "fractions", "sqrt": "no.where"}
    )
    assert names == ["Fraction", "sqrt"]
    assert {"Fraction", "sqrt"} <= set(listing())
    import fractions

    assert getter("Fraction") is fractions.Fraction
    assert vars(package)["Fraction"] is fractions.Fraction  # the second use needs no function
    with pytest.raises(ModuleNotFoundError):
        getter("sqrt")
    with pytest.raises(AttributeError, match="lazy_demo"):
        getter("other")
