"""Outputs and gradients of dense input against float64, over sizes, dtypes, layouts and extremes.

CI runs this file once for every instruction set the kernels are built for (FASTLSTM_ISA).
"""

import pytest
import torch
from cases import EVERY_BACKEND, Case, draw, evaluate, fast
from oracle import check

import fastlstm

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Every H next to odd batches and inputs: below, at and just past the width of a vector and a tile.
SIZES = [
    Case(T=1, B=1, I=1, H=1),
    Case(T=2, B=2, I=3, H=5, bias=False),
    Case(T=5, B=3, I=10, H=16),
    Case(T=5, B=5, I=28, H=17, hx=False),
    Case(T=2, B=6, I=33, H=33),
    Case(T=5, B=7, I=64, H=64),
    Case(T=2, B=13, I=1, H=100, hx=False),
    Case(T=5, B=64, I=3, H=130),
    Case(T=28, B=128, I=28, H=33),
    Case(T=28, B=1, I=64, H=64, hx=False),
    Case(T=1, B=64, I=10, H=100),
    Case(T=1, B=128, I=33, H=17, hx=False),
    Case(T=3, B=0, I=3, H=5),
    Case(T=1000, B=2, I=3, H=5, directions=2),
]

FEATURES = [
    Case(T=5, B=3, I=10, H=17, directions=2),
    Case(T=5, B=6, I=3, H=33, directions=2, layers=2, hx=False),
    Case(T=5, B=2, I=28, H=16, layers=3, bias=False, batch_first=True),
    Case(T=2, B=13, I=10, H=5, layers=3, directions=2),
    Case(T=28, B=7, I=10, H=64, directions=2, batch_first=True, hx=False),
    Case(T=5, B=5, I=3, H=17, proj=5),
    Case(T=2, B=1, I=28, H=33, proj=16, directions=2, layers=2),
    Case(T=5, B=7, I=33, H=100, proj=33, bias=False, hx=False),
    Case(T=28, B=3, I=1, H=16, proj=1, layers=3, batch_first=True),
    Case(T=3, B=0, I=3, H=5, directions=2, layers=2, proj=2),
    Case(T=5, B=3, I=10, H=16, directions=2, layers=2, cell_states=True),
    Case(T=5, B=3, I=3, H=5, proj=3, cell_states=True, batch_first=True, through=("c_all",)),
]

MEMORY = [
    Case(T=5, B=6, I=10, H=17, x_layout="transposed", hx_layout="transposed"),
    Case(T=5, B=6, I=10, H=17, x_layout="transposed", batch_first=True, grad_layout="reversed"),
    Case(T=5, B=7, I=28, H=16, x_layout="reversed", hx_layout="reversed", directions=2),
    Case(T=5, B=3, I=33, H=33, x_layout="sliced", hx_layout="sliced", grad_layout="sliced"),
    Case(T=5, B=5, I=3, H=16, x_layout="rows_alike", hx_layout="rows_alike", layers=2),
    Case(T=5, B=5, I=3, H=16, x_layout="steps_alike", grad_layout="steps_alike", directions=2),
    Case(T=5, B=2, I=28, H=33, x_layout="all_alike", hx_layout="all_alike"),
    Case(T=5, B=13, I=10, H=17, grad_layout="all_alike", directions=2, proj=5),
    Case(T=5, B=1, I=10, H=64, grad_layout="transposed", x_layout="sliced", batch_first=True),
]

EXTREMES = [
    Case(T=5, B=7, I=10, H=33, weight_scale=50.0, bias_scale=50.0),
    Case(T=5, B=13, I=3, H=64, bias_scale=200.0, directions=2),
    Case(T=5, B=3, I=28, H=17, x_scale=30.0, proj=5),
    Case(T=5, B=3, I=10, H=17, x_scale=1e-4, bias=False),
    Case(T=5, B=3, I=10, H=17, x_scale=1e-7, bias=False, weight_scale=1e-1),
    Case(T=5, B=3, I=10, H=17, x_scale=1e-40, bias=False, directions=2),
]

# Sums whose terms are small beside the bias, beside each other, or all of one sign.
SUMS = [
    Case(T=5, B=3, I=28, H=64, values="positive", weight_scale=0.3, directions=2),
    Case(T=5, B=3, I=64, H=64, weight_scale=1e-2, bias_scale=30.0, recompute=True),
    Case(T=5, B=3, I=1, H=64, x_scale=1000.0, kind="RNN_RELU"),
    Case(T=3, B=5, I=64, H=64, values="positive", weight_scale=0.3, proj=33),
]

