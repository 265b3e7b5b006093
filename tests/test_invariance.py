"""The same bits for every thread count, batch, chunking, memory layout and repetition.

Only the kernels promise bits: the matrix products of the reference are those of the BLAS, which
chooses its order of summation by the size of the batch.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import Case, Results, draw, evaluate, fast
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastlstm
from fastlstm import extension
from fastlstm.spec import LayerSpec

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

pytestmark = pytest.mark.parametrize("backend", ["cpu"], indirect=True)

CASES = [
    Case(T=5, B=13, I=10, H=17, directions=2, layers=2),
    Case(T=28, B=64, I=28, H=64),
    Case(T=5, B=7, I=33, H=100, proj=33),
    Case(T=6, B=5, I=10, H=33, lengths=(2, 6, 1, 6, 3), packed=True, directions=2),
    Case(T=6, B=5, I=10, H=33, lengths=(2, 0, 1, 6, 3), directions=2, layers=2),
    Case(T=9, B=7, I=10, H=16, reset=True),
    Case(T=28, B=1, I=64, H=256),
    Case(T=4, B=2, I=28, H=512),
    Case(T=5, B=13, I=10, H=17, layers=2, peephole=True, noise=True, zoneout=(0.2, 0.3)),
    Case(T=5, B=13, I=10, H=64, layer_norm=True, recompute=True),
    Case(T=5, B=13, I=10, H=70, kind="RNN_TANH", directions=2),
]
CELLS = [
    {},
    {"layer_norm": True, "peephole": True, "zoneout": (0.2, 0.3)},
    {"recompute": True},
    {"kind": "RNN_RELU"},
]


def assert_same_bits(got: Results, want: Results) -> None:
    for name in want:
        assert torch.equal(got[name], want[name]), name


@pytest.fixture(params=["training", "inference"])
def mode(request: pytest.FixtureRequest) -> Iterator[str]:
    """The test's forward calls record a graph, or run under inference_mode."""
    with torch.inference_mode(request.param == "inference"):
        yield request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_threads_and_repetition(backend: str, mode: str, case: Case, dtype: torch.dtype) -> None:
    """Outputs and, in training, every gradient."""
    numbers = draw(case, dtype)
    torch.set_num_threads(1)
    want = evaluate(case, dtype, numbers, fast)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert_same_bits(evaluate(case, dtype, numbers, fast), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS, ids=str)
@pytest.mark.parametrize("sizes", [(10, 17, 0), (28, 64, 0), (33, 100, 30), (64, 256, 0)], ids=str)
def test_row_does_not_see_its_batch(
    backend: str,
    mode: str,
    sizes: tuple[int, int, int],
    cell: dict[str, Any],
    dtype: torch.dtype,
) -> None:
    """A row's outputs, dx, dh0 and dc0, alone and inside batches of every remainder."""
    I, H, proj = sizes
    proj = 0 if "kind" in cell else proj
    full = Case(T=4, B=64, I=I, H=H, proj=proj, directions=2, **cell)
    full = replace(full, wrt=("x", *full.states))
    numbers = draw(full, dtype)
    want = evaluate(full, dtype, numbers, fast)
    for start, stop in ((5, 6), (5, 7), (3, 6), (0, 6), (1, 8), (5, 18), (5, 64)):
        part = replace(full, B=stop - start)
        rows = {k: v if k.startswith("w.") else v[:, start:stop] for k, v in numbers.items()}
        got = evaluate(part, dtype, rows, fast)
        assert_same_bits(got, {name: want[name][:, start:stop] for name in got})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("B", [1, 2, 7])
@pytest.mark.parametrize(
    "sizes", [(10, 17, 0), (64, 64, 0), (33, 100, 30), (28, 256, 0), (300, 120, 0)], ids=str
)
def test_streaming_equals_the_whole(
    backend: str, mode: str, sizes: tuple[int, int, int], B: int, dtype: torch.dtype
) -> None:
    """Step by step, and in chunks, a stream is the sequence (16-bit states round in between).

    Except for wider layers on the CPU, where calls of up to four steps have kernels of their own:
    those are equal among each other, and so are all longer ones.
    """
    I, H, proj = sizes
    lstm = fastlstm.LSTM(I, H, 2, proj_size=proj, dtype=dtype)
    x = torch.randn(10, B, I, dtype=dtype)

    def stream(chunk: int) -> tuple[torch.Tensor, ...]:
        states, pieces = None, []
        for piece in x.split(chunk):
            y, states = lstm(piece, states)
            pieces.append(y)
        return torch.cat(pieces), *states

    whole, steps = stream(10), stream(1)
    for chunk, expected in ((2, steps), (4, steps), (5, whole)):
        for got, want in zip(stream(chunk), expected, strict=True):
            assert torch.equal(got, want)
    if backend == "cpu" and any(_short_calls_differ(spec, dtype) for spec in lstm.specs()):
        return
    for got, want in zip(steps, whole, strict=True):
        assert torch.equal(got, want)


