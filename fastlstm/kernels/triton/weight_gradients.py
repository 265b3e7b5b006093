"""The gradients of all weights of a plain layer, from those of its gates: two launches.

With x, h before each row and a column of ones side by side, ``[rows, I + H + 1]``, they are one
product: the gradients of the gates, transposed, times that. Its result is small and its sums are
long, so the rows are shared out over programs, and a second kernel adds up what these found. It
does so in a fixed order: results repeat to the bit.

What the two have to do at I = 28, H = 64 and 3,584 rows, in 16 bits on 132 multiprocessors: 112
programs read up to 64 kB each, a microsecond with the time that loads take, and write 1.3 MB of
parts, which the second kernel reads again. With what launches cost it should be 4 to 5
microseconds. PyTorch's products, sums, copies and changes of order are a dozen launches, 35
microseconds on an H200, and 10 to 25 each of the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlstm.spec import LayerSpec, Weights

from .call import Call, weight_arguments
from .launch import dot_precision, launch
from .plan import Plan, padded
from .primitives import operand

__all__ = ["ELEMENTS", "PARTS", "launch_weight_gradients", "takes", "tiles"]

# What cuBLAS computes faster. From 2^33 multiplications of 16 bits on, or half as many of 32, its
# larger tiles make up for the 30 microseconds that its launches cost: at 600 Tflop/s against 300.
# And results of so many columns have enough tiles for a GPU, without parts.
_MOST = 2**34  # multiplications times bytes of a number
_MOST_INPUTS = 1024
_WIDEST = 128  # tile: its sums take 64 registers of a thread
ELEMENTS = 128  # of a program of the second kernel
PARTS = 32  # that it loads at a time, each thread 8 times four
_SUMS = Plan("weights", 16, PARTS, PARTS, False, 4, 1, "the sums of parts of products")


class Tiles(NamedTuple):
    """How the product of a layer is cut."""

    gates: int  # rows of a tile
    x: int  # columns of a tile of inputs
    h: int  # of a tile of states
    plan: Plan

    def grid(self, spec: LayerSpec) -> tuple[int, int]:
        """Return how many tiles the result of a direction has, down and across."""
        wide = -(-spec.input_size // self.x) + -(-spec.hidden_size // self.h)
        return -(-4 * spec.hidden_size // self.gates), wide


@lru_cache(maxsize=1024)
def tiles(I: int, H: int, element: int) -> Tiles:
    """Return the tiles of a layer whose numbers have 2 or 4 bytes."""
    high = min(4 * padded(H), 64 if H <= 64 else 128)
    rows = 128 // element
    reason = "the rows of the product are shared out over programs"
    plan = Plan("weights", high // 4, rows, rows, False, high // 16, 3, reason)
    return Tiles(high, min(padded(I), _WIDEST), min(padded(H), _WIDEST), plan)


@triton.jit
def add_rows(
    total,  # float32 [GATES, COLUMNS]
    sums,  # float32 [ROWS / 4, GATES]: a thread has four rows of a gate, and adds them
    d,  # pointer to the gradients of the gates of the first row
    values,  # pointer to what they are multiplied with
    count,  # how many rows there are; none if it is negative
    gate,  # [GATES]
    column,  # [COLUMNS]
    gates,  # how many there are, from one row of d to the next too
    columns,
    stride,  # elements from one row of values to the next
    SUMMED: tl.constexpr,  # whether d is added to sums
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return total + d^T values, and sums to which d is added."""
    dtype: tl.constexpr = d.dtype.element_ty
    row = tl.arange(0, ROWS)
    d_at = row[:, None] * gates + gate
    values_at = row[:, None] * stride + column
    d_real, real = (gate < gates)[None, :], (column < columns)[None, :]
    for first in tl.range(0, count, ROWS, num_stages=STAGES):
        there = (row < count - first)[:, None]
        left = tl.load(d + d_at, there & d_real, 0)
        right = tl.load(values + values_at, there & real, 0)
        if SUMMED:
            sums += tl.sum(tl.reshape(left.to(tl.float32), [4, ROWS // 4, gate.shape[0]]), 0)
        left, right = operand(left, dtype, PRECISION), operand(right, dtype, PRECISION)
        total = tl.dot(tl.trans(left), right, total, PRECISION)
        d += ROWS * gates
        values += ROWS * stride
    return total, sums


@triton.jit(do_not_specialize=["rows", "B", "starts"], do_not_specialize_on_alignment=["h0"])
def lstm_weight_parts_kernel(
    dgates,  # [D, rows, H, 4]
    x,  # [rows, I]
    y,  # [rows, D*H]
    h0,  # [D, B, H] or None
    parts,  # float32 [splits, D, H, 4, I] and [.., H, 4, H], with BIAS [.., H, 4], written
    rows,  # of all steps: T * B
    B,
    starts,  # how many rows of h0 are read: B, or none where it is null
    I: tl.constexpr,  # I, H and D come at run time where kernels are compiled ahead
    H: tl.constexpr,
    D: tl.constexpr,
    BIAS: tl.constexpr,
    GATES: tl.constexpr,  # of a tile: of how many gates of units
    X_TILE: tl.constexpr,  # columns of a tile of inputs
    H_TILE: tl.constexpr,
    ROWS: tl.constexpr,  # that are multiplied at a time
    STAGES: tl.constexpr,  # of the pipeline that loads
    PRECISION: tl.constexpr,  # of products: "tf32" or "ieee"
):
    """A tile of the products of some rows of a direction, and the sums of the gradients."""
    gate = tl.program_id(0) * GATES + tl.arange(0, GATES)
    tile = tl.program_id(1)
    split, direction = tl.program_id(2) // D, tl.program_id(2) % D
    each = tl.cdiv(tl.cdiv(rows, ROWS), tl.num_programs(2) // D) * ROWS
    first = split.to(tl.int64) * each
    last = tl.minimum(first + each, rows)

    size = 4 * H * (I + H)
    if BIAS:
        size += 4 * H
    d = dgates + direction.to(tl.int64) * rows * (4 * H)
    parts += tl.program_id(2).to(tl.int64) * size
    sums = tl.zeros([ROWS // 4, GATES], tl.float32)
    if tile < tl.cdiv(I, X_TILE):
        x_column = tile * X_TILE + tl.arange(0, X_TILE)
        dw_ih, sums = add_rows(
            tl.zeros([GATES, X_TILE], tl.float32), sums,
            d + first * (4 * H), x + first * I, (last - first).to(tl.int32),
            gate, x_column, 4 * H, I, I, BIAS, ROWS, STAGES, PRECISION,
        )  # fmt: skip
        x_real = (gate < 4 * H)[:, None] & (x_column < I)
        tl.store(parts + gate[:, None] * I + x_column, dw_ih, x_real)
        if BIAS:
            if tile == 0:
                tl.store(parts + 4 * H * (I + H) + gate, tl.sum(sums, 0), gate < 4 * H)
    else:
        column = (tile - tl.cdiv(I, X_TILE)) * H_TILE + tl.arange(0, H_TILE)
        # The row of y that lies a step before another one is B rows from it.
        begin = tl.maximum(first, B * (1 - direction))
        end = tl.minimum(last, rows - B * direction)
        before = begin - B * (1 - 2 * direction)
        dw_hh, sums = add_rows(
            tl.zeros([GATES, H_TILE], tl.float32), sums,
            d + begin * (4 * H), y + before * (D * H) + direction * H, (end - begin).to(tl.int32),
            gate, column, 4 * H, H, D * H, False, ROWS, STAGES, PRECISION,
        )  # fmt: skip
        if h0 is not None:
            start = (rows - B) * direction
            begin = tl.maximum(first, start)
            end = tl.minimum(last, start + starts)
            dw_hh, sums = add_rows(
                dw_hh, sums,
                d + begin * (4 * H), h0 + (direction * B + begin - start) * H,
                (end - begin).to(tl.int32),
                gate, column, 4 * H, H, H, False, ROWS, STAGES, PRECISION,
            )  # fmt: skip
        real = (gate < 4 * H)[:, None] & (column < H)
        tl.store(parts + 4 * H * I + gate[:, None] * H + column, dw_hh, real)


@triton.jit(do_not_specialize=["splits"])
def lstm_weight_sums_kernel(
    parts,  # float32 [splits, D, H, 4, I] and [.., H, 4, H], with b_ih [.., H, 4]
    w_ih,  # [4H, I], direction 0, written
    w_hh,  # [4H, H], written
    b_ih,  # [4H] or None, written
    b_hh,  # [4H], where the same numbers go, or None
    w_ih_reverse,  # the same of direction 1, or None
    w_hh_reverse,
    b_ih_reverse,
    b_hh_reverse,
    splits,
    I: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    N: tl.constexpr,  # elements of a program
    SPLITS: tl.constexpr,  # parts that are added at a time
):
    """Some elements of one gradient: the sum of their parts."""
    direction = tl.program_id(1)
    if D == 2:
        if direction == 1:
            w_ih, w_hh = w_ih_reverse, w_hh_reverse
            b_ih, b_hh = b_ih_reverse, b_hh_reverse
    # Which gradient it is, where its parts begin and how long its rows are.
    number, target, begin, columns = tl.program_id(0), w_ih, 0, I
    size = 4 * H * (I + H)
    if number >= tl.cdiv(4 * H * I, N):
        number, target, begin, columns = number - tl.cdiv(4 * H * I, N), w_hh, 4 * H * I, H
    if b_ih is not None:
        blocks = tl.cdiv(4 * H * I, N) + tl.cdiv(4 * H * H, N)
        if tl.program_id(0) >= blocks:
            number, target, begin, columns = tl.program_id(0) - blocks, b_ih, size, 1
        size += 4 * H
    element = number * N + tl.arange(0, N)
    there = element < 4 * H * columns
    split = tl.arange(0, SPLITS)
    at = parts + direction * size + begin + element
    total = tl.zeros([SPLITS, N], tl.float32)
    for first in range(0, splits, SPLITS):
        real = (first + split < splits)[:, None] & there
        total += tl.load(at + ((first + split) * (D * size))[:, None], real, 0)
    row, column = element // columns, element % columns
    to = (row % 4 * H + row // 4) * columns + column
    found = tl.sum(total, 0).to(target.dtype.element_ty)
    tl.store(target + to, found, there)
    if b_hh is not None:
        if tl.program_id(0) >= blocks:
            tl.store(b_hh + to, found, there)


def takes(call: Call) -> bool:
    """Return whether these kernels compute the gradients of a layer's weights.

    They know the row before another one where each sequence has all steps and none is reset.
    """
    spec = call.spec
    size = 4 * spec.hidden_size * (spec.input_size + spec.hidden_size) * spec.directions
    few = call.rows.count * size * call.x.element_size() <= _MOST
    return call.rows.dense and few and spec.input_size <= _MOST_INPUTS


def launch_weight_gradients(
    call: Call, y: Tensor, dgates: Tensor, gradients: Sequence[Weights]
) -> None:
    """Write the gradients of the weights of a layer.

    Args:
        call: the layer, which these kernels take.
        y: [rows, D*H], its results.
        dgates: [D, rows, 4H], the gradients of its gates, by unit.
        gradients: written.
    """
    spec, rows, x = call.spec, call.rows, call.x_rows().contiguous()
    I, H, D = spec.input_size, spec.hidden_size, spec.directions
    cut = tiles(I, H, x.element_size())
    size = 4 * H * (I + H + spec.bias)
    high, wide = cut.grid(spec)
    # As many parts as there is room for on the GPU at a time, each of whole turns of the loop.
    turns = -(-rows.count // cut.plan.chunk)
    room = max(1, call.device.processors // (high * wide * D))
    splits = -(-turns // -(-turns // room))
    parts = torch.empty(splits * D * size, dtype=torch.float32, device=x.device)
    sizes = {"I": I, "H": H, "D": D}
    launch(
        lstm_weight_parts_kernel,
        (high, wide, splits * D),
        cut.plan,
        dgates=dgates,
        x=x,
        y=y,
        h0=call.state.h,
        parts=parts,
        rows=rows.count,
        B=rows.B,
        starts=rows.B,
        **sizes,
        BIAS=spec.bias,
        GATES=cut.gates,
        X_TILE=cut.x,
        H_TILE=cut.h,
        ROWS=cut.plan.chunk,
        STAGES=cut.plan.stages,
        PRECISION=dot_precision(x),
    )
    blocks = sum(-(-4 * H * n // ELEMENTS) for n in (I, H) + (1,) * spec.bias)
    launch(
        lstm_weight_sums_kernel,
        (blocks, D),
        _SUMS,
        parts=parts,
        **weight_arguments(gradients, "w_ih", "w_hh", "b_ih", "b_hh"),
        splits=splits,
        **sizes,
        N=ELEMENTS,
        SPLITS=PARTS,
    )
