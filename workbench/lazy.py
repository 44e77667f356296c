"""Re-exports that import a module only when one of its names is used (PEP 562)."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any


def lazy_exports(
    package: str, exports: dict[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` for a package whose names live in other modules.

    `import sdm` then costs nothing, and `sdm.SDMClassifier` imports `sdm.estimator` on first use.

        __getattr__, __dir__, __all__ = lazy_exports(__name__, {"SDMClassifier": "sdm.estimator"})
    """
    names = sorted(exports)

    def get(name: str) -> Any:
        if name not in exports:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(exports[name]), name)
        setattr(sys.modules[package], name, value)  # next time without this function
        return value

    def directory() -> list[str]:
        return sorted(set(names) | set(vars(sys.modules[package])))

    return get, directory, names
