"""Regimes of the Triton kernels that the configuration does not choose by itself at these shapes.

`python -m benchmarks gpu` runs this file apart from the others, and later: a persistent kernel
waits for other programs inside of a launch, so one that is wrong may not end.
"""

import gpu
import pytest
import torch
from cases import Case, evaluate, fast
from gpu import assert_same_bits, check, every_precision, forced, numbers_of

from benchmarks.speed.precision import PRECISIONS, Precision

pytestmark = [*gpu.MARKS, pytest.mark.only("triton")]
kernels = gpu.kernels

PERSISTENT = [
    Case(T=1, B=1, I=28, H=256),
    Case(T=50, B=16, I=10, H=200),
    Case(T=50, B=64, I=128, H=512, hx=False),
    Case(T=20, B=7, I=28, H=512, directions=2, layers=2),
    Case(T=50, B=16, I=128, H=1024),
    Case(T=6, B=7, I=28, H=512, lengths=(1, 0, 6, 4, 0, 3, 1), directions=2),
    Case(T=6, B=5, I=10, H=256, lengths=(2, 6, 1, 6, 3), packed=True, directions=2),
    Case(T=9, B=7, I=10, H=256, reset=True),
]
STEPS = [
    Case(T=50, B=7, I=28, H=16),
    Case(T=28, B=64, I=28, H=64, hx=False, directions=2),
    Case(T=20, B=16, I=10, H=128, proj=33),
    Case(T=6, B=5, I=10, H=33, lengths=(2, 0, 1, 6, 3), directions=2, layers=2),
    Case(T=9, B=7, I=10, H=64, reset=True, batch_first=True),
]


@every_precision
@pytest.mark.parametrize("case", STEPS, ids=str)
def test_one_launch_a_step(case: Case, precision: Precision) -> None:
    check(case, precision, forced("steps"))


@every_precision
@pytest.mark.parametrize("case", PERSISTENT, ids=str)
def test_persistent(case: Case, precision: Precision) -> None:
    check(case, precision, forced("persistent"))


@pytest.mark.parametrize("name", ["bf16", "exact"])
def test_persistent_for_many_steps(name: str) -> None:
    """The state of a step travels between processors 2,000 times and never arrives stale."""
    precision = PRECISIONS[name]
    case = Case(T=2000, B=64, I=64, H=512, hx=False)
    check(case, precision, forced("persistent"))
    numbers = numbers_of(case, precision.dtype)
    with precision.applied(), forced("persistent"):
        want = evaluate(case, precision.dtype, numbers, fast)
        for _ in range(9):
            assert_same_bits(evaluate(case, precision.dtype, numbers, fast), want)


@pytest.mark.parametrize("where", ["x", "h0", "c0", "w.weight_hh_l0", "w.bias_ih_l0"])
def test_nan_is_no_flag(where: str) -> None:
    """A state that is NaN must not be taken for one that has not arrived."""
    case = Case(T=5, B=3, I=10, H=512)
    numbers = numbers_of(case, torch.bfloat16)
    numbers[where].detach().view(-1)[0] = torch.nan
    with torch.no_grad(), forced("persistent"):
        assert evaluate(case, torch.bfloat16, numbers, fast)["y"][-1, 0].isnan().any()
