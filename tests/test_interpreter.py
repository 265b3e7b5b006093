"""The Triton kernels interpreted with the roundings of a GPU, in every precision.

tests/interpreter.py makes them, and is tested here as well. tests/test_numerics.py and others run
with it too, in bfloat16, float16 and exact float32; TF32 is here alone.
"""

from itertools import product

import numpy as np
import pytest
import torch
from cases import Case, draw, evaluate, fast, plain, stepwise
from interpreter import (
    INTERPRETED,
    TANH_ERROR,
    assembly,
    blocks,
    chain,
    cut_to_tf32,
    narrow,
    round_to_tf32,
    rounding,
    tanh_approx,
    widen,
)
from oracle import hold, judge

import fastlstm
from benchmarks.speed.precision import PRECISIONS, Precision

interpreted, on_a_cpu = INTERPRETED

CASES = [
    Case(T=5, B=3, I=10, H=17, directions=2),
    Case(T=5, B=3, I=10, H=33, lengths=(5, 0, 2), proj=5, layers=2),
    Case(T=6, B=3, I=3, H=20, lengths=(6, 2, 1), packed=True, directions=2, peephole=True),
    Case(T=9, B=3, I=10, H=17, reset=True, zoneout=(0.3, 0.0)),
    Case(T=4, B=3, I=5, H=150),
    Case(T=5, B=3, I=10, H=17, kind="RNN_TANH", directions=2),
    Case(T=5, B=3, I=10, H=70, kind="RNN_RELU", lengths=(5, 0, 2)),
]
REGIMES = [{}, {"regime": "steps"}]
NORMALISED = Case(T=5, B=3, I=10, H=17, layer_norm=True)


def check(case: Case, precision: Precision, **changes: str) -> None:
    """Assert that outputs and gradients are as close to float64 as PyTorch's.

    In TF32 the numbers that go in are known to its spacing only.
    """
    from fastlstm.kernels.triton.config import override

    torch.set_num_threads(1)
    numbers = draw(case, precision.dtype)
    solver = stepwise if case.ragged else plain
    truth, allowed = judge(
        lambda dtype, n: evaluate(case, dtype, n, solver),
        precision.dtype,
        numbers,
        arithmetic=precision.eps if precision.tf32 else None,
    )
    with (
        fastlstm.backend("triton"),
        precision.applied(),
        rounding(tf32=bool(precision.tf32), worst=True),
        override(**changes),
    ):
        hold(case, precision.dtype, numbers, truth, allowed)


@interpreted
@on_a_cpu
@pytest.mark.parametrize(
    ("case", "precision", "changes"), [*product(CASES, PRECISIONS.values(), REGIMES)], ids=str
)
def test_error_is_that_of_pytorch(
    case: Case, precision: Precision, changes: dict[str, str]
) -> None:
    check(case, precision, **changes)


@interpreted
@on_a_cpu
@pytest.mark.parametrize(
    "precision", [p for p in PRECISIONS.values() if p.name != "exact"], ids=str
)
def test_normalised(precision: Precision) -> None:
    """Whose units have to be in one program, which exact products leave no room for."""
    check(NORMALISED, precision)


@interpreted
@on_a_cpu
def test_long_sums() -> None:
    """A chain of 4H terms that began at dy, and not at zero, would be out of bounds by 1.9."""
    check(Case(T=3, B=3, I=5, H=256), PRECISIONS["exact"])


@interpreted
@on_a_cpu
def test_tf32_is_coarser() -> None:
    """And is not what other tests of float32 get, whose plans may be those of TF32."""
    case, tf32 = Case(T=3, B=3, I=10, H=17), PRECISIONS["tf32"]
    numbers = draw(case, tf32.dtype)
    found = []
    with fastlstm.backend("triton"), tf32.applied():
        for coarse in (False, True):
            with rounding(tf32=coarse):
                found.append(evaluate(case, tf32.dtype, numbers, fast)["y"])
    apart = (found[0] - found[1]).abs().max()
    assert 2**-20 < apart < 2**-8


def test_bfloat16_rounds_as_in_pytorch() -> None:
    """To the nearest, ties to even; infinities and NaN stay."""
    ties = torch.arange(1, 64) / 2**8 + 1
    x = torch.cat([torch.randn(1000), ties, -ties, torch.tensor([0.0, -0.0, torch.inf, 3.4e38])])
    rounded = torch.from_numpy(widen(narrow(x.numpy())))
    assert torch.equal(rounded, x.bfloat16().float())
    assert np.isnan(widen(narrow(np.float32([np.nan])))).all()


def test_tf32_has_ten_bits() -> None:
    step = np.float32(2**-10)
    x = np.float32([1 + step / 2, -1 - step / 2, 1 + step / 4, np.inf])
    assert round_to_tf32(x).tolist() == [1 + step, -1 - step, 1, np.inf]
    assert cut_to_tf32(x).tolist() == [1, -1, 1, np.inf]
    assert np.isnan(round_to_tf32(np.float32([np.nan]))).all()


@pytest.mark.parametrize("worst", [False, True])
def test_tanh_errs_by_what_it_may(worst: bool) -> None:
    x = torch.randn(1000).numpy()
    error = tanh_approx(x, worst) / np.tanh(x.astype(np.float64)) - 1
    assert 0.99 * TANH_ERROR < np.abs(error).max() < 1.001 * TANH_ERROR
    assert (error > TANH_ERROR / 2).any()
    assert (error < -TANH_ERROR / 2).any()
    assert (np.abs(error) < TANH_ERROR / 2).any() != worst
    assert np.abs(tanh_approx(np.float32([20, -20, np.inf]), worst)).max() <= 1


def test_sums_round_term_by_term() -> None:
    """Small terms vanish beside a large start; matrix instructions add some first, and cut off."""
    a, b = np.ones((1, 32)), np.ones((32, 1))
    start = np.full((1, 1), 2.0**25, np.float32)
    assert chain(a, b, start).item() == 2**25
    assert blocks(a, b, start, 16).item() == 2**25 + 32
    assert blocks(a, -b, start, 2).item() == 2**25 - 32
    assert blocks(a, b, start, 2).item() == 2**25


def test_other_instructions_are_named() -> None:
    with pytest.raises(NotImplementedError, match=r"ex2\.approx"):
        assembly("ex2.approx.f32 $0, $1;", None, False, False)
