"""Numbers of the Triton backend on a GPU, judged by float64 with cuDNN as the yardstick."""

import gpu
import pytest
import torch
from cases import Case, Results, draw_reset, evaluate, fast
from gpu import DEVICE, check, every_precision, numbers_of
from oracle import compare, judge, measure
from torch import Tensor, nn

import fastlstm
from benchmarks.gpu.plan import plan_of_gpu
from benchmarks.speed.job import Job
from benchmarks.speed.precision import PRECISIONS, Precision

pytestmark = gpu.MARKS
kernels = gpu.kernels

# Every H beside every B, T and I somewhere: below, at and just past the width of a tile.
SIZES = [
    Case(T=1, B=1, I=1, H=1),
    Case(T=2, B=2, I=10, H=5),
    Case(T=50, B=7, I=28, H=16, hx=False),
    Case(T=2, B=16, I=10, H=33),
    Case(T=50, B=64, I=28, H=64),
    Case(T=1, B=200, I=300, H=64, hx=False),
    Case(T=50, B=1, I=128, H=100),
    Case(T=2, B=7, I=28, H=128),
    Case(T=50, B=200, I=28, H=128, hx=False),
    Case(T=50, B=16, I=300, H=200),
    Case(T=2, B=64, I=128, H=256),
    Case(T=50, B=2, I=10, H=256, hx=False),
    Case(T=50, B=1, I=28, H=512),
    Case(T=50, B=16, I=128, H=512, hx=False),
    Case(T=2, B=200, I=300, H=512),
    Case(T=50, B=7, I=128, H=1024),
    Case(T=1, B=64, I=10, H=1024, hx=False),
]

FEATURES = [
    Case(T=50, B=16, I=28, H=64, directions=2),
    Case(T=5, B=7, I=10, H=33, directions=2, layers=2, hx=False),
    Case(T=5, B=2, I=28, H=16, layers=3, bias=False, batch_first=True),
    Case(T=20, B=64, I=10, H=32, layers=2),
    Case(T=5, B=7, I=28, H=512, directions=2, layers=2),
    Case(T=5, B=5, I=3, H=17, proj=5),
    Case(T=5, B=7, I=28, H=33, proj=16, directions=2, layers=2),
    Case(T=5, B=16, I=28, H=256, proj=64, bias=False, hx=False),
    Case(T=5, B=3, I=10, H=16, directions=2, layers=2, cell_states=True),
    Case(T=5, B=7, I=10, H=256, proj=33, cell_states=True, batch_first=True, through=("c_all",)),
]

RAGGED = [
    Case(T=6, B=5, I=10, H=17, lengths=(2, 6, 1, 6, 3), packed=True, directions=2),
    Case(T=28, B=64, I=28, H=64, lengths=(28, 20, 9, 1) * 16, packed=True, directions=2, layers=2),
    Case(T=6, B=7, I=28, H=512, lengths=(1, 2, 6, 4, 4, 3, 1), packed=True, hx=False, layers=2),
    Case(T=6, B=3, I=3, H=64, lengths=(2, 6, 3), packed=True, cell_states=True, proj=16),
    Case(T=6, B=5, I=10, H=33, lengths=(2, 0, 1, 6, 3), directions=2, layers=2),
    Case(T=28, B=64, I=28, H=128, lengths=(28, 0, 9, 1) * 16, directions=2, batch_first=True),
    Case(T=6, B=7, I=28, H=512, lengths=(1, 0, 6, 4, 0, 3, 1), hx=False),
    Case(T=5, B=3, I=3, H=16, lengths=(0, 0, 0), directions=2),
    Case(T=9, B=7, I=10, H=64, reset=True),
    Case(T=9, B=6, I=28, H=256, reset=True, layers=2, hx=False, batch_first=True),
    Case(T=9, B=5, I=10, H=17, reset=True, lengths=(0, 9, 4, 1, 7), cell_states=True),
    Case(T=9, B=7, I=10, H=512, reset=True, bias=False),
]

MEMORY = [
    Case(T=5, B=6, I=10, H=64, x_layout="transposed", hx_layout="transposed"),
    Case(T=5, B=7, I=28, H=16, x_layout="reversed", hx_layout="reversed", directions=2),
    Case(T=5, B=3, I=33, H=33, x_layout="sliced", hx_layout="sliced", grad_layout="sliced"),
    Case(T=5, B=5, I=3, H=16, x_layout="steps_alike", grad_layout="rows_alike", directions=2),
    Case(T=5, B=13, I=10, H=256, grad_layout="all_alike", directions=2, batch_first=True),
]

