"""The backend of the CUDA C++ kernels: the plain LSTM on CUDA devices from sm_80.

This file loads no library; :meth:`CudaBackend.error` does, when somebody asks for the backend.
csrc/README.md says how the kernels work.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from fastlstm import extension
from fastlstm.kernels import measured
from fastlstm.kernels.base import Backend, Use, constant, register
from fastlstm.kernels.operators import define, load_on_first_use
from fastlstm.spec import LayerSpec

from . import library  # noqa: F401 (it defines operators, before their library is loaded)

__all__ = ["CUDA", "CudaBackend", "lacks"]

_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
_OPERATORS = define("cuda", rnn=False)


class CudaBackend(Backend):
    """Computes plain LSTM layers on CUDA devices, or on CPU tensors in the emulator."""

    name = "cuda"
    devices = frozenset({"cuda"})
    takes_weights_of_forward = True
    lstm_fwd, lstm_bwd, *_ = _OPERATORS

    def error(self) -> str | None:
        """Say why this machine does not have it; None once it is loaded, which this does."""
        return _error()

    def detail(self) -> str:
        """Describe in a line what is there."""
        if _emulated():
            return "emulated on the CPU (FASTLSTM_EMULATE=1), to check the kernels"
        what = "float32, bfloat16, float16 on CUDA devices from sm_80"
        return f"compiled kernels: {what}; {measured.CHOICE}"

    def obstacle(self, spec: LayerSpec, x: Tensor) -> str | None:
        """Say why it cannot compute such a layer of an input like x; None if it can."""
        found = self.error() or _input_obstacle(x) or lacks(spec)
        if found or torch.compiler.is_compiling():  # sizes may be symbols: the operator sees them
            return found
        from . import plan

        return plan.obstacle(spec, x)

    def is_proven(self, spec: LayerSpec, x: Tensor, dense: bool = True) -> bool:
        """Whether such kernels have passed their tests on GPUs like that of x."""
        return x.is_cuda and measured.is_right(x.device, x.dtype, spec.hidden_size)

    def pace(self, specs: Sequence[LayerSpec], x: Tensor, use: Use) -> float | None:
        """Say how many times as long as it PyTorch's own kernels take for a call, at least."""
        regimes = self.regime(specs[0], use.steps, use.batch, x)
        way = measured.REPLAYED if use.captured else measured.READY
        where = measured.capability(x.device), x.dtype
        return measured.pace(self.name, regimes, way, where, specs, use)

    def describe(self, spec: LayerSpec, T: int, B: int, x: Tensor) -> str:
        """Describe in a line the plans of both passes."""
        from . import plan

        return plan.describe(spec, B, x)

    def regime(self, spec: LayerSpec, T: int, B: int, x: Tensor) -> str:
        """Name the regimes of both passes."""
        from . import plan

        arguments = B, spec, plan.device_of(x)
        plans = [plan.plan_of(plan.kind_of(x), back, *arguments) for back in (False, True)]
        return "/".join(each.regime for each in plans)

    def trials(self, x: Tensor) -> Sequence[tuple[Callable[[], Any], dict[str, int]]]:
        """Return a call in each regime and, on a GPU, what the plan makes of larger ones."""
        from . import plan

        found: list[tuple[Callable[[], Any], dict[str, int]]] = [
            (partial(plan.override, regime=regime), {"T": 3, "B": 3} if _emulated() else {})
            for regime in plan.REGIMES
        ]
        return found + [(nullcontext, {"H": H}) for H in (64, 256, 512) if x.is_cuda]


def lacks(spec: LayerSpec) -> str | None:
    """Say why the kernels have no such layers, of any size; None if they have."""
    if not spec.is_lstm:
        return "the cuda kernels have no nn.RNN"
    if spec.is_extended:
        return "the cuda kernels have the plain cell only"
    return "the cuda kernels have no projection" if spec.proj_size else None


@constant  # Dynamo would trace the loading, it ignores the cache
def _error() -> str | None:
    return _load()


@cache
def _load() -> str | None:
    """Load the kernels; say why they cannot be loaded."""
    emulated = os.environ.get("FASTLSTM_EMULATE") == "1"
    if not emulated and torch.version.hip is not None:
        return "the kernels are for CUDA, and this torch is built for ROCm"
    error = extension.error() or extension.cuda_error(emulated)
    if error is not None:
        return error
    if not emulated and not torch.cuda.is_available():
        return "there is no CUDA device"
    import_module("fastlstm.kernels.cuda.operators")
    return None


def _input_obstacle(x: Tensor) -> str | None:
    """Say why the kernels cannot read x."""
    if x.dtype not in _DTYPES:
        return f"the cuda kernels have no {x.dtype}"
    if _emulated():
        return (
            None if x.is_cpu else f"the input is on {x.device}, the emulator needs it on the CPU"
        )
    if not x.is_cuda:
        return f"the input is on {x.device}, the cuda kernels need it on a CUDA device"
    old = measured.capability(x.device) < (8, 0)
    return f"{x.device} is older than sm_80" if old else None


@constant
def _emulated() -> bool:
    from . import plan

    return plan.EMULATED


CUDA = register(CudaBackend())
load_on_first_use(_OPERATORS, _load, "cuda")
