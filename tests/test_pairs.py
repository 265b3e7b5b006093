"""bfloat16 modules whose products are those of pairs, where the CPU has AVX-512 FP16 or BF16.

Elsewhere the same tests run the kernels that multiply in float32.
"""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from cases import Case, draw, evaluate, fast
from oracle import check
from torch import Tensor, nn

import fastlstm
from fastlstm import extension

pytestmark = pytest.mark.parametrize("backend", ["cpu"], indirect=True)

BFLOAT16 = torch.bfloat16
# All of I + P >= 64, from which on products take pairs (csrc/cpu/pairs.h) with both.
CASES = [
    Case(T=6, B=5, I=31, H=33),
    Case(T=9, B=50, I=65, H=17, directions=2),
    Case(T=5, B=7, I=130, H=100, layers=2, directions=2),
    Case(T=7, B=3, I=2, H=62, hx=False, bias=False),
    Case(T=6, B=13, I=40, H=70, proj=35, layers=2),
    Case(T=40, B=33, I=40, H=40),  # weight gradients of several blocks of rows
    Case(T=6, B=5, I=40, H=33, lengths=(2, 6, 1, 6, 3), packed=True, directions=2),
    Case(T=6, B=5, I=40, H=33, lengths=(2, 0, 1, 6, 3), layers=2),
    Case(T=9, B=7, I=40, H=33, reset=True, recompute=True),
    Case(T=3, B=7, I=40, H=33, recompute=True),
    Case(T=1, B=2, I=40, H=33),
    Case(T=6, B=9, I=60, H=33, peephole=True, zoneout=(0.2, 0.3), noise=True),
    Case(T=6, B=9, I=60, H=33, layer_norm=True),
    Case(T=6, B=9, I=60, H=71, kind="RNN_TANH", directions=2),
    Case(T=6, B=9, I=60, H=13, kind="RNN_RELU"),
    Case(T=5, B=7, I=60, H=33, wrt=("x",)),
    Case(T=5, B=7, I=60, H=33, wrt=("weight_hh_l0", "h0")),
    Case(T=5, B=7, I=60, H=33, x_scale=1e4),  # errors of float16 would show in open gates
    Case(T=5, B=61, I=60, H=33, x_scale=100.0, hx=False),
    Case(T=5, B=61, I=200, H=33, x_scale=10.0),
    Case(T=5, B=7, I=60, H=33, x_scale=1e-7, bias=False),
    Case(T=5, B=7, I=60, H=33, x_scale=1e-36, bias=False),
    Case(T=5, B=7, I=60, H=33, weight_scale=50.0, bias_scale=50.0),
    Case(T=40, B=3, I=60, H=70, weight_scale=1e-2, through=("h_n",), bias=False),
    Case(T=5, B=7, I=60, H=33, values="positive", weight_scale=0.3),
    Case(T=5, B=7, I=60, H=33, values="constant"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_is_that_of_pytorch(backend: str, case: Case) -> None:
    check(case, BFLOAT16)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["x", "h0"])
def test_non_finite_numbers_stay_in_their_row(backend: str, where: str, bad: float) -> None:
    """Infinite numbers close or open gates, as in float32; NaN stays."""
    case = Case(T=6, B=9, I=60, H=33, wrt=("x", "h0", "c0"))
    numbers = draw(case, BFLOAT16)
    clean = evaluate(case, BFLOAT16, numbers, fast)
    numbers[where][-1, 1, 3] = bad
    got = evaluate(case, BFLOAT16, numbers, fast)
    others = [b for b in range(case.B) if b != 1]
    for name in clean:
        assert torch.equal(got[name][:, others], clean[name][:, others]), name
    if bad == bad:
        assert not got["y"].isnan().any()
    else:
        assert got["y"][-1, 1].isnan().all()
        assert got["d h0"][:, 1].isnan().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["weight_ih_l0", "weight_hh_l0"])
