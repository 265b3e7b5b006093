"""Sequences of different lengths, packed or padded, and resets in the middle of a sequence."""

from dataclasses import replace

import pytest
import torch
from cases import EVERY_BACKEND, Case, draw, draw_reset, evaluate, fast, stepwise
from oracle import check, compare, expectation

import fastlstm

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

PACKED = [
    Case(T=6, B=4, I=3, H=5, lengths=(6, 4, 4, 1), packed=True),
    Case(T=6, B=5, I=10, H=17, lengths=(2, 6, 1, 6, 3), packed=True, directions=2),
    Case(T=5, B=7, I=28, H=33, lengths=(1, 2, 5, 4, 4, 3, 1), packed=True, hx=False, layers=2),
    Case(T=9, B=3, I=3, H=16, lengths=(1, 9, 1), packed=True, layers=2, directions=2, proj=5),
    Case(T=3, B=13, I=10, H=64, lengths=(3,) * 13, packed=True, directions=2),
    Case(T=28, B=64, I=28, H=33, lengths=(28, 20, 9, 1) * 16, packed=True),
    Case(T=6, B=3, I=3, H=5, lengths=(2, 6, 3), packed=True, cell_states=True, directions=2),
    Case(T=6, B=1, I=3, H=100, lengths=(6,), packed=True, bias=False),
]

PADDED = [
    Case(T=6, B=4, I=3, H=5, lengths=(6, 4, 4, 1)),
    Case(T=6, B=5, I=10, H=17, lengths=(2, 0, 1, 6, 3), directions=2),
    Case(T=5, B=7, I=28, H=33, lengths=(0, 2, 5, 4, 0, 3, 1), hx=False, layers=2),
    Case(T=9, B=3, I=3, H=16, lengths=(1, 8, 0), layers=2, directions=2, proj=5),
    Case(T=5, B=3, I=3, H=16, lengths=(0, 0, 0), directions=2),
    Case(T=5, B=6, I=10, H=33, lengths=(1, 5, 0, 2, 5, 3), batch_first=True, directions=2),
    Case(T=6, B=3, I=3, H=5, lengths=(2, 6, 0), cell_states=True, directions=2),
    Case(T=12, B=64, I=3, H=17, lengths=(12, 0, 5, 1) * 16, through=("h_n", "c_n")),
    Case(T=6, B=13, I=3, H=130, lengths=(2, 6, 4, 1, 1, 0, 3, 6, 6, 5, 2, 1, 3), layers=2),
    Case(T=5, B=3, I=10, H=17, lengths=(1, 5, 0), x_layout="reversed", grad_layout="all_alike"),
]

RESET = [
    Case(T=9, B=3, I=3, H=5, reset=True),
    Case(T=9, B=7, I=10, H=17, reset=True),
    Case(T=9, B=6, I=28, H=33, reset=True, layers=2, hx=False),
    Case(T=9, B=3, I=3, H=16, reset=True, layers=2, proj=5),
    Case(T=9, B=5, I=10, H=64, reset=True, batch_first=True, bias=False),
    Case(T=9, B=3, I=3, H=5, reset=True, cell_states=True),
    Case(T=9, B=13, I=3, H=100, reset=True),
    Case(T=9, B=5, I=10, H=17, reset=True, lengths=(0, 9, 4, 1, 7), layers=2),
    Case(T=9, B=5, I=10, H=17, reset=True, wrt=("h0", "c0"), through=("h_n",)),
]


@EVERY_BACKEND
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", PACKED + PADDED + RESET, ids=str)
def test_error_is_that_of_pytorch(backend: str, case: Case, dtype: torch.dtype) -> None:
    check(case, dtype, backend)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_stepwise_yardstick_is_nn_lstm(packed: bool) -> None:
    """Where nn.LSTM can do without it, the masked loop of the oracle passes the oracle."""
    lengths = (2, 6, 1, 4) if packed else ()
    case = Case(T=6, B=4, I=4, H=5, layers=2, directions=2, proj=3, lengths=lengths, packed=packed)
    numbers, truth, allowed = expectation(case, torch.float64)
    compare(str(case), evaluate(case, torch.float64, numbers, stepwise), truth, allowed)


