"""The operator of quantised weights: a stack of layers in inference, or one step of a cell.

- ``x``: ``[T, B, I]``, packed rows ``[N, I]`` with ``batch_sizes [T]``, or ``[B, I]`` of one step;
  float32, bfloat16 or float16, and so are all states and results;
- ``weights``: for each layer and direction ``weight_ih``, ``weight_hh``, ``rows``, and of a
  projection ``weight_hr``, ``rows_hr``: see :mod:`fastlstm.quantized.packing`;
- ``gates``: 4 of an LSTM, 1 of an RNN, whose activation is relu with ``relu``;
- ``h0 [L*D, B, P]``, ``c0 [L*D, B, H]``, of one step ``[B, P]`` and ``[B, H]``; None for zeros;
- ``lengths``: int64 ``[B]``; ``reset``: bool ``[T, B]``.

It returns ``y [T, B, D*P]``, ``h_n`` and ``c_n``; the c_n of an RNN has no elements. It changes
nothing, so exported programs and compiled graphs contain it as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlstm import extension
from fastlstm.kernels import operators

__all__ = ["INFER", "isa"]

INFER = operators.define_operator(
    "quantized_infer_cpu",
    "(Tensor x, Tensor[] weights, int gates, bool relu, int input, int hidden, int projected, "
    "int layers, int directions, Tensor? h0, Tensor? c0, Tensor? batch_sizes, Tensor? lengths, "
    "Tensor? reset) -> (Tensor, Tensor, Tensor)",
)
_ISA = operators.define_operator("quantized_isa", "() -> str")


def _allocate(
    x: Tensor, weights: Sequence[Tensor], gates: int, relu: bool, input: int, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    hidden, projected, layers, directions, h0, _, batch_sizes, *_ = rest
    P, cells = projected or hidden, hidden if gates == 4 else 0
    y = x.new_empty(*x.shape[:-1], directions * P)
    if x.dim() == 2 and batch_sizes is None:
        return y, x.new_empty(x.shape[0], P), x.new_empty(x.shape[0], cells)
    batch: Any = x.shape[1]
    if x.dim() == 2:  # packed rows: only values say how many sequences there are
        batch = h0.shape[1] if h0 is not None else torch.library.get_ctx().new_dynamic_size()
    rows = layers * directions
    return y, x.new_empty(rows, batch, P), x.new_empty(rows, batch, cells)


def isa() -> str:
    """Return the instruction set of these kernels, as FASTLSTM_QUANTIZED_ISA names it.

    On x86-64 "avx512fp16", "avx512bf16", "avx512vnni", "avxvnni" or "avx2", on ARM "i8mm" or
    "dotprod", else "portable". For products with bfloat16 weights activations are rounded to
    float16 with "avx512fp16", to bfloat16 with "avx512bf16" and "i8mm". Both of AVX-512 differ
    from "avx512vnni" in these products alone; Intel's CPUs take "avx512bf16" only if it is named.
    """
    extension.load()
    return str(_ISA())


operators.add_fake(INFER.name(), _allocate)
operators.load_on_first_use((INFER,), extension.error, "CPU")
