"""How quantised weights lie in memory: panels that every instruction set reads as they are.

A *panel* holds 64 rows of a matrix: of an LSTM's ``[4H, K]`` the gates i, f, g, o of 16 units, 16
rows each; of any other matrix 64 rows that follow each other. Neighbours of a row lie together:

- int8: ``[panels, K / 4, 64, 4]``, each row with a scale, so that its largest number is 127;
- bfloat16: ``[panels, K / 2, 64, 2]``.

K and the rows are padded with zeros. Numbers that belong to rows, such as scales and biases, are
``[panels, count, 64]``, float32. ``csrc/cpu/quantized/quantized.h`` is the other side of this.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = [
    "COLUMNS",
    "TOGETHER",
    "from_panels",
    "from_rows",
    "pack_rows",
    "powers_of_rows",
    "quantize_rows",
    "to_panels",
]

COLUMNS = 64
TOGETHER = {torch.int8: 4, torch.bfloat16: 2}  # numbers of a row that lie together
_LARGEST = 127
_TINY = torch.finfo(torch.float32).tiny


def quantize_rows(w: Tensor) -> tuple[Tensor, Tensor]:
    """Return integers ``[R, K]`` int8 and scales ``[R]`` of which ``w [R, K]`` is the product.

    A row that is all zeros, or so small that float32 has no scale for it, becomes zero.
    """
    w = w.float()
    scale = w.abs().amax(1) / _LARGEST if w.numel() else w.new_zeros(len(w))
    scale = torch.where(scale < _TINY, 0.0, scale)
    q = (w / torch.where(scale == 0, 1.0, scale)[:, None]).round().clamp(-_LARGEST, _LARGEST)
    return torch.where(scale[:, None] == 0, 0.0, q).to(torch.int8), scale


def powers_of_rows(w: Tensor) -> Tensor:
    """Return the power of two ``[R]`` of the largest number in each row of ``w [R, K]``.

    At least 2^-100, which is that of zeros: what is below it is nearly zero to a product.
    """
    largest = w.float().abs().amax(1) if w.numel() else torch.zeros(len(w))
    mantissa, exponent = largest.clamp(min=2.0**-100).frexp()
    return torch.full_like(mantissa, 0.5).ldexp(exponent)


def to_panels(w: Tensor, gates: int) -> Tensor:
    """Lay ``w [gates * H, K]``, int8 or bfloat16, out in panels."""
    together, block = TOGETHER[w.dtype], COLUMNS // gates
    rows, K = w.shape
    H = rows // gates
    full = pad(w.view(gates, H, K), (0, -K % together, 0, -H % block))
    split = full.view(gates, -1, block, full.shape[2] // together, together)
    return split.permute(1, 3, 0, 2, 4).reshape(-1, split.shape[3], COLUMNS, together).contiguous()


def from_panels(panels: Tensor, gates: int, H: int, K: int) -> Tensor:
    """Return the matrix ``[gates * H, K]`` that :func:`to_panels` has laid out."""
    count, groups, _, together = panels.shape
    split = panels.view(count, groups, gates, COLUMNS // gates, together)
    rows = split.permute(2, 0, 3, 1, 4).reshape(gates, -1, groups * together)
    return rows[:, :H, :K].reshape(gates * H, K)


def pack_rows(numbers: Sequence[Tensor], gates: int) -> Tensor:
    """Lay numbers of rows, each ``[gates * H]``, out beside the panels."""
    block = COLUMNS // gates
    rows = torch.stack([n.float() for n in numbers]).view(len(numbers), gates, -1)
    full = pad(rows, (0, -rows.shape[2] % block)).view(len(numbers), gates, -1, block)
    return full.permute(2, 0, 1, 3).reshape(-1, len(numbers), COLUMNS).contiguous()


def from_rows(packed: Tensor, gates: int, H: int) -> list[Tensor]:
    """Return the numbers, each ``[gates * H]``, that :func:`pack_rows` has laid out."""
    split = packed.view(packed.shape[0], packed.shape[1], gates, COLUMNS // gates)
    rows = split.permute(1, 2, 0, 3).reshape(packed.shape[1], gates, -1)
    return list(rows[:, :, :H].reshape(packed.shape[1], gates * H))