GRADIENTS = [
    Case(T=5, B=3, I=10, H=64, wrt=("c0",), through=("h_n",)),
    Case(T=5, B=3, I=10, H=64, wrt=("x",), directions=2, layers=2),
    Case(T=5, B=3, I=10, H=64, wrt=("weight_ih_l0", "bias_hh_l0"), hx=False),
    Case(T=5, B=3, I=10, H=256, through=("h_n", "c_n"), directions=2),
    Case(T=5, B=7, I=10, H=33, weight_scale=10.0, bias_scale=50.0),
]


def shortened(job: Job) -> Case:
    """The shape of a timing in fewer steps: T is no constant of a kernel, so they share it."""
    case = job.case
    T = min(case.T, 32)
    lengths = tuple(case.lengths.clamp(max=T).tolist()) if case.packed else ()
    sizes = {"T": T, "B": case.B, "I": case.I, "H": case.H}
    more = {"layers": case.L, "directions": case.D, "lengths": lengths, "packed": case.packed}
    return Case(**sizes, **more, hx=False)


@every_precision
@pytest.mark.parametrize("case", SIZES + FEATURES + RAGGED + MEMORY + GRADIENTS, ids=str)
def test_error_is_that_of_cudnn(case: Case, precision: Precision) -> None:
    check(case, precision)


@pytest.mark.parametrize(
    ("case", "precision"),
    dict.fromkeys((shortened(job), job.precision) for job in plan_of_gpu()),
    ids=str,
)
def test_timed_shapes(case: Case, precision: Precision) -> None:
    check(case, precision)


@pytest.mark.parametrize("name", ["bf16", "exact"])
def test_many_steps_on_many_processors(name: str) -> None:
    """Where the state of a step travels between processors, 2,000 times, and never goes stale."""
    check(Case(T=2000, B=64, I=64, H=512, hx=False), PRECISIONS[name])


def test_more_elements_than_32_bits_count() -> None:
    """T * B * 4H above 2^31: every offset must be 64 bits wide.

    The truth and cuDNN take 64 rows at a time; ours takes them all at once.
    """
    T, B, I, H, dtype = 4100, 512, 16, 256, torch.bfloat16
    assert T * B * 4 * H > 2**31
    if torch.cuda.mem_get_info()[0] < 48 * 2**30:
        pytest.skip("less than 48 GiB of GPU memory are free")
    weights = nn.LSTM(I, H, device=DEVICE, dtype=dtype).state_dict()
    x = torch.randn(T, B, I, device=DEVICE, dtype=dtype)
    incoming = torch.randn(T, B, H, device=DEVICE, dtype=dtype)

    def solve(kind: type[nn.RNNBase], dtype: torch.dtype, rows: int) -> Results:
        """Outputs and gradients, so many rows at a time."""
        lstm = kind(I, H, device=DEVICE, dtype=dtype)
        lstm.load_state_dict(weights)
        total: Results = {}
        parts: dict[str, list[Tensor]] = {"y": [], "d x": []}
        for own, back in zip(x.split(rows, 1), incoming.split(rows, 1), strict=True):
            own = own.to(dtype, copy=True).requires_grad_()
            lstm.zero_grad(set_to_none=True)
            y, _ = lstm(own)
            y.backward(back.to(dtype))
            parts["y"].append(y.detach())
            parts["d x"].append(own.grad)
            for name, p in lstm.named_parameters():
                total[f"d {name}"] = total.get(f"d {name}", 0) + p.grad.double()
        return total | {name: torch.cat(pieces, 1) for name, pieces in parts.items()}

    truth = solve(nn.LSTM, torch.float64, 64)
    theirs = measure(solve(nn.LSTM, dtype, 64), truth)
    ours = measure(solve(fastlstm.LSTM, dtype, B), truth)
    for name, want in truth.items():
        rounding = torch.finfo(dtype).eps / 2 * want.abs().max().item()
        assert ours[name] <= 2 * theirs[name] + rounding, name