@EVERY_BACKEND
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("garbage", [float("nan"), float("inf")])
def test_padding_never_leaks(
    backend: str, dtype: torch.dtype, layers: int, garbage: float
) -> None:
    """What stands in the padding of x, or comes in as its gradient, changes no bit anywhere."""
    case = Case(T=6, B=5, I=10, H=17, lengths=(2, 0, 1, 6, 3), directions=2, layers=layers)
    case = replace(case, cell_states=True)
    numbers = draw(case, dtype)
    clean = evaluate(case, dtype, numbers, fast)
    padding = torch.arange(case.T)[:, None] >= torch.tensor(case.lengths)
    for name in ("x", "g.y", "g.c_all"):
        numbers[name] = numbers[name].masked_fill(padding[..., None], garbage)
    spoiled = evaluate(case, dtype, numbers, fast)
    for name in clean:
        assert torch.equal(spoiled[name], clean[name]), name
    for name in ("y", "c_all", "d x"):
        assert (spoiled[name][padding] == 0).all(), name


@EVERY_BACKEND
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_sequence_hands_its_state_through(backend: str, dtype: torch.dtype) -> None:
    """A row of length 0 returns hx as it came, and its gradient is the incoming one."""
    case = Case(T=4, B=3, I=10, H=17, lengths=(0, 4, 0), directions=2)
    numbers = draw(case, dtype)
    got = evaluate(case, dtype, numbers, fast)
    for state, last in (("h0", "h_n"), ("c0", "c_n")):
        assert torch.equal(got[last][:, ::2], numbers[state][:, ::2])
        assert torch.equal(got[f"d {state}"][:, ::2], numbers[f"g.{last}"][:, ::2])
    assert (got["d x"][:, ::2] == 0).all()


@EVERY_BACKEND
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("unused", [float("nan"), 3.0])
def test_reset_at_the_start_forgets_hx(backend: str, dtype: torch.dtype, unused: float) -> None:
    """A row reset at its first step does not see its hx, and hx gets a gradient of exactly 0."""
    case = Case(T=9, B=5, I=10, H=17, reset=True)
    numbers = draw(case, dtype)
    clean = evaluate(case, dtype, numbers, fast)
    at_start = draw_reset(case)[0]
    assert at_start.any()
    assert not at_start.all()
    for name in ("h0", "c0"):
        numbers[name] = numbers[name].masked_fill(at_start[:, None], unused)
    got = evaluate(case, dtype, numbers, fast)
    for name in clean:
        assert torch.equal(got[name], clean[name]), name
    for name in ("d h0", "d c0"):
        assert (got[name][:, at_start] == 0).all()
        assert (got[name][:, ~at_start] != 0).any()


@EVERY_BACKEND
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("where", [0, 4])
def test_reset_row_is_a_fresh_sequence(backend: str, dtype: torch.dtype, where: int) -> None:
    """After a reset of every row the rest is, to the bit, a sequence that starts from zero."""
    lstm = fastlstm.LSTM(10, 17, 2, dtype=dtype)
    x = torch.randn(9, 3, 10, dtype=dtype)
    reset = torch.zeros(9, 3, dtype=torch.bool)
    reset[where] = True
    y, states = lstm(x, reset=reset)
    fresh, fresh_states = lstm(x[where:])
    assert torch.equal(y[where:], fresh)
    for got, want in zip(states, fresh_states, strict=True):
        assert torch.equal(got, want)


@EVERY_BACKEND
def test_no_reset_changes_nothing(backend: str) -> None:
    """A mask of False, and lengths of T, are the dense call to the bit."""
    x = torch.randn(9, 3, 10)
    lstm = fastlstm.LSTM(10, 17, 2)
    assert torch.equal(lstm(x, reset=torch.zeros(9, 3, dtype=torch.bool))[0], lstm(x)[0])
    lstm = fastlstm.LSTM(10, 17, 2, bidirectional=True)
    assert torch.equal(lstm(x, lengths=torch.full((3,), 9))[0], lstm(x)[0])