GRADIENTS = [
    Case(T=5, B=3, I=10, H=17, wrt=("h0",)),
    Case(T=5, B=3, I=10, H=17, wrt=("c0",), through=("h_n",)),
    Case(T=5, B=3, I=10, H=17, wrt=("x",), directions=2),
    Case(T=5, B=3, I=10, H=17, wrt=("weight_hh_l0",)),
    Case(T=5, B=3, I=10, H=17, wrt=("weight_ih_l0", "bias_hh_l0"), hx=False),
    Case(T=5, B=3, I=10, H=17, wrt=("bias_ih_l0_reverse",), directions=2, layers=2),
    Case(T=5, B=3, I=10, H=17, wrt=("weight_hr_l1", "x"), proj=5, layers=2),
    Case(T=5, B=3, I=10, H=17, through=("h_n",), directions=2),
    Case(T=5, B=3, I=10, H=17, through=("c_n",), directions=2),
    Case(T=1, B=3, I=10, H=17, through=("c_n",), proj=5),
    Case(T=5, B=3, I=10, H=17, through=("h_n", "c_n"), layers=2, hx=False),
    Case(T=5, B=3, I=10, H=17, through=("y",), layers=2, directions=2),
]

# Where W_hh outgrows a cache level, or a batch too small to share leaves threads to the units.
LARGE = [
    Case(T=64, B=1, I=64, H=256),
    Case(T=5, B=2, I=28, H=512),
    Case(T=5, B=13, I=33, H=300, directions=2),
    Case(T=3, B=128, I=300, H=256),
    Case(T=5, B=3, I=64, H=320, proj=100),
    Case(T=3, B=9, I=1, H=512, x_scale=1000.0, kind="RNN_RELU"),
]


@EVERY_BACKEND
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", FEATURES + SIZES + MEMORY + EXTREMES + SUMS + GRADIENTS, ids=str)
def test_error_is_that_of_pytorch(backend: str, case: Case, dtype: torch.dtype) -> None:
    torch.set_num_threads(1)  # for the BLAS of the reference; the kernels do not care
    check(case, dtype, backend)


@EVERY_BACKEND
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_constant_weights(backend: str, dtype: torch.dtype) -> None:
    """Where every product is alike, rounding errors add up instead of cancelling.

    The kernels for GPUs fall short of it in exact float32.
    """
    if backend in ("cuda", "triton") and dtype is torch.float32:
        pytest.skip("in exact float32 the kernels for GPUs err by more than is allowed")
    check(Case(T=5, B=3, I=28, H=64, values="constant"), dtype, backend)


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large_shapes(backend: str, case: Case, dtype: torch.dtype, threads: int) -> None:
    torch.set_num_threads(threads)
    check(case, dtype)


@EVERY_BACKEND
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("B", [3, 13])
def test_non_finite_input_stays_in_its_row(
    backend: str, dtype: torch.dtype, B: int, bad: float
) -> None:
    """Row 1 meets `bad` at step 2: its own results show it as PyTorch's do, the others never."""
    case = Case(T=5, B=B, I=10, H=17, directions=2, wrt=("x", "h0", "c0"))
    numbers = draw(case, dtype)
    clean = evaluate(case, dtype, numbers, fast)
    spoiled = {name: value.clone() for name, value in numbers.items()}
    spoiled["x"][2, 1, 3] = bad
    got = evaluate(case, dtype, spoiled, fast)
    others = [b for b in range(B) if b != 1]
    for name in clean:
        assert torch.equal(got[name][:, others], clean[name][:, others]), name
    forward, backward = got["y"][:, 1].chunk(2, -1)
    if bad != bad:
        assert forward[2:].isnan().all()
        assert backward[:3].isnan().all()
        assert got["d x"][:, 1].isnan().all()
    else:
        assert not got["y"].isnan().any()
    clean_forward, clean_backward = clean["y"][:, 1].chunk(2, -1)
    assert torch.equal(forward[:2], clean_forward[:2])
    assert torch.equal(backward[3:], clean_backward[3:])


@EVERY_BACKEND
@pytest.mark.parametrize("where", ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "h0", "c0"])
def test_nan_is_never_clamped_away(backend: str, where: str) -> None:
    """A NaN in a parameter or a state reaches the outputs: a gate that clamps would hide it."""
    case = Case(T=3, B=2, I=3, H=5)
    numbers = draw(case, torch.float32)
    numbers[where if where in numbers else f"w.{where}"].view(-1)[0] = float("nan")
    with torch.no_grad():
        assert evaluate(case, torch.float32, numbers, fast)["y"][-1, 0].isnan().any()


@EVERY_BACKEND
def test_poison_reaches_what_kernels_write_to(backend: str) -> None:
    """The other tests rely on NaN in fresh memory; this one sees that it is there."""
    x = torch.zeros(2, 3)
    fresh = [torch.empty(4), torch.empty_like(x), x.new_empty(5), torch.empty(0).resize_(3)]
    assert all(t.isnan().all() for t in fresh)
    lstm = fastlstm.LSTM(3, 5)
    y, (h_n, c_n) = lstm(torch.randn(4, 2, 3))
    assert not any(t.isnan().any() for t in (y, h_n, c_n))
