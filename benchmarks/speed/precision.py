"""How a call computes: the dtype of its tensors and, in float32, what its products round to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Precision:
    """`tf32` says whether products may round their factors to TF32; None for other dtypes."""

    name: str
    dtype: torch.dtype
    tf32: bool | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def eps(self) -> float:
        """The spacing, at 1, of the numbers that are multiplied."""
        # TF32 has the 10 bits of float16, with the range of float32.
        return torch.finfo(torch.float16 if self.tf32 else self.dtype).eps

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Allows or forbids TF32, in cuDNN and in matrix products, for the block."""
        if self.tf32 is None:
            yield
            return
        cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
        before = cudnn.allow_tf32, matmul.allow_tf32
        cudnn.allow_tf32 = matmul.allow_tf32 = self.tf32
        try:
            yield
        finally:
            cudnn.allow_tf32, matmul.allow_tf32 = before


PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision("bf16", torch.bfloat16),
        Precision("fp16", torch.float16),
        Precision("tf32", torch.float32, tf32=True),
        Precision("exact", torch.float32, tf32=False),
    )
}
ALL_PRECISIONS = {**PRECISIONS, "fp64": Precision("fp64", torch.float64)}  # the last on CPUs only
