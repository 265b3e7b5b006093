"""Numbers that cuDNN computed and others printed, of the kernels on a GPU, in exact float32."""

import gpu
import pytest
from cases import Case
from gpu import DEVICE
from published import SAMPLES, SMALL, Published
from test_published import hold

from benchmarks.speed.precision import PRECISIONS

pytestmark = gpu.MARKS
kernels = gpu.kernels


@pytest.mark.parametrize(
    ("case", "published"),
    [pytest.param(each.case, each, id=str(each)) for each in SMALL + SAMPLES],
)
def test_published_numbers(case: Case, published: Published) -> None:
    with PRECISIONS["exact"].applied():
        hold(published, published.tolerance, DEVICE)
