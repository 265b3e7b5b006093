"""The backend of the Triton kernels: CUDA devices from sm_80.

This file imports neither Triton nor the kernels; :meth:`TritonBackend.error` does, when somebody
asks for the backend. README.md in the folder above says how the kernels work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from fastlstm.kernels.base import Backend, constant, register
from fastlstm.kernels.operators import define, load_on_first_use
from fastlstm.spec import LayerSpec

__all__ = ["TRITON", "TritonBackend"]

_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
_OLDEST = 3, 6  # of Triton: the compiler of 3.5 has not been tried
_MOST_UNITS_WITHOUT_GATES = 128
_OPERATORS = define("triton")


class TritonBackend(Backend):
    """Computes layers on CUDA devices, or on CPU tensors in Triton's interpreter."""

    name = "triton"
    devices = frozenset({"cuda"})
    lstm_fwd, lstm_bwd, rnn_fwd, rnn_bwd = _OPERATORS
    takes_weights_of_forward = True

    def error(self) -> str | None:
        """Say why this machine does not have it; None once it is loaded, which this does."""
        return _error()

    def detail(self) -> str:
        """Describe in a line what is there."""
        from triton import __version__

        if _interpreted():
            return f"Triton {__version__}, interpreted (TRITON_INTERPRET=1), to check the kernels"
        return f"Triton {__version__}: float32, bfloat16, float16 on CUDA devices from sm_80"

    def obstacle(self, spec: LayerSpec, x: Tensor) -> str | None:
        """Say why it cannot compute such a layer of an input like x; None if it can."""
        return self.error() or _input_obstacle(x) or _cell_obstacle(spec, x)

    def describe(self, spec: LayerSpec, T: int, B: int, x: Tensor) -> str:
        """Describe in a line the regimes and tiles of both passes."""
        from . import config
        from .launch import device_of, precision_of

        problem = config.Problem(spec, B, x.element_size(), precision_of(x))
        device = device_of(x)
        if not spec.is_lstm:
            plan = config.rnn_plan(problem, device)
            return f"forward and backward {plan.described(gates=1)} ({plan.reason})"
        forward = config.forward_plan(problem, device)
        backward = config.backward_plan(problem, device)
        text = f"forward {forward} ({forward.reason}); backward {backward}"
        missing = config.missing(problem, device)
        return f"{text}; not with the {missing}: {_no_gluon()}" if missing else text

    def regime(self, spec: LayerSpec, T: int, B: int, x: Tensor) -> str:
        """Name the regimes of both passes."""
        from . import config
        from .launch import device_of, precision_of

        problem = config.Problem(spec, B, x.element_size(), precision_of(x))
        device = device_of(x)
        if not spec.is_lstm:
            return str(config.rnn_plan(problem, device).regime)
        plans = config.forward_plan(problem, device), config.backward_plan(problem, device)
        return "/".join(plan.regime for plan in plans)

    def trials(self, x: Tensor) -> Sequence[tuple[Callable[[], Any], dict[str, int]]]:
        """Return a call in each regime of `tl` and, on a GPU, what plans make of calls there."""
        from . import config

        small = [partial(config.override, regime=regime) for regime in ("sequence", "steps")]
        sizes = {"T": 3, "B": 3} if _interpreted() else {}  # which takes seconds for a call
        found: list[tuple[Callable[[], Any], dict[str, int]]] = [(force, sizes) for force in small]
        return found + [(nullcontext, {"H": H}) for H in (20, 64, 160, 512) if x.is_cuda]

    def keeps_gates(self, spec: LayerSpec) -> bool:
        """Whether its forward pass can keep the activated gates for backward.

        With the weights in registers it does: it writes 4 numbers a cell, where computing them
        again would write and read the product of each gate in float32, and multiply. Where one
        program has the weights in shared memory it does not: four more stores lengthen each of its
        short steps. Where W_hh is large, the product that they save is not small.
        """
        wide = spec.hidden_size > _MOST_UNITS_WITHOUT_GATES
        return wide or not (spec.proj_size or spec.is_extended or _no_registers())


@constant  # Dynamo would trace the loading, it ignores the cache
def _error() -> str | None:
    return _load()


@cache
def _load() -> str | None:
    """Load the kernels; say why they cannot be loaded."""
    if find_spec("triton") is None:
        return 'Triton is not installed; to install it, run: pip install "fastlstm[triton]"'
    if torch.version.hip is not None:
        return "the kernels are for CUDA, and this torch is built for ROCm"
    try:
        from triton import __version__

        if _release(__version__) < _OLDEST:
            return "Triton {} is too old: the kernels need {}.{}".format(__version__, *_OLDEST)
        from triton import knobs

        if not knobs.runtime.interpret and not torch.cuda.is_available():
            return "there is no CUDA device, and TRITON_INTERPRET=1 is not set"
        import_module("fastlstm.kernels.triton.operators")
    except (ImportError, AttributeError) as error:  # of a broken Triton, or one of long ago
        return f"Triton cannot be loaded: {error}"
    return None


def _release(version: str) -> tuple[int, int]:
    """Return the first two numbers of a version, such as (3, 6) of "3.6.0+git1234"."""
    major, minor, *_ = version.split(".")
    return int(major), int(minor)


def _input_obstacle(x: Tensor) -> str | None:
    """Say why the kernels cannot read x."""
    if x.dtype not in _DTYPES:
        return f"the triton kernels have no {x.dtype}"
    if _interpreted():
        if not x.is_cpu:
            return f"the input is on {x.device}, the interpreter needs it on the CPU"
        if x.dtype is torch.bfloat16 and not _rounds_as_gpu():
            return "Triton's interpreter multiplies bfloat16 wrongly"
    elif not x.is_cuda:
        return f"the input is on {x.device}, the triton kernels need it on a CUDA device"
    elif _capability(x.device) < (8, 0):
        return f"{x.device} is older than sm_80"
    return None


def _cell_obstacle(spec: LayerSpec, x: Tensor) -> str | None:
    """Say why the kernels have no such cell."""
    if not spec.is_lstm or not spec.is_extended:
        return None
    return _room_for(tuple(spec), x.dtype, x.device)


@constant
def _room_for(spec: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> str | None:
    """Say why there is no room for an extended cell; the fields of a LayerSpec describe it."""
    from .config import Problem, obstacle
    from .launch import device_of, precision_of

    x = torch.empty(0, dtype=dtype, device=device)
    problem = Problem(LayerSpec(*spec), 1, x.element_size(), precision_of(x))
    return obstacle(problem, device_of(x))


@constant
def _no_gluon() -> str | None:
    """Say why not everything that is written in Gluon can run."""
    from . import gluon

    return gluon.PROBLEM or gluon.CLUSTER_PROBLEM


@constant
def _no_registers() -> bool:
    """Whether there is no registers regime."""
    from . import gluon

    return gluon.PROBLEM is not None


@constant
def _interpreted() -> bool:
    from triton import knobs

    return bool(knobs.runtime.interpret)


@constant
def _rounds_as_gpu() -> bool:
    from .launch import rounds_as_gpu

    return rounds_as_gpu


@constant
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


TRITON = register(TritonBackend())
load_on_first_use(_OPERATORS, _load, "triton")
