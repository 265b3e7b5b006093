"""Tiles of exact float32, which has no matrix instructions: weights in registers, and FMA.

A sum over K terms is shared by Q threads, neighbours in a warp: each has ``KC = K / Q`` of them,
for as many results as there are threads, whose partial sums they exchange then (``scattered``). A
thread ends with the sums of one cell ``[U, N]``. So a program has U N threads, and each of them
``4 U / N`` weights.

Forward, Q is N and a thread has the rows of the four gates of a unit. Backward, Q is 4 N and it
has four rows, of as many units. Both read as much of shared memory, 16 bytes at a time.

A chain of KC additions and then a tree err less than one chain of all K.
"""

from .gluon import gl, gluon
from .primitives import tanh_near_zero
from .register_tiles import exp2, fills, reciprocal


@gluon.constexpr_function
def bits_of(size, dim, rank):
    """Return the bases of an index of a dimension."""
    return [
        [0] * dim + [1 << bit] + [0] * (rank - dim - 1) for bit in range(size.bit_length() - 1)
    ]


@gluon.constexpr_function
def exact_cells(U, N):
    """Return how the threads hold cells ``[U, N]``: one each, the sequences of a unit together."""
    bits = bits_of(N, 1, 2) + bits_of(U, 0, 2)
    return gl.DistributedLinearLayout([], bits[:5], bits[5:], [], [U, N])


@gluon.constexpr_function
def exact_state(K, N):
    """Return how ``[K, N]`` numbers lie in shared memory: those of a sequence side by side.

    Neighbours read 16 bytes each of one sequence, but write one or four numbers of each of the
    sequences: these begin in different banks of the 32.
    """
    bases, sequences = bits_of(K, 0, 2), N.bit_length() - 1
    for bit in range(sequences):
        place = K.bit_length() - 1 + bit
        bases.append([0 if place < 5 else 1 << 4 - place % sequences, 1 << bit])
    return gl.SharedLinearLayout(bases)


