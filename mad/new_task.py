"""Begin a task of your own: one file, settings and a test that pass as they are.

    python -m mad.new_task my-task --into my_package
    cd my_package && python -m pytest test_my_task.py
    python -m mad.train --config my_task.yaml

Nothing that exists is overwritten.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from mad.scaffold import task_files, write_new
from workbench.cli import RunField, RunOptions, cli
from workbench.run import Run


@dataclass(frozen=True)
class Experiment:
    """What the task is called and where its files go."""

    task: tyro.conf.Positional[str] = "my-task"
    """Name in small letters, parts joined by a dash."""
    into: Path | None = None
    """Folder of the new files; none means the run's own."""
    run: RunField = RunOptions()
    """Where and how."""

    def __post_init__(self) -> None:
        task_files(self.task)


EXPERIMENT = Experiment()  # edit me


def main(experiment: Experiment) -> dict[str, Any]:
    """Write the files; returns their names."""
    with Run.open("mad.new_task", experiment) as run:
        paths = write_new(experiment.into or run.directory, task_files(experiment.task))
        if run.finished:
            return run.results
        return run.finish(
            {"files": " ".join(path.name for path in paths)},
            title=f"A new task, {experiment.task}",
            summary=f"Written to {experiment.into or 'the folder of this run'}: "
            f"{', '.join(path.name for path in paths)}. Next: run its test, "
            "replace what is drawn, run the test again.",
        )


if __name__ == "__main__":
    cli(main, EXPERIMENT)