def _short_calls_differ(spec: LayerSpec, dtype: torch.dtype) -> bool:
    """As csrc/cpu/plan.h decides: by the vectors that a row of both matrices takes."""
    isa = extension.isa()
    vector = 64 if isa.startswith("avx512") else 32 if isa == "avx2" else 16
    lanes = vector // (8 if dtype is torch.float64 else 4)
    return (spec.input_size + spec.state_size) // lanes >= 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(20, 33, 0), (70, 130, 40), (256, 256, 0)], ids=str)
def test_few_rows_have_the_gradients_of_many(
    backend: str, sizes: tuple[int, int, int], dtype: torch.dtype
) -> None:
    """The CPU's backward pass packs weights for many rows only; a row's gradients do not tell."""
    I, H, proj = sizes
    lstm = fastlstm.LSTM(I, H, proj_size=proj, dtype=dtype)
    x = torch.randn(1, 65, I, dtype=dtype)
    grad = torch.randn(1, 65, proj or H, dtype=dtype)

    def gradients(rows: int) -> tuple[torch.Tensor, ...]:
        inputs = x[:, :rows].clone().requires_grad_()
        states = [torch.ones(1, rows, n, dtype=dtype, requires_grad=True) for n in (proj or H, H)]
        y, _ = lstm(inputs, tuple(states))
        return torch.autograd.grad(y, (inputs, *states), grad[:, :rows])

    for few, many in zip(gradients(64), gradients(65), strict=True):
        assert torch.equal(few, many[:, :64])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("directions", [1, 2])
def test_packed_rows_equal_dense_rows(
    backend: str, mode: str, directions: int, dtype: torch.dtype
) -> None:
    """A sequence inside a PackedSequence, and inside a padded batch, is the sequence alone.

    Unless alone it is a short call with kernels of its own.
    """
    lengths = torch.tensor([2, 6, 1, 6, 3, 5, 5])
    lstm = fastlstm.LSTM(10, 17, 2, bidirectional=directions == 2, dtype=dtype)
    x = torch.randn(6, 7, 10, dtype=dtype)
    rows, packed_states = lstm(pack_padded_sequence(x, lengths, enforce_sorted=False))
    unpacked, _ = pad_packed_sequence(rows)
    padded, padded_states = lstm(x, lengths=lengths)
    short_calls_differ = any(_short_calls_differ(spec, dtype) for spec in lstm.specs())
    for b, length in enumerate(lengths.tolist()):
        if length <= 4 and short_calls_differ:
            continue
        alone, states = lstm(x[:length, b : b + 1])
        assert torch.equal(unpacked[:length, b : b + 1], alone)
        assert torch.equal(padded[:length, b : b + 1], alone)
        for ragged in (packed_states, padded_states):
            for got, want in zip(ragged, states, strict=True):
                assert torch.equal(got[:, b : b + 1], want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["transposed", "reversed", "sliced"])
def test_memory_layout_does_not_matter(
    backend: str, mode: str, layout: str, dtype: torch.dtype
) -> None:
    plain = Case(T=5, B=7, I=10, H=33, directions=2)
    strided = Case(
        T=5, B=7, I=10, H=33, directions=2, x_layout=layout, hx_layout=layout, grad_layout=layout
    )
    numbers = draw(plain, dtype)
    assert_same_bits(
        evaluate(strided, dtype, numbers, fast), evaluate(plain, dtype, numbers, fast)
    )


def test_training_infers_the_same(backend: str) -> None:
    """Recording a graph changes no bit of the outputs."""
    for dtype in DTYPES:
        for case in CASES:
            numbers = draw(case, dtype)
            with torch.no_grad():
                want = evaluate(case, dtype, numbers, fast)
            assert_same_bits({k: evaluate(case, dtype, numbers, fast)[k] for k in want}, want)
