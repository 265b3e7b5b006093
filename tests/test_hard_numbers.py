"""Numbers that make sums inaccurate or a core slow: what users feed a layer without noticing.

Gates that are closed, inputs that nobody normalised, states that fade away, a million rows.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import Case, Results, draw, evaluate, fast
from oracle import check
from torch import Tensor, nn

import fastlstm

ON_CPU = pytest.mark.parametrize("backend", ["cpu"], indirect=True)

TINY = torch.finfo(torch.float32).smallest_normal

# States and gradients that fade away, and gates that are nearly closed.
FADING = [
    Case(T=300, B=3, I=5, H=33, weight_scale=1e-2, bias=False, through=("h_n",)),
    Case(T=5, B=7, I=10, H=33, x_scale=1e4),
    Case(T=5, B=7, I=10, H=33, x_scale=1e-36, bias=False),
    Case(T=60, B=3, I=5, H=70, weight_scale=0.1, kind="RNN_TANH", through=("h_n",)),
    Case(T=40, B=3, I=5, H=33, proj=7, weight_scale=1e-2, peephole=True, through=("h_n",)),
    Case(T=40, B=3, I=5, H=33, layer_norm=True, zoneout=(0.3, 0.3), x_scale=1e-38),
]


@pytest.fixture
def flush_denormal() -> Iterator[None]:
    """torch.set_flush_denormal is as it was after the test: off."""
    yield
    torch.set_flush_denormal(False)


# Not Triton, whose 16-bit gates are made of tanh.approx: that may be 2^-11 off.
@pytest.mark.parametrize("backend", ["reference", "cpu", "cuda"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shut", [-float("inf"), -1e4])
def test_close_the_output_gate_by_its_bias(backend: str, dtype: torch.dtype, shut: float) -> None:
    """Its outputs are exactly 0, and its own gradients too."""
    lstm = fastlstm.LSTM(5, 17).to(dtype)
    with torch.no_grad():
        lstm.bias_ih_l0[3 * 17 :] = shut
    x = torch.randn(4, 3, 5, dtype=dtype, requires_grad=True)
    y, (h_n, _) = lstm(x)
    assert torch.equal(y, torch.zeros_like(y))
    assert torch.equal(h_n, torch.zeros_like(h_n))
    y.sum().backward()
    for tensor in (x, *lstm.parameters()):
        assert tensor.grad is not None and torch.equal(tensor.grad, torch.zeros_like(tensor))


@ON_CPU
@pytest.mark.parametrize("shut", [-87.0, -88.0, -100.0, -1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_close_gates_almost(backend: str, dtype: torch.dtype, shut: float) -> None:
    """A gate is what nn.LSTM's is, or 0 where that would be denormal."""
    ours, theirs = fastlstm.LSTM(5, 33, dtype=dtype), nn.LSTM(5, 33, dtype=torch.float64)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
        ours.bias_ih_l0[3 * 33 :] = shut
        ours.bias_ih_l0[2 * 33 : 3 * 33] = 5.0
    theirs.load_state_dict(ours.state_dict())
    x = torch.zeros(1, 2, 5, dtype=torch.float64)
    with torch.inference_mode():
        got, want = ours(x.to(dtype))[0].double(), theirs(x)[0]
    tiny = torch.finfo(dtype).smallest_normal
    rounding = 4 * torch.finfo(dtype).eps * max(1.0, -shut)  # of exp(shut)
    assert ((got - want).abs() <= tiny + rounding * want).all()
    assert ((got == 0) | (got >= tiny)).all()


@ON_CPU
@pytest.mark.parametrize("case", FADING, ids=str)
def test_let_states_and_gradients_fade_away(backend: str, case: Case) -> None:
    """No result is denormal: no kernel has multiplied a denormal number that it made."""
    for name, value in evaluate(case, torch.float32, draw(case, torch.float32), fast).items():
        assert not denormals(value).any(), name
    check(case, torch.float32)


def denormals(value: Tensor) -> Tensor:
    return (value != 0) & (value.abs() < TINY)


@ON_CPU
@pytest.mark.parametrize("case", [*FADING, Case(T=5, B=13, I=10, H=33, x_scale=1e-40)], ids=str)
def test_flush_denormals_in_one_thread(backend: str, case: Case, flush_denormal: None) -> None:
    """The same bits for any number of threads, whatever torch.set_flush_denormal says."""
    numbers = draw(case, torch.float32)
    results: list[Results] = []
    for flush in (False, True):
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            torch.set_flush_denormal(flush)
            results.append(evaluate(case, torch.float32, numbers, fast))
            torch.set_flush_denormal(False)  # what comes after is not the module's
    for name, want in results[0].items():
        assert all(torch.equal(got[name], want) for got in results), name


@ON_CPU
@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
def test_use_denormals_after_a_call(
    backend: str, flush: bool, threads: int, flush_denormal: None
) -> None:
    """PyTorch's own arithmetic is afterwards as it was before, in every thread of its pool."""
    torch.set_num_threads(threads)
    torch.set_flush_denormal(flush)
    small = torch.full((200_000,), TINY)
    before = small * 0.5
    lstm, x = fastlstm.LSTM(64, 128), torch.randn(9, 32, 64, requires_grad=True)
    lstm(x)[0].sum().backward()
    assert torch.equal(small * 0.5, before)
    assert bool(before[0] == 0) == flush
    with pytest.raises(RuntimeError):
        fastlstm.LSTM(64, 128)(torch.randn(9, 32, 63))
    assert torch.equal(small * 0.5, before)


