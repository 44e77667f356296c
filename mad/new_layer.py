"""Begin a layer of your own: one file, settings and a test that pass as they are.

    python -m mad.new_layer my-mixer --into my_package
    cd my_package && python -m pytest test_my_mixer.py
    python -m mad.new_layer --write-configs           # configs/mad/layers from the registry

Nothing that exists is overwritten, but with --write-configs, which renews those files.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from mad.scaffold import all_layer_settings, layer_files, write_new
from workbench import storage
from workbench.cli import RunField, RunOptions, cli
from workbench.run import Run


@dataclass(frozen=True)
class Experiment:
    """What the layer is called and where its files go."""

    layer: tyro.conf.Positional[str] = "my-layer"
    """Name in small letters, parts joined by a dash."""
    into: Path | None = None
    """Folder of the new files; none means the run's own."""
    write_configs: bool = False
    """Write the defaults of every registered layer (into configs/mad/layers) instead."""
    run: RunField = RunOptions()
    """Where and how."""

    def __post_init__(self) -> None:
        if not self.write_configs:
            layer_files(self.layer)


EXPERIMENT = Experiment()  # edit me


def main(experiment: Experiment) -> dict[str, Any]:
    """Write the files; returns their names."""
    if experiment.write_configs:
        return write_configs(experiment.into or Path("configs/mad/layers"))
    with Run.open("mad.new_layer", experiment) as run:
        paths = write_new(experiment.into or run.directory, layer_files(experiment.layer))
        if run.finished:
            return run.results
        return run.finish(
            {"files": " ".join(path.name for path in paths)},
            title=f"A new layer, {experiment.layer}",
            summary=f"Written to {experiment.into or 'the folder of this run'}: "
            f"{', '.join(path.name for path in paths)}. Next: run its test, "
            "replace the equation, run the test again.",
        )


def write_configs(folder: Path) -> dict[str, Any]:
    """One settings file per registered layer; files of layers that are gone are removed."""
    files = all_layer_settings()
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        storage.write_text(folder / name, text)
    for path in folder.glob("*.yaml"):
        if path.name not in files:
            path.unlink()
    return {"written": len(files), "folder": folder.as_posix()}


if __name__ == "__main__":
    cli(main, EXPERIMENT)