def test_weights_that_are_not_finite_show(backend: str, where: str, bad: float) -> None:
    lstm = fastlstm.LSTM(60, 33, dtype=BFLOAT16)
    with torch.no_grad():
        getattr(lstm, where)[2 * 33] = bad  # gate g of unit 0
        y, _ = lstm(torch.randn(6, 5, 60, dtype=BFLOAT16))
    assert y[:, :, 0].isnan().any()


def test_each_row_and_column_has_a_range_of_its_own(backend: str) -> None:
    """Of each unit the error is a part of its own size, however small others make it look."""
    torch.manual_seed(0)
    ours = fastlstm.RNN(60, 33, nonlinearity="relu", bias=False, dtype=BFLOAT16)
    powers = 2.0 ** torch.linspace(-60, 60, 33).round()
    theirs = nn.RNN(60, 33, nonlinearity="relu", bias=False, dtype=BFLOAT16)
    exact = nn.RNN(60, 33, nonlinearity="relu", bias=False, dtype=torch.float64)
    rows = 2.0 ** torch.linspace(-30, 30, 5).round()[:, None]
    x = (torch.randn(6, 5, 60) * rows).to(BFLOAT16)
    with torch.no_grad():
        ours.weight_ih_l0.mul_(powers[:, None])
        ours.weight_hh_l0.zero_()
        for other in (theirs, exact):
            other.load_state_dict(ours.state_dict())
        truth = exact(x.double())[0]
        got, bar = (
            ((y.double() - truth).abs() / (powers * rows)).max()
            for y in (ours(x)[0], theirs(x)[0])
        )
    assert got <= 2 * bar


def test_large_rows_leave_the_weight_gradients_of_others(backend: str) -> None:
    """A row that has closed its gates adds nothing, so it must not hide what others add."""
    torch.manual_seed(0)
    ours, theirs = fastlstm.LSTM(64, 64, dtype=BFLOAT16), nn.LSTM(64, 64, dtype=BFLOAT16)
    exact = nn.LSTM(64, 64, dtype=torch.float64)
    for other in (theirs, exact):
        other.load_state_dict(ours.state_dict())
    x = torch.randn(8, 8, 64, dtype=BFLOAT16)
    x[:, 0] *= 1e8
    grad = torch.randn(8, 8, 64, dtype=BFLOAT16)
    truth = gradients(exact, x.double(), grad.double())[0]
    got, bar = ((gradients(m, x, grad)[0] - truth).abs().max() for m in (ours, theirs))
    assert got <= 2 * bar


def test_a_large_number_leaves_the_others_of_its_row(backend: str) -> None:
    """Beside x of 1e8, which meets weights of zero."""
    torch.manual_seed(0)
    ours, exact = fastlstm.LSTM(64, 64, dtype=BFLOAT16), nn.LSTM(64, 64, dtype=torch.float64)
    x = torch.randn(8, 8, 64, dtype=BFLOAT16)
    with torch.no_grad():
        ours.weight_ih_l0[:, 0] = 0
        exact.load_state_dict(ours.state_dict())
        ours_without, truth = ours(x)[0], exact(x.double())[0]
        x[:, 0, 0] = 1e8
        got, _ = ours(x)
    assert (got - truth).abs().max() <= 2 * (ours_without - truth).abs().max()


