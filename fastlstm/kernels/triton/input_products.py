"""x through w_ih, of all steps ahead of the loop, in the order that kernels by unit read.

For layers whose x does not go through its weights in the loop. PyTorch would need a copy of the
weights by unit, a product a direction, and a copy of x where batches come first: launches of
which each costs the host 10 to 60 microseconds. Here it is one, and float32 is multiplied as
cuDNN's RNNs are told to, not as PyTorch's products are.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlstm.kernels.measured import multiplies_in_tf32
from fastlstm.kernels.products import products

from .call import Call, strides_of, weight_arguments
from .launch import dot_precision, launch, precision_of
from .plan import Plan
from .primitives import operand
from .register_tiles import by_unit

__all__ = ["UNIT", "products_by_unit", "reads_odd", "tile"]

UNIT = 4  # numbers of x and of the weights that are read together, where sizes divide by it

_ALIGNED = 16  # bytes, to which Triton's own launcher looks
# What cuBLAS computes faster, launches and all (benchmarks/results/tuning.md): multiplications
# times bytes of a number, of 16 bits, of TF32 and of exact float32.
_MOST, _MOST_TF32, _MOST_EXACT = 2**32, 2**31, 7 * 2**26


class Tile(NamedTuple):
    """What a program computes."""

    rows: int
    gates: int
    terms: int  # that are multiplied at a time
    plan: Plan


def tile(element: int, precision: str) -> Tile:
    """Return the tile for numbers of 2 or 4 bytes."""
    # The fewest that Triton 3.6 takes: exact products are unrolled over all of them.
    terms = 16 if precision == "ieee" else 128 // element
    reason = "one product of all steps"
    return Tile(64, 128, terms, Plan("inputs", 32, 64, terms, False, 4, 3, reason))


@triton.jit(do_not_specialize=["rows", "B", "x_t", "x_b"])
def lstm_input_products_kernel(
    x,  # [T, B, I] or packed [rows, I]
    w_ih,  # [4H, I], direction 0
    w_ih_reverse,  # [4H, I], direction 1, or None
    products,  # float32 [D, rows, H, 4], written
    rows,  # of all steps
    B,  # sequences; as many as rows, of packed ones
    x_t,  # X_UNIT elements of x from a step to the next
    x_b,  # X_UNIT elements of x from a sequence to the next
    I: tl.constexpr,  # I, H and D come at run time where kernels are compiled ahead
    H: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,  # of a program
    GATES: tl.constexpr,  # of a program: of how many gates of units
    TERMS: tl.constexpr,  # that are multiplied at a time
    STAGES: tl.constexpr,  # of the pipeline that loads
    X_UNIT: tl.constexpr,  # elements; it divides both strides of x
    PRECISION: tl.constexpr,  # of products: "tf32" or "ieee"
):
    """A tile of the products of a direction."""
    dtype: tl.constexpr = x.dtype.element_ty
    direction = tl.program_id(2)
    if D == 2:
        if direction == 1:
            w_ih = w_ih_reverse
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    gate = tl.program_id(1) * GATES + tl.arange(0, GATES)
    term = tl.arange(0, TERMS)
    real, real_gate = (row < rows)[:, None], (gate < 4 * H)[None, :]
    begin = (row // B).to(tl.int64) * x_t + (row % B).to(tl.int64) * x_b
    x_at = x + begin[:, None] * X_UNIT + term[None, :]
    w_at = w_ih + (gate % 4 * H + gate // 4).to(tl.int64)[None, :] * I + term[:, None]
    total = tl.zeros([ROWS, GATES], tl.float32)
    for first in tl.range(0, I, TERMS, num_stages=STAGES):
        there = term < I - first
        left = tl.load(x_at, real & there[None, :], 0)
        right = tl.load(w_at, real_gate & there[:, None], 0)
        left, right = operand(left, dtype, PRECISION), operand(right, dtype, PRECISION)
        total = tl.dot(left, right, total, PRECISION)
        x_at += TERMS
        w_at += TERMS
    at = (direction.to(tl.int64) * rows + row)[:, None] * (4 * H) + gate[None, :]
    tl.store(products + at, total, real & real_gate)


def reads_odd(element: int) -> bool:
    """Return whether the kernel reads numbers of so many bytes one by one.

    Those of 16 bits would go through registers, of which there are not enough.
    """
    return element > 2


def takes(call: Call) -> bool:
    """Return whether the kernel computes the input products of a layer.

    Of float32 it computes large ones too, where PyTorch multiplies in another precision than the
    layer. By default that is so: PyTorch's products are exact then, and take twice as long.
    """
    spec, x = call.spec, call.x
    element = x.element_size()
    size = call.rows.count * 4 * spec.hidden_size * spec.input_size * spec.directions * element
    read = (x, *(each.w_ih for each in call.weights))
    even = all(n % UNIT == 0 for n in (spec.input_size, *strides_of(x)))
    even = even and all(t.data_ptr() % _ALIGNED == 0 for t in read)
    if not (even or reads_odd(element)):
        return False
    if element == 2:
        return size <= _MOST
    in_tf32 = precision_of(x) == "tf32"
    few = size <= (_MOST_TF32 if in_tf32 else _MOST_EXACT)
    return few or multiplies_in_tf32() != in_tf32


def products_by_unit(call: Call) -> Tensor:
    """Return x through w_ih, without the biases: float32 ``[D, rows, 4H]``, by unit."""
    spec, x, count = call.spec, call.x, call.rows.count
    if not takes(call):
        w_ih = [by_unit(each.w_ih) for each in call.weights]
        return products([call.x_rows()] * len(w_ih), w_ih)
    precision = dot_precision(x)
    cut = tile(x.element_size(), precision)
    D, H = spec.directions, spec.hidden_size
    found = torch.empty(D, count, 4 * H, dtype=torch.float32, device=x.device)
    x_t, x_b = strides_of(x)
    x_unit = math.gcd(x_t, x_b, 16)
    launch(
        lstm_input_products_kernel,
        (-(-count // cut.rows), -(-4 * H // cut.gates), D),
        cut.plan,
        x=x,
        **weight_arguments(call.weights, "w_ih"),
        products=found,
        rows=count,
        B=call.rows.B if x.dim() == 3 else count,
        x_t=x_t // x_unit,
        x_b=x_b // x_unit,
        I=spec.input_size,
        H=H,
        D=D,
        ROWS=cut.rows,
        GATES=cut.gates,
        TERMS=cut.terms,
        STAGES=cut.plan.stages,
        X_UNIT=x_unit,
        PRECISION=precision,
    )
    return found
