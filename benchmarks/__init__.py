"""The training tasks and timings of fastlstm: ``python -m benchmarks --help``."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType


class BenchmarkError(RuntimeError):
    """Something for the user to put right, printed without a traceback."""


def extra(module: str) -> ModuleType:
    """The module of that name, or a `BenchmarkError` that says how to install it."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise BenchmarkError(
            f"the package {error.name} is missing; install what the benchmarks need: "
            'pip install --no-build-isolation -e ".[bench]"'
        ) from error
