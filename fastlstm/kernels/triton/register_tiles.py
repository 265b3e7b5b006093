"""Tiles of matrix instructions whose weights rest in registers: how gates and cells lie in them.

There are U / 16 warps for U units, and the rows of a stacked tile ``[4U, 8]`` are those of one
gate after the other. The result of an mma.sync repeats every U rows, so the four values that a
thread holds of a column are the gates i, f, g, o of one unit. The functions here only give them
names: no data moves between threads, which ``assert_trivial`` proves.

A matrix instruction has 8 columns, of which a thread has two side by side. N = 8 sequences take
one each. N = 4 take two each, of which the second is left out: half of the activations a thread.

A thread has two rows of 16, eight apart. They are two units side by side (``unit_of``): what it
reads and writes of them is one piece of memory. Cells ``[U, N]`` lie by unit (``cell_layout``).

In memory the four gates of a cell lie side by side, ``[rows, H, 4]``: one vector a cell.
"""

from torch import Tensor

from .gluon import gl, gluon
from .primitives import tanh_approx

COLUMNS = gl.constexpr(8)  # of a matrix instruction


@gluon.constexpr_function
def fills(size, tile):
    """Return whether a size is known when a kernel is compiled, and is that of the tile."""
    return isinstance(size, int) and size == tile


@gluon.constexpr_function
def state_layout(U, pair):
    """Return how ``[U, 8]`` numbers, `pair` to 4 bytes, lie in shared memory: unit beside unit.

    Matrices are read 16 bytes of 8 columns at a time, cells written 32 bytes of each second
    column. Columns that fill all banks begin in the same one; so where 16 bytes lie in a column
    differs from each to the next. Of those that are shorter, the last four change places too.
    """
    whole = 4 * pair  # numbers in 16 bytes
    columns = 32 * pair // U  # in the 128 bytes that all banks have
    if columns <= 1:
        return gl.SwizzledSharedLayout(whole, 1, 8, [0, 1])
    bits = [1 << bit for bit in range(U.bit_length() - 1)]
    later = [[2 * whole, 2], [whole, 5]] if columns == 2 else [[0, 2], [whole, 5]]
    return gl.SharedLinearLayout([[unit, 0] for unit in bits] + [[0, 1], *later])


