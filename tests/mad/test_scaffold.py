"""New layers and tasks pass as they are written; the settings of layers are the registry's."""

import importlib
import subprocess
import sys
from dataclasses import asdict, dataclass, replace

import pytest
import yaml

from mad.registry import LAYERS, LayerSpec, parse_layer
from mad.scaffold import all_layer_settings, layer_settings, names_of
from tests.conftest import ROOT, child_environment
from workbench.errors import ConfigError
from workbench.run import RunOptions

new_layer = importlib.import_module("mad.new_layer")
new_task = importlib.import_module("mad.new_task")


def at(folder, script, **changes):
    return replace(script.EXPERIMENT, run=RunOptions(root=folder / "runs", threads=1), **changes)


def test_what_is_written_passes_its_own_tests(tmp_path):
    folder = tmp_path / "mine"
    new_layer.main(at(tmp_path, new_layer, layer="my-mixer", into=folder))
    new_task.main(at(tmp_path, new_task, task="my-task", into=folder))
    assert sorted(path.name for path in folder.iterdir()) == [
        "my_mixer.py", "my_mixer.yaml", "my_task.py", "my_task.yaml", "test_my_mixer.py",
        "test_my_task.py",
    ]  # fmt: skip
    environment = child_environment(PYTHONPATH=str(ROOT))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "."], cwd=folder,
        env=environment, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout
    for name in ("my_mixer", "my_task"):
        done = subprocess.run(
            [sys.executable, "-m", "mad.train", "--config", f"{name}.yaml", "--print-config"],
            cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert f"{name}:My" in done.stdout


def test_the_written_layer_is_tested_by_its_test(tmp_path):
    """The test that comes with a layer fails once the layer looks ahead."""
    folder = tmp_path / "mine"
    new_layer.main(at(tmp_path, new_layer, layer="my-mixer", into=folder))
    code = (folder / "my_mixer.py").read_text(encoding="utf-8")
    assert code.count("F.pad(x[:, :-1], (0, 0, 1, 0))") == 1
    code = code.replace("F.pad(x[:, :-1], (0, 0, 1, 0))", "x.roll(1, dims=1)")
    (folder / "my_mixer.py").write_text(code, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "."], cwd=folder,
        env=child_environment(PYTHONPATH=str(ROOT)), capture_output=True, text=True, check=False,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    assert "causality" in done.stdout


def test_nothing_that_exists_is_overwritten(tmp_path):
    one = at(tmp_path, new_layer, layer="my-mixer", into=tmp_path / "mine")
    first = new_layer.main(one)
    assert new_layer.main(one) == first, "the same command again"
    file = tmp_path / "mine/my_mixer.py"
    file.unlink()
    new_layer.main(one)
    assert file.is_file(), "a missing file is written again"
    file.write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match="not overwritten"):
        new_layer.main(one)
    assert file.read_text(encoding="utf-8") == "mine"
    blocked = tmp_path / "file"
    blocked.touch()
    with pytest.raises(ConfigError, match="expected a folder"):
        new_task.main(at(tmp_path, new_task, into=blocked))


@pytest.mark.parametrize("name", ["My-Mixer", "../x", "", "a--b", "1st", "mamba", "class"])
def test_impossible_names_are_refused(name, tmp_path):
    with pytest.raises(ConfigError, match="name"):
        at(tmp_path, new_layer, layer=name)


def test_names():
    assert names_of("my-2nd-mixer", {}) == {
        "name": "my-2nd-mixer", "module": "my_2nd_mixer", "Class": "My2NdMixer",
    }  # fmt: skip


# ---------------------------------------------------------------- configs/mad/layers


def test_settings_of_layers_are_those_of_the_registry():
    folder = ROOT / "configs/mad/layers"
    found = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.yaml")}
    assert found == all_layer_settings(), "run: python -m mad.new_layer --write-configs"


@pytest.mark.parametrize("name", LAYERS)
def test_settings_of_a_layer_say_all_its_defaults(name):
    (text,) = yaml.safe_load(layer_settings(name, LAYERS[name]))["layers"]
    choice = parse_layer(text)
    assert choice.options == asdict(LAYERS[name].options)
    assert choice.build == LAYERS[name].build


@dataclass(frozen=True)
class Odd:
    small: float = 1e-7
    flag: bool = False
    text: str = "auto"
    nothing: int | None = None


def test_values_come_back_as_they_were(monkeypatch, tmp_path):
    monkeypatch.setitem(LAYERS, "odd", LayerSpec("mad.layers.channel:MLP", "O", "channel", Odd()))
    (text,) = yaml.safe_load(layer_settings("odd", LAYERS["odd"]))["layers"]
    assert parse_layer(text).options == asdict(Odd())
    assert parse_layer("odd,small=3").options["small"] == 3.0
    with pytest.raises(ConfigError, match="should be a number"):
        parse_layer("odd,small=tiny")

    (tmp_path / "gone.yaml").touch()
    result = new_layer.main(at(tmp_path, new_layer, write_configs=True, into=tmp_path))
    assert result["written"] == len(LAYERS)
    assert not (tmp_path / "gone.yaml").exists()
    assert (tmp_path / "odd.yaml").is_file()