@gluon.constexpr_function
def weights_layout(Q, KC, V, R):
    """Return how the threads hold weights ``[Q, KC, V, R]`` of V R rows; V are in one thread."""
    registers = bits_of(V, 2, 4) + bits_of(KC, 1, 4) + bits_of(4 // V, 3, 4)
    threads = bits_of(Q, 0, 4) + bits_of(R, 3, 4)[3 - V.bit_length() :]
    return gl.DistributedLinearLayout(registers, threads[:5], threads[5:], [], [Q, KC, V, R])


@gluon.constexpr_function
def sums_layout(Q, V, N, R):
    """Return how the threads hold partial sums ``[Q, V, N, R]``."""
    registers = bits_of(4 // V, 3, 4) + bits_of(N, 2, 4) + bits_of(V, 1, 4)
    threads = bits_of(Q, 0, 4) + bits_of(R, 3, 4)[3 - V.bit_length() :]
    return gl.DistributedLinearLayout(registers, threads[:5], threads[5:], [], [Q, V, N, R])


@gluon.constexpr_function
def terms_layout(Q, KC, N, threads):
    """Return how the threads hold ``[Q, KC, N]`` of what the weights are multiplied with."""
    lanes, registers = bits_of(Q, 0, 3), bits_of(KC, 1, 3) + bits_of(N, 2, 3)
    all_of = lanes + [[0, 0, 0]] * (threads.bit_length() - 1 - len(lanes))
    return gl.DistributedLinearLayout(registers, all_of[:5], all_of[5:], [], [Q, KC, N])


@gluon.constexpr_function
def sliced(layout, dim):
    """Return the layout of an index of a dimension of four."""
    for other in (3, 2, 1, 0):
        if other != dim:
            layout = gl.SliceLayout(other, layout)
    return layout


@gluon.jit
def along(SIZE: gl.constexpr, DIM: gl.constexpr, layout: gl.constexpr):
    """Return the index of a dimension of four."""
    index = gl.arange(0, SIZE, sliced(layout, DIM))
    for dim in gl.static_range(4):
        if dim != DIM:
            index = gl.expand_dims(index, dim)
    return index


@gluon.jit
def term(Q: gl.constexpr, KC: gl.constexpr, layout: gl.constexpr):
    """Return which of the K terms ``[Q, KC, 1, 1]`` are: threads have four by turns."""
    kc = along(KC, 1, layout)
    return (kc // 4 * Q + along(Q, 0, layout)) * 4 + kc % 4


@gluon.jit
def forward_weights(w, H, U: gl.constexpr, N: gl.constexpr):
    """Load ``[4H, H]`` as ``[N, U / N, 1, 4U]``: the rows by unit."""
    layout: gl.constexpr = weights_layout(N, U // N, 1, 4 * U)
    k, r = term(N, U // N, layout), along(4 * U, 3, layout)
    at = w + (r % 4 * H + r // 4) * H + k
    if fills(H, U):
        tile = gl.load(at)
    else:
        tile = gl.load(at, (k < H) & (r // 4 < H), 0)
    return tile


@gluon.jit
def backward_weights(w, H, U: gl.constexpr, N: gl.constexpr):
    """Load ``[4H, H]``, transposed, as ``[4N, U / N, 4, U / 4]``: the terms by unit."""
    layout: gl.constexpr = weights_layout(4 * N, U // N, 4, U // 4)
    k = term(4 * N, U // N, layout)
    unit = along(U // 4, 3, layout) * 4 + along(4, 2, layout)
    at = w + (k % 4 * H + k // 4) * H + unit
    if fills(H, U):
        tile = gl.load(at)
    else:
        tile = gl.load(at, (k // 4 < H) & (unit < H), 0)
    return tile


@gluon.jit
def joined(some, more):
    """Return two tuples as one."""
    return some + more


@gluon.jit
def taken_apart(x, K: gl.constexpr):
    """Take ``[Q, R, K]`` apart into K tensors ``[Q, R, 1]``; a thread has all K."""
    parts = (x,)
    for number in gl.static_range(K - 1):  # halves of each go behind all others
        each = parts[number]
        each = gl.reshape(each, [each.shape[0], each.shape[1], 2, each.shape[2] // 2])
        parts = joined(parts, gl.split(gl.permute(each, [0, 1, 3, 2])))
    return parts[K - 1 :]


@gluon.jit
def exact_product(w, state, N: gl.constexpr):
    """Return the rows of w ``[Q, KC, V, R]`` times a buffer ``[Q KC, N]``: ``[V N, R]``."""
    Q: gl.constexpr = w.shape[0]
    KC: gl.constexpr = w.shape[1]
    V: gl.constexpr = w.shape[2]
    R: gl.constexpr = w.shape[3]
    sums: gl.constexpr = sums_layout(Q, V, N, R)
    terms: gl.constexpr = terms_layout(Q, KC, N, Q * R // (4 // V))
    h = state.reshape((KC // 4, Q, 4, N)).permute((1, 0, 2, 3)).reshape((Q, KC, N)).load(terms)
    h = taken_apart(gl.permute(h, [0, 2, 1]), KC)
    w = taken_apart(gl.reshape(gl.permute(w, [0, 2, 3, 1]), [Q, V * R, KC]), KC)
    total = gl.zeros([Q, V, N, R], gl.float32, sums)
    for k in gl.static_range(KC):
        w_k = gl.convert_layout(gl.reshape(w[k], [Q, V, 1, R]), sums, assert_trivial=True)
        h_k = gl.convert_layout(gl.reshape(h[k], [Q, 1, N, 1]), sums, assert_trivial=True)
        total = gl.fma(w_k, h_k, total)
    return scattered(gl.reshape(total, [Q, Q, R]), Q, R)


@gluon.constexpr_function
def shuffle(distance):
    """Return the instruction that reads a number of the thread so many lanes away, by xor."""
    return f"shfl.sync.bfly.b32 $0, $1, {distance}, 0x1f, 0xffffffff;"


@gluon.jit
def shuffled(x, DISTANCE: gl.constexpr):
    """Return x of the thread so many lanes away."""
    return gl.inline_asm_elementwise(
        shuffle(DISTANCE), "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def scattered(x, Q: gl.constexpr, R: gl.constexpr):
    """Sum ``[Q, Q, R]`` over its first dimension, whose index is the low bits of a lane.

    Returns ``[Q, R]``, with the second dimension where the first was. At each turn two threads
    share what they have by a bit of it: each hands over one half, and adds to the other.
    """
    for bit in gl.static_range(Q.bit_length() - 1):
        pairs = gl.permute(gl.reshape(x, [Q, Q >> (bit + 1), 2, R]), [0, 1, 3, 2])
        even, odd = gl.split(pairs)
        q = gl.arange(0, Q, gl.SliceLayout(1, gl.SliceLayout(2, even.type.layout)))
        is_odd = ((q >> bit) % 2 == 1)[:, None, None]
        x = gl.where(is_odd, odd, even) + shuffled(gl.where(is_odd, even, odd), 1 << bit)
    return gl.reshape(x, [Q, R])


@gluon.jit
def small_logistic(x):
    """Return the logistic function of -|x|, of relative error 2^-21."""
    e = exp2(gl.abs(x) * -1.4426950408889634)
    return e * reciprocal(1.0 + e)


@gluon.jit
def exact_logistic(x):
    """Return the logistic function: the farther it is from 0, the less of the error is left."""
    small = small_logistic(x)
    return gl.where(x < 0, small, 1.0 - small)


@gluon.jit
def exact_tanh(x):
    """Return tanh, likewise; near 0, where the difference cancels, of a polynomial."""
    far = 1.0 - 2.0 * small_logistic(2.0 * x)
    return gl.where(x * x < 0.390625, tanh_near_zero(x), gl.where(x < 0, -far, far))