def penalty(case: Case, dtype: torch.dtype, numbers: Results) -> Results:
    """Gradients in every leaf of |d loss / d x|^2, as float64."""
    lstm = case.module(fastlstm, dtype).to(DEVICE)
    lstm.load_state_dict({k[2:]: v for k, v in numbers.items() if k.startswith("w.")})
    leaves = {k: numbers[k].detach().to(dtype).requires_grad_() for k in ("x", "h0", "c0")}
    outputs = fast(case, lstm, leaves["x"], (leaves["h0"], leaves["c0"]))
    loss = sum(t.square().sum() for t in outputs.values())
    (dx,) = torch.autograd.grad(loss, leaves["x"], create_graph=True)
    leaves |= dict(lstm.named_parameters())
    second = torch.autograd.grad(dx.square().sum(), tuple(leaves.values()))
    return {f"dd {n}": g.double() for n, g in zip(leaves, second, strict=True)}


@pytest.mark.parametrize(
    "case",
    [
        Case(T=5, B=3, I=10, H=17, directions=2),
        Case(T=5, B=7, I=10, H=64, layers=2, lengths=(2, 0, 1, 5, 3, 5, 4)),
        Case(T=9, B=3, I=10, H=33, reset=True, proj=8),
    ],
    ids=str,
)
def test_second_derivatives_are_those_of_the_reference(case: Case) -> None:
    exact = PRECISIONS["exact"]
    numbers = numbers_of(case, exact.dtype)

    def reference(dtype: torch.dtype, numbers: Results) -> Results:
        with fastlstm.backend("reference"):
            return penalty(case, dtype, numbers)

    with exact.applied():
        truth, allowed = judge(reference, exact.dtype, numbers)
        compare(str(case), penalty(case, exact.dtype, numbers), truth, allowed)


@every_precision
@pytest.mark.parametrize("garbage", [float("nan"), float("inf")])
@pytest.mark.parametrize("H", [17, 64, 512])
def test_padding_never_leaks(H: int, garbage: float, precision: Precision) -> None:
    """What stands in the padding of x, or comes in as its gradient, changes no bit anywhere."""
    lengths = (2, 0, 1, 6, 3)
    case = Case(T=6, B=5, I=10, H=H, lengths=lengths, directions=2, layers=2, cell_states=True)
    numbers = numbers_of(case, precision.dtype)
    padding = torch.arange(case.T)[:, None] >= torch.tensor(lengths)
    with precision.applied():
        clean = evaluate(case, precision.dtype, numbers, fast)
        for name in ("x", "g.y", "g.c_all"):
            spoiled = numbers[name].detach().masked_fill(padding[..., None].to(DEVICE), garbage)
            numbers[name] = spoiled
        got = evaluate(case, precision.dtype, numbers, fast)
    gpu.assert_same_bits(got, clean)
    for name in ("y", "c_all", "d x"):
        assert (got[name][padding.to(DEVICE)] == 0).all(), name


@every_precision
def test_reset_forgets_even_nan(precision: Precision) -> None:
    """A row that is reset at its first step does not see its hx, which gets a gradient of 0."""
    case = Case(T=9, B=5, I=10, H=64, reset=True)
    numbers = numbers_of(case, precision.dtype)
    at_start = draw_reset(case)[0].to(DEVICE)
    with precision.applied():
        clean = evaluate(case, precision.dtype, numbers, fast)
        for name in ("h0", "c0"):
            unused = numbers[name].detach().masked_fill(at_start[:, None], torch.nan)
            numbers[name] = unused
        got = evaluate(case, precision.dtype, numbers, fast)
    gpu.assert_same_bits(got, clean)
    for name in ("d h0", "d c0"):
        assert (got[name][:, at_start] == 0).all()


@pytest.mark.parametrize("where", ["x", "h0", "c0", "w.weight_hh_l0", "w.bias_ih_l0"])
@pytest.mark.parametrize("H", [64, 512])
def test_nan_is_never_lost(H: int, where: str) -> None:
    """Nor taken for a flag where the state of a step travels through memory."""
    case = Case(T=5, B=3, I=10, H=H)
    numbers = numbers_of(case, torch.bfloat16)
    numbers[where].detach().view(-1)[0] = torch.nan
    with torch.no_grad():
        assert evaluate(case, torch.bfloat16, numbers, fast)["y"][-1, 0].isnan().any()
