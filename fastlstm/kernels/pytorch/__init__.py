"""The backend of PyTorch's own kernels: oneDNN, cuDNN, MIOpen, those of MPS and XPU.

It computes what ``nn.LSTM``, ``nn.RNN`` and ``nn.LSTMCell`` compute, to the bit, on every device
that PyTorch has: a stack of layers is one call of the function that they call. What records calls
(compiled code, exports, transforms) sees the operators of a layer, as of any other backend.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlstm.kernels.base import Backend, register
from fastlstm.spec import LayerSpec, Sequences

from . import calls, operators

__all__ = ["TORCH"]


class TorchBackend(Backend):
    """Computes what the modules of ``torch.nn`` can compute, by what they call."""

    name = "torch"
    lstm_fwd, lstm_bwd, rnn_fwd, rnn_bwd = operators.OPERATORS
    stack = staticmethod(calls.stack)
    cell = staticmethod(calls.cell)
    proven = True

    def detail(self) -> str:
        """Describe in a line what is there."""
        return f"PyTorch's own kernels, what nn.LSTM runs: {', '.join(_libraries())}"

    def kernel(self) -> str:
        """Name what runs."""
        return "PyTorch's own, what nn.LSTM runs"

    def obstacle(self, spec: LayerSpec, x: Tensor) -> str | None:
        """Say why PyTorch has no such layer of an input like x; None if it has."""
        if spec.is_extended:
            return "torch.nn has the plain cell only"
        return None if x.is_floating_point() else f"the torch backend takes no {x.dtype}"

    def lacks(self, x: Tensor, sequences: Sequences, cell_states: bool) -> str | None:
        """Say what of a call torch.nn does not have; None if it has all."""
        if sequences.reset is not None:
            return "torch.nn has no reset"
        if cell_states:
            return "torch.nn does not return the cell states"
        lengths = sequences.lengths
        if not isinstance(lengths, Tensor) or (x.is_cpu and lengths.is_cpu):
            return None
        if lengths.is_cpu and not torch.compiler.is_compiling():
            return None
        return f"torch.nn packs by lengths on the CPU, these are on {lengths.device}"

    def has_second(self, x: Tensor) -> bool:
        """Whether PyTorch has second derivatives there: on the CPU, and not with cuDNN."""
        return x.is_cpu

    def describe(self, spec: LayerSpec, T: int, B: int, x: Tensor) -> str:
        """Describe in a line how it would compute such a layer."""
        return "in one call with all layers of the stack"

    def keeps_gates(self, spec: LayerSpec) -> bool:
        """Never: PyTorch's kernels do not show them."""
        return False


def _libraries() -> list[str]:
    """Name what PyTorch was built with and finds here."""
    backends: Any = torch.backends
    found = ["oneDNN"] if backends.mkldnn.is_available() else []
    if torch.cuda.is_available():
        found.append("MIOpen" if torch.version.hip else f"cuDNN {backends.cudnn.version()}")
    if backends.mps.is_available():
        found.append("MPS")
    if torch.xpu.is_available():
        found.append("XPU")
    return found or ["none of its libraries"]


TORCH = register(TorchBackend())