def gradients(module: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    y, _ = module(x)
    return list(torch.autograd.grad(y, list(module.parameters()), grad))


@pytest.mark.parametrize("exponent", [-60, -20, 20])
def test_gradients_of_any_size(backend: str, exponent: int) -> None:
    torch.manual_seed(0)
    lstm = fastlstm.LSTM(60, 33, dtype=BFLOAT16)
    x, grad = torch.randn(2, 30, 5, 60, dtype=BFLOAT16)[0], torch.randn(30, 5, 33, dtype=BFLOAT16)
    want = gradients(lstm, x, grad)
    for got, plain in zip(gradients(lstm, x, grad * 2.0**exponent), want, strict=True):
        assert torch.equal(got, plain * 2.0**exponent)


def test_short_and_long_calls_in_turns(backend: str) -> None:
    """They share a buffer for packed weights, and pack in different ways."""
    lstm = fastlstm.LSTM(100, 80, dtype=BFLOAT16)
    x = torch.randn(9, 70, 100, dtype=BFLOAT16)
    grads = {}
    for _ in range(2):
        for T in (9, 3, 5, 1):
            found = gradients(lstm, x[:T], torch.ones(T, 70, 80, dtype=BFLOAT16))
            with torch.no_grad():
                found.append(lstm(x[:T])[0])
            for got, want in zip(found, grads.setdefault(T, found), strict=True):
                assert torch.equal(got, want)


def test_one_step_of_a_narrow_layer_is_that_of_many(backend: str) -> None:
    lstm = fastlstm.LSTM(40, 33, dtype=BFLOAT16)
    x = torch.randn(6, 3, 40, dtype=BFLOAT16)
    with torch.no_grad():
        assert torch.equal(lstm(x[:1])[0], lstm(x)[0][:1])


def test_under_autocast(backend: str) -> None:
    torch.manual_seed(0)
    wide = fastlstm.LSTM(60, 33)
    narrow = fastlstm.LSTM(60, 33, dtype=BFLOAT16)
    narrow.load_state_dict(wide.state_dict())
    x = torch.randn(6, 5, 60)
    with torch.autocast("cpu", BFLOAT16):
        y, _ = wide(x)
    assert torch.equal(y, narrow(x.bfloat16())[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["avx512", "avx512bf16", "avx512fp16"])
def test_the_name_of_the_kernels(backend: str, name: str) -> None:
    """FASTLSTM_ISA=avx512 leaves products in float32; the name that is told is what it says."""
    mine = extension.isa()
    if not mine.startswith("avx512") or name not in ("avx512", mine):
        pytest.skip(f"the kernels of this machine, or of FASTLSTM_ISA, are {mine}")
    code = "import fastlstm, torch; torch.manual_seed(0); m = fastlstm.LSTM(60, 33).bfloat16()"
    code += "; print(m(torch.randn(6, 5, 60).bfloat16())[0].float().sum().item())"
    code += "; from fastlstm import extension; print(extension.isa())"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "FASTLSTM_ISA": name},
        capture_output=True,
        text=True,
        check=True,
    )
    total, told = run.stdout.split()
    assert told == name
    torch.manual_seed(0)
    ours = fastlstm.LSTM(60, 33).bfloat16()(torch.randn(6, 5, 60).bfloat16())[0].float().sum()
    assert (float(total) == ours.item()) == (name == mine)


@pytest.mark.parametrize(("I", "H"), [(300, 33), (40, 70), (33, 41), (600, 130)])
def test_row_does_not_see_its_batch(backend: str, I: int, H: int) -> None:
    """Outputs and gradients of rows alone, of two, which are summed otherwise, and of many."""
    full = Case(T=6, B=64, I=I, H=H, directions=2, wrt=("x", "h0", "c0"))
    numbers = draw(full, BFLOAT16)
    want = evaluate(full, BFLOAT16, numbers, fast)
    for start, stop in ((5, 6), (5, 7), (3, 6), (1, 8), (5, 55)):
        rows = {k: v if k.startswith("w.") else v[:, start:stop] for k, v in numbers.items()}
        got = evaluate(replace(full, B=stop - start), BFLOAT16, rows, fast)
        for name in got:
            assert torch.equal(got[name], want[name][:, start:stop]), (name, start, stop)


@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_threads_do_not_show(backend: str, case: Case) -> None:
    case = replace(case, B=max(case.B, 13))
    numbers = draw(case, BFLOAT16)
    torch.set_num_threads(1)
    want = evaluate(case, BFLOAT16, numbers, fast)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        got = evaluate(case, BFLOAT16, numbers, fast)
        assert all(torch.equal(got[name], want[name]) for name in want)
