"""Cheap synthetic tasks that tell sequence-model layers apart.   [arXiv 2403.17844]

`from mad import train, benchmark` gives two functions, as in the published package. The scripts
`python -m mad.train` and `python -m mad.benchmark` are modules of the same names in this package.
Importing such a module would put it in the function's place, so this package keeps its own two
names whatever is imported and in whichever order. The module is reached as every other one by what
is in it: `from mad.train import Experiment, main`.
"""

import sys
from types import ModuleType
from typing import Any

from workbench.lazy import lazy_exports

FUNCTIONS = {"train": "mad.api", "benchmark": "mad.runner"}
"""Public functions that share their name with a module of this package."""

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "LAYERS": "mad.registry",
        "TASKS": "mad.registry",
        "LayerSpec": "mad.registry",
        "TaskSpec": "mad.registry",
        "Layer": "mad.layers.layer",
        "Task": "mad.tasks.task",
        "Rows": "mad.tasks.task",
        "generate": "mad.tasks.task",
        "AutoEncoder": "mad.model",
        "LanguageModel": "mad.model",
        "build_model": "mad.model",
        "MADConfig": "mad.config",
        "MADModelConfig": "mad.config",
        "check_layer": "mad.checks",
        "evaluate": "mad.evaluate",
        **FUNCTIONS,
    },
)


class _Package(ModuleType):
    """A module that does not let the import of a submodule take the name of a function."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in FUNCTIONS and isinstance(value, ModuleType):
            return
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
