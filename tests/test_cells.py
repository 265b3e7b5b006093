"""Cells that torch.nn does not have: extended, normalised, with peepholes; and nn.RNN."""

import pytest
import torch
from cases import EVERY_BACKEND, Case
from oracle import check

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

EACH = [
    Case(T=5, B=3, I=10, H=17, peephole=True),
    Case(T=5, B=3, I=10, H=17, layer_norm=True),
    Case(T=5, B=3, I=10, H=17, zoneout=(0.3, 0.1)),
    Case(T=5, B=3, I=10, H=17, zoneout=(0.5, 0.0), noise=True),
    Case(T=5, B=3, I=10, H=17, noise=True),
    Case(T=5, B=3, I=10, H=17, recompute=True),
]
TOGETHER = [
    Case(T=4, B=2, I=3, H=33, directions=2, layers=2, peephole=True, layer_norm=True, hx=False),
    Case(T=6, B=5, I=3, H=16, lengths=(2, 0, 6, 1, 3), directions=2, zoneout=(0.2, 0.4),
         peephole=True, noise=True, cell_states=True),
    Case(T=6, B=3, I=10, H=20, lengths=(6, 2, 1), packed=True, directions=2, layer_norm=True,
         zoneout=(0.5, 0.25), noise=True),
    Case(T=9, B=5, I=10, H=17, reset=True, peephole=True, layer_norm=True, zoneout=(0.1, 0.1)),
    Case(T=5, B=4, I=10, H=17, proj=5, directions=2, peephole=True, layer_norm=True, noise=True,
         zoneout=(0.2, 0.3), cell_states=True),
    Case(T=5, B=3, I=10, H=17, proj=5, bias=False, layer_norm=True, batch_first=True),
    Case(T=5, B=13, I=10, H=100, bias=False, peephole=True, noise=True, zoneout=(0.0, 0.5)),
    Case(T=3, B=1, I=1, H=1, peephole=True, zoneout=(0.1, 0.1), noise=True),
    Case(T=3, B=2, I=10, H=64, layer_norm=True, wrt=("h0", "c0"), through=("c_n",)),
    Case(T=20, B=64, I=10, H=64, layer_norm=True, peephole=True),
]  # fmt: skip
WIDE = [
    Case(T=4, B=3, I=5, H=150, peephole=True, zoneout=(0.3, 0.2), noise=True),
    Case(T=4, B=3, I=5, H=150, recompute=True, directions=2, lengths=(4, 0, 2)),
]
WIDE_NORMALISED = [Case(T=4, B=3, I=5, H=150, layer_norm=True)]  # beyond one GPU program
RECOMPUTED = [
    Case(T=9, B=7, I=10, H=33, reset=True, recompute=True, layers=2),
    Case(T=6, B=5, I=10, H=17, lengths=(2, 6, 1, 6, 3), packed=True, directions=2, recompute=True),
    Case(T=5, B=3, I=10, H=17, proj=5, recompute=True, directions=2, cell_states=True, bias=False),
    Case(T=28, B=64, I=28, H=64, recompute=True, hx=False),
    Case(T=5, B=3, I=10, H=17, peephole=True, noise=True, zoneout=(0.3, 0.3), recompute=True),
]
RNN = [
    Case(T=5, B=3, I=10, H=17, kind="RNN_TANH"),
    Case(T=5, B=3, I=10, H=17, kind="RNN_RELU"),
    Case(T=1, B=1, I=1, H=1, kind="RNN_TANH", bias=False),
    Case(T=5, B=6, I=3, H=33, kind="RNN_RELU", directions=2, layers=2, hx=False),
    Case(T=5, B=6, I=3, H=100, kind="RNN_TANH", batch_first=True, hx_layout="transposed"),
    Case(
        T=6, B=5, I=10, H=64, kind="RNN_TANH", lengths=(2, 6, 1, 6, 3), packed=True, directions=2
    ),
    Case(T=6, B=5, I=10, H=17, kind="RNN_RELU", lengths=(2, 0, 1, 6, 3), directions=2, layers=2),
    Case(T=9, B=5, I=10, H=16, kind="RNN_TANH", reset=True, lengths=(0, 9, 4, 1, 7)),
    Case(T=28, B=20, I=28, H=130, kind="RNN_TANH", x_layout="transposed", through=("y",)),
    Case(T=3, B=0, I=3, H=5, kind="RNN_TANH", directions=2),
    Case(T=200, B=2, I=3, H=5, kind="RNN_TANH", wrt=("x",), through=("h_n",)),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", WIDE_NORMALISED, ids=str)
def test_without_a_gpu_kernel(backend: str, case: Case, dtype: torch.dtype) -> None:
    check(case, dtype, backend)


@EVERY_BACKEND
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", EACH + TOGETHER + WIDE + RECOMPUTED + RNN, ids=str)
def test_error_is_that_of_the_book(backend: str, case: Case, dtype: torch.dtype) -> None:
    """Of the equations in tests/textbook.py, and of nn.RNN, computed in the same dtype."""
    check(case, dtype, backend)
