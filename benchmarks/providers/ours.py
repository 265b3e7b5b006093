"""fastlstm: the backend that it chooses, each backend by name, and under torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import fastlstm

from ..speed.contender import Contender, around
from ..speed.workload import Workload
from . import Provider
from .pytorch import copy, from_module, refuses_step


class Ours(Provider):
    """fastlstm.LSTM."""

    name, label = "fastlstm", "fastlstm"
    packages = ("fastlstm",)
    own_kernels = True
    backend: str | None = None

    def missing(self) -> str | None:
        if self.backend is None:
            return None
        status = fastlstm.backends()[self.backend]
        return None if status.available else status.detail

    def refuses(self, work: Workload) -> str | None:
        if self.backend in ("triton", "cuda") and work.on_cpu:
            return "for GPUs: on a CPU it is only checked"
        if self.backend == "cpu":
            return "on CPUs that is what fastlstm chooses" if work.on_cpu else "for CPUs"
        return refuses_step(work)

    def contender(self, work: Workload) -> Contender:
        module: Any = copy(work.lstm, fastlstm.LSTM)
        call = self.prepare(module)
        if work.reset is not None:
            call = partial(call, reset=work.reset)
        made = from_module(module, work, call)
        if self.backend is None:
            return made
        return around(made, partial(fastlstm.backend, self.backend))

    def prepare(self, module: Any) -> Callable[..., Any]:
        """What is called."""
        return module


class Cpu(Ours):
    """The CPU kernels, which the choice is anyway where they are built."""

    name, label, backend = "fastlstm-cpu", "fastlstm, cpu", "cpu"


class Triton(Ours):
    """The Triton kernels."""

    name, label, backend = "fastlstm-triton", "fastlstm, triton", "triton"


class Cuda(Ours):
    """The CUDA C++ kernels."""

    name, label, backend = "fastlstm-cuda", "fastlstm, cuda", "cuda"


class Reference(Ours):
    """Plain PyTorch operations, a step at a time."""

    name, label, backend = "fastlstm-reference", "fastlstm, reference", "reference"
    own_kernels = False  # its products are PyTorch's, with sums as long as the BLAS makes them


class Compiled(Ours):
    """fastlstm.LSTM under torch.compile, as one graph."""

    name, label = "fastlstm-compiled", "fastlstm, compiled"

    def refuses(self, work: Workload) -> str | None:
        if work.lengths is not None:
            return "a packed batch, whose lengths would be a part of the code"
        return super().refuses(work)

    def prepare(self, module: Any) -> Callable[..., Any]:
        torch.compiler.reset()
        return torch.compile(module, fullgraph=True)
