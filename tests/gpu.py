"""What the tests of the kernels on a GPU share: when they run, and how they judge.

`pytest -m gpu` runs the Triton kernels, `pytest -m gpu --backend cuda` the CUDA kernels.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from cases import Case, Results, draw, evaluate, plain, stepwise
from oracle import judge, settle

import fastlstm
from benchmarks.speed.precision import PRECISIONS, Precision

# The tests run deterministically, and there cuBLAS wants a workspace of a fixed size.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

DEVICE = "cuda"
MARKS = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="no CUDA device: torch.cuda.is_available() is False"
    ),
]
every_precision = pytest.mark.parametrize("precision", PRECISIONS.values(), ids=str)


@pytest.fixture(autouse=True)
def kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    """The chosen kernels serve every call of a module that takes this fixture over."""
    with fastlstm.backend(request.config.getoption("--backend")):
        yield
    torch.cuda.empty_cache()  # the tests run in many processes, which share the memory


def numbers_of(case: Case, dtype: torch.dtype) -> Results:
    """The numbers of a case on the GPU, in float64."""
    return {name: value.to(DEVICE) for name, value in draw(case, dtype).items()}


def check(
    case: Case,
    precision: Precision,
    forced: AbstractContextManager[None] | None = None,
    numbers: Results | None = None,
) -> None:
    """Assert that fastlstm, training and inferring, is as close to float64 as cuDNN is.

    `forced` is forced upon the kernels, not upon the yardsticks; `numbers` are those of the case
    unless there are others. What cuDNN cannot do it does one step at a time. Beyond its bounds
    the yardsticks are those that the CPU's tests have for such backends (`oracle.settle`): cuDNN
    a step at a time, and the reference, whose products are the same cuBLAS's. In TF32 the numbers
    that go in are known to its spacing only.
    """
    dtype = precision.dtype
    numbers = numbers or numbers_of(case, dtype)
    solver = stepwise if case.ragged else plain
    with precision.applied():
        truth, allowed = judge(
            lambda d, n: evaluate(case, d, n, solver),
            dtype,
            numbers,
            arithmetic=precision.eps if precision.tf32 else None,
        )
        with forced or nullcontext():
            settle(case, dtype, numbers, truth, allowed, backend="gpu")


def forced(regime: str) -> AbstractContextManager[None]:
    """The configuration of the Triton kernels restricted to a regime."""
    from fastlstm.kernels.triton.config import override

    return override(regime=regime)


def assert_same_bits(got: Results, want: Results) -> None:
    """Assert that both have the same tensors, to the bit."""
    assert got.keys() == want.keys()
    for name in want:
        assert torch.equal(got[name], want[name]), name
