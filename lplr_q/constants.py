"""Tables that are computed once and must be real whatever the caller's default device is."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def on_cpu(build: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Run ``build`` with the CPU as default device.

    Model loaders create layers under the meta device; a table built there would be empty, and a
    cache would keep it so.
    """

    @functools.wraps(build)
    def built(*arguments: Arguments.args, **options: Arguments.kwargs) -> Result:
        with torch.device("cpu"):
            return build(*arguments, **options)

    return built
