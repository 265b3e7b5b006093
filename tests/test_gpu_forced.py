"""The Triton kernels' regime of one launch a step, at shapes for which it is not chosen."""

import gpu
import pytest
from cases import Case
from gpu import check, every_precision, forced

from benchmarks.speed.precision import Precision

pytestmark = [*gpu.MARKS, pytest.mark.only("triton")]
kernels = gpu.kernels

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