@gluon.constexpr_function
def cell_layout(U, N):
    """Return how the threads hold cells ``[U, N]``: two units of two sequences, or of one."""
    warps = [[1 << bit, 0] for bit in range(4, U.bit_length() - 1)]
    lanes = [[0, N // 4], [0, N // 2], [2, 0], [4, 0], [8, 0]]
    return gl.DistributedLinearLayout([[1, 0], [0, 1]][: N // 4], lanes, warps, [], [U, N])


@gluon.jit
def columns_of(cells, R: gl.constexpr, N: gl.constexpr):
    """Give each sequence of ``[R, N]`` its columns of ``[R, 8]``."""
    if N < COLUMNS:
        cells = gl.reshape(gl.join(cells, cells), [R, COLUMNS])
    return cells


@gluon.jit
def cells_of(columns, R: gl.constexpr, N: gl.constexpr):
    """Undo :func:`columns_of`."""
    if N < COLUMNS:
        columns, _ = gl.split(gl.reshape(columns, [R, N, 2]))
    return columns


@gluon.jit
def unit_of(row):
    """Return the unit of a row of a tile ``[U, N]``."""
    return row // 16 * 16 + row % 8 * 2 + row % 16 // 8


@gluon.jit
def row_of_gate(r, H, U: gl.constexpr):
    """Return where row r of a stacked tile is in ``[4H, ..]``, and whether it is a unit's."""
    unit = unit_of(r % U)
    return r // U * H + unit, unit < H


@gluon.constexpr_function
def is_ahead(H):
    """Return whether a kernel is compiled ahead (``ahead/``): H comes at run time then."""
    return not isinstance(H, int)


@gluon.jit
def given(pointer, H):
    """Return whether an argument is there: kernels that are compiled ahead get null for None."""
    there = True
    if is_ahead(H):
        there = pointer.to(gl.int64, bitcast=True) != 0
    return there


@gluon.jit
def by_unit_of(rows, U: gl.constexpr, N: gl.constexpr):
    """Name the rows of a tile ``[U, 8]`` by their units: ``[U, N]``."""
    cells: gl.constexpr = cell_layout(U, N)
    rows = cells_of(rows, U, N)
    units = gl.permute(gl.reshape(rows, [U // 16, 2, 8, N]), [0, 2, 1, 3])
    return gl.convert_layout(gl.reshape(units, [U, N]), cells, assert_trivial=True)


@gluon.jit
def by_gate(stacked, U: gl.constexpr, N: gl.constexpr):
    """Take ``[4U, 8]`` apart into i, f, g, o ``[U, N]``."""
    stacked = cells_of(stacked, 4 * U, N)
    parts = gl.permute(gl.reshape(stacked, [2, 2, U // 16, 2, 8, N]), [2, 4, 3, 5, 0, 1])
    i_g, f_o = gl.split(gl.reshape(parts, [U, N, 2, 2]))
    cells: gl.constexpr = cell_layout(U, N)
    return four(i_g, f_o, cells)


@gluon.jit
def apart(gates, U: gl.constexpr, N: gl.constexpr, cells: gl.constexpr):
    """Take ``[U, N, 4]`` apart into i, f, g, o ``[U, N]`` of a layout."""
    i_g, f_o = gl.split(gl.reshape(gates, [U, N, 2, 2]))
    return four(i_g, f_o, cells)


@gluon.jit
def four(i_g, f_o, cells: gl.constexpr):
    """Take two pairs of gates ``[U, N, 2]`` apart."""
    i, g = gl.split(i_g)
    f, o = gl.split(f_o)
    i = gl.convert_layout(i, cells, assert_trivial=True)
    f = gl.convert_layout(f, cells, assert_trivial=True)
    g = gl.convert_layout(g, cells, assert_trivial=True)
    return i, f, g, gl.convert_layout(o, cells, assert_trivial=True)


@gluon.jit
def beside(i, f, g, o, U: gl.constexpr, N: gl.constexpr):
    """Join i, f, g, o ``[U, N]`` to ``[U, N, 4]``."""
    return gl.reshape(gl.join(gl.join(i, g), gl.join(f, o)), [U, N, 4])


@gluon.jit
def stack(cells, U: gl.constexpr, N: gl.constexpr, tile: gl.constexpr):
    """Stack the gates of ``[U, N, 4]`` to ``[4U, 8]``."""
    parts = gl.permute(gl.reshape(cells, [U // 16, 8, 2, N, 4]), [4, 0, 2, 1, 3])
    columns = columns_of(gl.reshape(parts, [4 * U, N]), 4 * U, N)
    return gl.convert_layout(columns, tile, assert_trivial=True)


@gluon.jit
def rounded(x):
    """Round float32 to what TF32 instructions read; 16-bit numbers stay as they are.

    The hardware cuts the other bits off: rounding them halves the error.
    """
    if x.dtype == gl.float32:
        x = gl.inline_asm_elementwise(
            "cvt.rna.tf32.f32 $0, $1;", "=r,f", [x], dtype=gl.int32, is_pure=True, pack=1
        ).to(gl.float32, bitcast=True)
    return x


@gluon.jit
def exp2(x):
    """Return 2^x in one instruction, of relative error 2^-22; what is denormal is 0."""
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def reciprocal(x):
    """Return 1 / x in one instruction, of relative error 2^-23; what is denormal is 0."""
    return gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


# No result here is exact float32: TF32 and float16 keep 11 bits, so an error of 2^-16 is little.
# A multiprocessor has 16 special functions a cycle, and a step waits for them most: 5 a cell if
# all are approximate, 10 if none is, and 7 in float16.


@gluon.jit
def logistic(x, FAST: gl.constexpr):
    """Return the logistic function, with FAST of error 2^-12, else of relative error 2^-19."""
    if FAST:
        result = 0.5 * tanh_approx(0.5 * x) + 0.5
    else:
        result = reciprocal(1.0 + exp2(x * -1.4426950408889634))
    return result


@gluon.jit
def tanh(x, FAST: gl.constexpr):
    """Return tanh, with FAST of relative error 2^-11, else 2^-16."""
    if FAST:
        result = tanh_approx(x)
    else:
        # Near 0, where the difference cancels, a polynomial that is never too large. From the
        # difference 2^-21 are taken, more than its error: so the larger is right, and no predicate
        # has to choose. There are 7, and where they run short, products wait for each other.
        size = gl.abs(x)
        far = 0.9999995231628418 - 2.0 * reciprocal(1.0 + exp2(size * 2.8853900817779268))
        near = size * (1.0 - x * x * 0.33333333)
        bits = gl.maximum(near, far).to(gl.int32, bitcast=True)
        result = (bits | x.to(gl.int32, bitcast=True) & -0x80000000).to(gl.float32, bitcast=True)
    return result


@gluon.jit
def activated(i, f, g, o, dtype: gl.constexpr, FAST: gl.constexpr):
    """Return the gates after activation, for results of a type.

    To round a gate to float16 costs what an approximate logistic function is off, 2^-12; tanh is
    off twice as much, and so exact there without FAST.
    """
    half: gl.constexpr = FAST or dtype.primitive_bitwidth == 16
    return logistic(i, half), logistic(f, half), tanh(g, FAST), logistic(o, half)


@gluon.jit
def only(keep, x):
    """Return x where it is to be kept, else 0."""
    return gl.where(keep, x, gl.zeros_like(x))


@gluon.jit
def weight_tile(
    w, H: gl.constexpr, K: gl.constexpr, U: gl.constexpr, K_TILE: gl.constexpr, left: gl.constexpr
):
    """Load ``[4H, K]`` as the operand ``[4U, K_TILE]``, 0 where there are no weights.

    Straight into the registers of the operand: all loads are on their way at once, and shared
    memory has no part in it.
    """
    r = gl.arange(0, 4 * U, gl.SliceLayout(1, left))
    k = gl.arange(0, K_TILE, gl.SliceLayout(0, left))
    row, real = row_of_gate(r, H, U)
    at = w + row[:, None] * K + k[None, :]
    if fills(H, U) and fills(K, K_TILE):
        tile = gl.load(at)
    else:
        tile = gl.load(at, real[:, None] & (k < K)[None, :], 0)
    return rounded(tile)


@gluon.jit
def turned(w, H: gl.constexpr, U: gl.constexpr, left: gl.constexpr):
    """Load the ``[H, H]`` weights of a gate transposed, as the operand ``[U, U]``."""
    tall: gl.constexpr = gl.BlockedLayout([4 * left.k_width, 1], [4, 8], [1, U // 16], [0, 1])
    unit = gl.arange(0, U, gl.SliceLayout(1, tall))
    k = gl.arange(0, U, gl.SliceLayout(0, tall))
    at = w + k[None, :] * H + unit[:, None]
    if fills(H, U):
        tile = gl.load(at)
    else:
        tile = gl.load(at, (unit < H)[:, None] & (k < H)[None, :], 0)
    rows = gl.permute(gl.reshape(tile, [U // 16, 8, 2, U]), [0, 2, 1, 3])
    return rounded(gl.convert_layout(gl.reshape(rows, [U, U]), left))


@gluon.jit
def load_bias(b_ih, b_hh, H: gl.constexpr, U: gl.constexpr, tile: gl.constexpr):
    """Load b_ih + b_hh in float32 as ``[4U]``, the rows of a stacked tile."""
    r = gl.arange(0, 4 * U, gl.SliceLayout(1, tile))
    row, real = row_of_gate(r, H, U)
    has = real & given(b_ih, H)
    return gl.load(b_ih + row, has, 0).to(gl.float32) + gl.load(b_hh + row, has, 0).to(gl.float32)


@gluon.jit
def load_lengths(lengths, n, T, B, H):
    """Load the lengths of sequences ``[N]``: T where none are given, 0 past the last."""
    if is_ahead(H):
        few = given(lengths, H)
        found = gl.load(lengths + n, (n < B) & few, gl.where(few, 0, T))
    else:
        found = gl.load(lengths + n, n < B, 0)
    return found


@gluon.jit
def longest(lengths, first, T, B, H, N: gl.constexpr):
    """Return how many steps the longest of N sequences has, beginning with the first."""
    found = 0
    for k in gl.static_range(N):
        found = gl.maximum(found, load_lengths(lengths, first + k, T, B, H).to(gl.int32))
    return found


@gluon.jit
def first_row(step, offsets, T):
    """Return the packed row of sequence 0 at a step, of the nearest one if there is no such step.

    32 bits: products of 64 take three times the instructions.
    """
    return gl.load(offsets + gl.minimum(gl.maximum(step, 0), T - 1)).to(gl.int32)


@gluon.constexpr_function
def is_crowded(U, pair, EXACT):
    """Return whether the weights take half of the registers of a thread.

    With lengths or resets places are then found anew at each step. To move them on takes a
    pointer and a stride of each, which is faster as long as there are registers for these.
    """
    return not EXACT and 64 * pair <= U


@gluon.jit
def row_of(step, B):
    """Return the row of sequence 0 at a step of rows ``[T, B]``, int64."""
    return step.to(gl.int64) * B


@gluon.jit
def elements(row, stride):
    """Return how many elements lie before a row, int64."""
    return row.to(gl.int64) * stride


@gluon.jit
def at_step(t, length):
    """Return which sequences ``[1, N]`` of these lengths ``[N]`` have step t."""
    # One comparison: before step 0 there are more than any length has.
    return (t.to(gl.uint32, bitcast=True) < length.to(gl.uint32, bitcast=True))[None, :]


@gluon.jit
def flags(reset, s, steps, t, n, length, lengths, B, H):
    """Load the reset flags ``[N]`` of step t, which is the s-th; 0 where there is no such step."""
    there = (n < B) & (s < steps) & (t >= 0) & given(reset, H)
    if lengths is not None:
        there = there & (t < length)
    return gl.load(reset + t.to(gl.int64) * B + n, there, 0)


def by_unit(w: Tensor) -> Tensor:
    """Return the rows of ``[4H, n]`` by unit instead of by gate: ``[H, 4]`` of them, a copy."""
    return w.view(4, -1, *w.shape[1:]).transpose(0, 1).reshape(w.shape)


def by_gate_again(w: Tensor) -> Tensor:
    """Undo :func:`by_unit`, without a copy: ``[4, H, n]``."""
    return w.view(-1, 4, *w.shape[1:]).transpose(0, 1)
