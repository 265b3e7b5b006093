"""The backend of plain PyTorch operations: any device, any floating dtype, any derivative."""

from __future__ import annotations

from torch import Tensor

from fastlstm import reference
from fastlstm.kernels.base import Backend, register
from fastlstm.spec import LayerSpec

__all__ = ["REFERENCE"]


class ReferenceBackend(Backend):
    """Computes every layer, one step after the other."""

    name = "reference"
    layer = staticmethod(reference.layer)

    def detail(self) -> str:
        """Describe in a line what is there."""
        return "plain PyTorch: any device, any floating dtype, torch.func"

    def kernel(self) -> str:
        """Name what runs."""
        return "PyTorch operations"

    def describe(self, spec: LayerSpec, T: int, B: int, x: Tensor) -> str:
        """Describe in a line how it would compute a layer."""
        return "one product for the input of all steps, then a step at a time"


REFERENCE = register(ReferenceBackend())
