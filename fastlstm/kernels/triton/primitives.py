"""What all kernels are made of: how gates lie in a tile, activations, products.

Tiles are transposed: ``[units, N]`` for N sequences, and the four gates of U units stacked in one
tile ``[4U, N]``, the result of one matrix product. Its row order (:func:`stacked_rows`) puts the
number of the gate into two bits of the row: bit 3 and the highest one. In the results of the
matrix instructions one thread holds both values of these bits, so taking the tile apart
(:func:`split_gates`) moves no data.
"""

import triton
import triton.language as tl


@triton.jit
def stacked_rows(first, UNITS: tl.constexpr, H: tl.constexpr):
    """Say what the ``[4U]`` rows of a stacked tile stand for, whose units start at `first`.

    Returns the rows of the ``[4H, n]`` weights (the gates i, f, g, o one after the other), whether
    there is such a unit, and ``[4U, 1]`` whether it is gate g.
    """
    r = tl.arange(0, 4 * UNITS)
    gate = r // (2 * UNITS) * 2 + r % 16 // 8
    unit = first + r % (2 * UNITS) // 16 * 8 + r % 8
    row = gate * H + unit
    inside = unit < H
    if H % 8 == 0:  # what the compiler does not see through the divisions
        row = tl.max_contiguous(tl.multiple_of(row, 8), 8)
        inside = tl.max_constancy(inside, 8)
    return row, inside, (gate == 2)[:, None]


@triton.jit
def split_gates(stacked, UNITS: tl.constexpr, N: tl.constexpr):
    """Take ``[4U, N]`` apart into i, f, g, o ``[U, N]``."""
    apart = tl.reshape(stacked, [2, UNITS // 8, 2, 8, N])
    apart = tl.reshape(tl.permute(apart, [1, 3, 4, 2, 0]), [UNITS, N, 2, 2])
    i_f, g_o = tl.split(apart)
    i, f = tl.split(i_f)
    g, o = tl.split(g_o)
    return i, f, g, o


@triton.jit
def stack_gates(i, f, g, o, UNITS: tl.constexpr, N: tl.constexpr):
    """Join i, f, g, o ``[U, N]`` to ``[4U, N]``, which :func:`split_gates` takes apart."""
    apart = tl.join(tl.join(i, f), tl.join(g, o))
    apart = tl.reshape(apart, [UNITS // 8, 8, N, 2, 2])
    return tl.reshape(tl.permute(apart, [4, 0, 3, 1, 2]), [4 * UNITS, N])


@triton.jit
def tanh_approx(x):
    """Return tanh in one instruction, of relative error 2^-11.

    That is enough where results are rounded to bfloat16.
    """
    return tl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def sigmoid(x):
    """Return the logistic function, exact to float32."""
    return 1.0 / (1.0 + tl.exp(-x))  # exp overflows to inf, whose reciprocal is the limit


@triton.jit
def tanh_near_zero(x):
    """Return tanh as x + x^3 P(x^2), whose maximum error over |x| <= 0.625 is least: 1e-8.

    There 2 sigmoid(2x) - 1 cancels.
    """
    z = x * x
    p = -0.006104946 * z + 0.02100364
    p = p * z - 0.0538525
    p = p * z + 0.13332783
    p = p * z - 0.33333328
    return x + x * z * p


@triton.jit
def tanh(x, FAST: tl.constexpr):
    """Return tanh, approximate with FAST."""
    if FAST:
        result = tanh_approx(x)
    else:
        e = tl.exp(-2.0 * tl.abs(x))
        far = 1.0 - 2.0 * (e / (1.0 + e))
        result = tl.where(x * x < 0.390625, tanh_near_zero(x), tl.where(x < 0, -far, far))
    return result


@triton.jit
def logistic(x, FAST: tl.constexpr):
    """Return the logistic function, approximate with FAST."""
    if FAST:
        result = 0.5 * tanh_approx(0.5 * x) + 0.5
    else:
        result = sigmoid(x)
    return result


@triton.jit
def activate(stacked, is_cell, FAST: tl.constexpr):
    """Apply tanh to the rows of gate g (``is_cell [4U, 1]``), the logistic function to others."""
    if FAST:
        half = tl.where(is_cell, 1.0, 0.5)
        result = tanh_approx(stacked * half) * half + (1.0 - half)
    else:
        # With r = e / (1 + e), e = exp(-|scale x|): sigmoid(x) is r or 1 - r, tanh(x) 1 - 2 r up
        # to its sign. Nothing cancels.
        scale = tl.where(is_cell, 2.0, 1.0)
        e = tl.exp(-tl.abs(stacked * scale))
        rest = e / (1.0 + e)
        far = 1.0 - scale * rest
        result = tl.where(stacked < 0, tl.where(is_cell, -far, rest), far)
        small = is_cell & (stacked * stacked < 0.390625)
        result = tl.where(small, tanh_near_zero(stacked), result)
    return result


@triton.jit
def operand(x, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """Return x as a matrix instruction takes it.

    TF32 keeps 10 bits of the fraction and the hardware cuts the others off: they are rounded
    here, which halves the error.
    """
    x = x.to(dtype)
    if PRECISION == "tf32" and dtype == tl.float32:
        x = tl.inline_asm_elementwise(
            "cvt.rna.tf32.f32 $0, $1;", "=r,f", [x], dtype=tl.int32, is_pure=True, pack=1
        ).to(tl.float32, bitcast=True)
    return x


@triton.jit
def first_row(t, offsets, B):
    """Return the row of sequence 0 at step t, int64.

    Rows are ``[T, B, ...]``, or packed with ``offsets [T]``, the first row of each step.
    """
    if offsets is None:
        row = t.to(tl.int64) * B
    else:
        row = tl.load(offsets + t)
    return row


@triton.jit
def load_bias(b_ih, b_hh, row, inside):
    """Load b_ih + b_hh at rows ``[M]`` in float32; zeros without biases or outside."""
    bias = tl.zeros(row.shape, tl.float32)
    if b_ih is not None:
        bias = tl.load(b_ih + row, inside, 0).to(tl.float32)
        bias += tl.load(b_hh + row, inside, 0).to(tl.float32)
    return bias


@triton.jit
def product(
    w_tile,  # pointers [M, K] to the first columns of w; W_STRIDE from one to the next
    w_real,  # [M]: rows that there are
    h_tile,  # pointers [K, N] to the first K rows of the other factor
    h_real,  # [N]: columns that there are
    W_STRIDE: tl.constexpr,
    SIZE: tl.constexpr,
    K: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """w h ``[M, N]`` over SIZE terms, in chunks of K.

    The sum starts from zero, and what it is added to comes last: exact float32 products are one
    chain of additions, and each of them would be rounded at the size of where the chain begins.
    """
    k = tl.arange(0, K)
    dtype: tl.constexpr = h_tile.dtype.element_ty
    total = tl.zeros([w_tile.shape[0], h_tile.shape[1]], tl.float32)
    for start in tl.range(0, SIZE, K, num_stages=STAGES):
        k_real = start + k < SIZE
        chunk = tl.load(w_tile + start * W_STRIDE, w_real[:, None] & k_real, 0)
        h = tl.load(h_tile + start, k_real[:, None] & h_real, 0, cache_modifier=".cg")
        total = tl.dot(
            operand(chunk, dtype, PRECISION), operand(h, dtype, PRECISION), total, PRECISION
        )
    return total