@ON_CPU
def test_keep_small_float16_numbers(backend: str) -> None:
    """What is denormal as float16 is a normal number as float32: it is not lost."""
    lstm = fastlstm.LSTM(1, 16, bias=False).half()
    with torch.no_grad():
        lstm.weight_ih_l0.fill_(1.0)
        lstm.weight_hh_l0.zero_()
    x = torch.tensor([1, 3, 1023], dtype=torch.float16).view(3, 1, 1) * 2.0**-24
    y = lstm(x)[1][1]
    assert (y > 0).all()


@ON_CPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_fill_weights_with_constants(backend: str, dtype: torch.dtype) -> None:
    """Each of 512 products is a hundred thousandth of the bias, as in NVIDIA's RNN sample."""
    check(Case(T=20, B=2, I=512, H=512, layers=2, values="constant"), dtype)


@ON_CPU
@pytest.mark.parametrize(
    "case",
    [
        Case(T=5, B=3, I=16, H=160, proj=16, values="constant"),
        Case(T=5, B=3, I=16, H=160, proj=16, values="constant", bias=False),
        Case(T=20, B=2, I=100, H=256, proj=64, values="constant"),
        Case(T=8, B=3, I=1, H=100, proj=16, values="constant"),
        Case(T=8, B=2, I=64, H=128, layers=2, directions=2, proj=16, values="constant"),
        Case(T=8, B=2, I=64, H=512, proj=64, values="constant"),
    ],
    ids=str,
)
def test_project_states_that_are_all_alike(backend: str, case: Case) -> None:
    """A hundred equal terms round alike, so their sums need chains as short as PyTorch's."""
    check(case, torch.float32)


@ON_CPU
@pytest.mark.slow
@pytest.mark.parametrize("values", ["normal", "positive", "constant"])
@pytest.mark.parametrize("kind", ["RNN_TANH", "LSTM"])
def test_train_on_many_rows(backend: str, kind: str, values: str) -> None:
    check(Case(T=1, B=150_000, I=4, H=8, kind=kind, values=values), torch.float32)


@ON_CPU
@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        Case(T=4, B=40_000, I=3, H=5, peephole=True, values="positive"),
        Case(T=1, B=200_000, I=4, H=8, kind="RNN_TANH"),
        Case(T=1, B=1_000_000, I=4, H=8, kind="RNN_TANH", values="positive"),
        Case(T=5_000, B=2, I=4, H=8, values="positive", proj=3),
        Case(T=4, B=40_000, I=3, H=5, layer_norm=True),
    ],
    ids=str,
)
def test_train_on_a_million_rows(backend: str, case: Case) -> None:
    check(case, torch.float32)


@ON_CPU
def test_recompute_gives_the_same_bits_beside_a_large_bias(backend: str) -> None:
    case = Case(T=5, B=13, I=28, H=64, weight_scale=1e-2, bias_scale=30.0)
    numbers = draw(case, torch.float32)
    kept = evaluate(case, torch.float32, numbers, fast)
    again = evaluate(replace(case, recompute=True), torch.float32, numbers, fast)
    assert all(torch.equal(again[name], kept[name]) for name in kept)


STARTS = [
    {},
    {"num_layers": 2, "bidirectional": True},
    {"proj_size": 9},
    {"layer_norm": True, "peephole": True},
]


@ON_CPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("batch", [1, 5, 70])
@pytest.mark.parametrize("options", STARTS, ids=str)
def test_states_of_zeros_have_the_bits_of_tiny_ones(
    backend: str, options: dict[str, Any], batch: int, dtype: torch.dtype
) -> None:
    """The product with states that are all zero is left out, which nobody can see."""
    lstm = fastlstm.LSTM(10, 33, **options).to(dtype)
    x = torch.randn(6, batch, 10, dtype=dtype)
    rows = lstm.num_layers * (1 + lstm.bidirectional)
    c = torch.zeros(rows, batch, 33, dtype=dtype)
    h = torch.zeros(rows, batch, lstm.proj_size or 33, dtype=dtype)
    with torch.no_grad():
        expected, _ = lstm(x, (h + 1e-40 if dtype is torch.float32 else h + 1e-200, c))
        assert torch.equal(lstm(x)[0], expected)
        assert torch.equal(lstm(x, (h, c))[0], expected)
        assert torch.equal(lstm(x, (-h, c))[0], expected)


@ON_CPU
@pytest.mark.parametrize("batch", [1, 5, 70])
def test_weights_that_are_not_finite_spoil_states_of_zeros(backend: str, batch: int) -> None:
    """As in nn.LSTM, where infinity times zero is NaN."""
    lstm = fastlstm.LSTM(10, 33)
    with torch.no_grad():
        lstm.weight_hh_l0[3, 5] = float("inf")
        lstm.weight_hh_l0[40, 2] = float("nan")
    theirs = nn.LSTM(10, 33)
    theirs.load_state_dict(lstm.state_dict())
    x = torch.randn(6, batch, 10)
    y, expected = lstm(x)[0], theirs(x)[0]
    assert expected[0].isnan().any() and not expected[0].isnan().all()
    assert torch.equal(y.isnan(), expected.isnan())
