"""The input of a call, in the form that layers take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastlstm.layer.checks import check_packed, size
from fastlstm.layer.options import Options
from fastlstm.layer.recorded import is_recorded

__all__ = ["Input", "batch_major"]

_is_transformed = torch._C._are_functorch_transforms_active


def batch_major(y: Tensor) -> Tensor:
    """Return a result ``[T, B, n]`` as ``[B, T, n]``; the tensor itself where no graph has it.

    A view that was made without gradients may neither be detached in place nor take part in an
    edit in place that has some.
    """
    return y.transpose(0, 1) if y.requires_grad else y.transpose_(0, 1)


class Input(NamedTuple):
    """The input of a call as layers take it, and how their results become the caller's."""

    x: Tensor  # [T, B, I], or [N, I] of packed rows
    steps: int
    batch: int
    unbatched: bool  # the caller's is [T, I]
    swapped: bool  # the caller's is [B, T, I]

    @classmethod
    def of(cls, input: Tensor, hx: Sequence[Tensor] | None, options: Options) -> Input:
        """Bring a caller's input to ``[T, B, I]``."""
        sizes, dims = options.sequences.batch_sizes, input.dim()
        if sizes is not None:
            steps, batch, _ = check_packed(options.kind, input, sizes, hx)
            return cls(input, steps, batch, False, False)
        if dims == 2:
            return cls(input.unsqueeze(1), input.shape[0], 1, True, False)
        if dims != 3:
            raise ValueError(f"{options.kind}: expected input to be 2-D or 3-D, got {size(input)}")
        steps, batch, _ = input.shape
        if not options.batch_first:
            return cls(input, steps, batch, False, False)
        steps, batch = batch, steps
        # One step of one sequence lies the same either way, but not in a graph, which may see
        # others.
        if torch.compiler.is_compiling() or is_recorded() or steps != 1 or batch != 1:
            return cls(input.transpose(0, 1), steps, batch, False, True)
        return cls(input, steps, batch, False, False)

    def for_kernels(self) -> Input:
        """Return the same for a layer of kernels, which keep x for backward.

        With ``batch_first`` that is a copy in training, as with ``nn.LSTM``: a caller may fill
        the same buffer anew before backward. Kernels read it faster, which pays for it.
        """
        if not (self.swapped and torch.is_grad_enabled()):
            return self
        if torch.compiler.is_compiling() or is_recorded():
            return self
        return self._replace(x=self.x.contiguous())

    def undo(self, t: Tensor) -> Tensor:
        """Lay a result ``[T, B, n]`` out as the caller's input."""
        if not (self.unbatched or self.swapped):
            return t
        if self.unbatched:
            return t.squeeze(1)
        if torch.compiler.is_compiling() or is_recorded() or _is_transformed():
            return t.transpose(0, 1)
        return batch_major(t)
