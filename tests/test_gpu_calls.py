"""How the Triton backend behaves on a GPU: the same bits, graphs, streams, compilers, devices."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import gpu
import pytest
import torch
from cases import Case, Results, evaluate, fast
from gpu import DEVICE, assert_same_bits, check, every_precision, numbers_of
from torch import Tensor, nn

import fastlstm
from benchmarks.speed.gpu_timing import capture
from benchmarks.speed.precision import PRECISIONS, Precision

pytestmark = gpu.MARKS
kernels = gpu.kernels

CALLS = {
    "small": Case(T=20, B=7, I=28, H=64, directions=2, layers=2),
    "wide": Case(T=50, B=64, I=64, H=512),
    "packed": Case(T=6, B=5, I=10, H=256, lengths=(2, 6, 1, 6, 3), packed=True, directions=2),
    "lengths": Case(T=6, B=5, I=10, H=256, lengths=(2, 0, 1, 6, 3), directions=2),
    "reset": Case(T=9, B=7, I=10, H=128, reset=True),
}
every_call = pytest.mark.parametrize("case", CALLS.values(), ids=list(CALLS))


def leaves_and_work(
    lstm: nn.RNNBase, x: Tensor, incoming: Tensor | None
) -> tuple[dict[str, Tensor], Callable[[], Results]]:
    """The leaves, and a call that returns outputs and, with an incoming gradient, gradients."""
    leaves = {**dict(lstm.named_parameters()), "x": x}

    def work() -> Results:
        for leaf in leaves.values():
            leaf.grad = None
        y, (h, c) = lstm(x)
        results = {"y": y, "h": h, "c": c}
        if incoming is not None:
            y.backward(incoming)
            results |= {f"d {name}": leaf.grad for name, leaf in leaves.items()}
        return {name: value.detach() for name, value in results.items()}

    return leaves, work


@every_precision
@every_call
def test_twenty_times_the_same_bits(case: Case, precision: Precision) -> None:
    numbers = numbers_of(case, precision.dtype)
    with precision.applied():
        want = evaluate(case, precision.dtype, numbers, fast)
        for _ in range(19):
            assert_same_bits(evaluate(case, precision.dtype, numbers, fast), want)


@every_precision
@pytest.mark.parametrize("H", [33, 64, 256, 512])
def test_row_does_not_see_its_neighbours(H: int, precision: Precision) -> None:
    """NaN in one row leaves every bit of the others as it was."""
    case = Case(T=5, B=7, I=10, H=H, directions=2, wrt=("x", "h0", "c0"))
    numbers = numbers_of(case, precision.dtype)
    others = [0, 1, 2, 4, 5, 6]
    with precision.applied():
        want = evaluate(case, precision.dtype, numbers, fast)
        numbers["x"] = numbers["x"].detach().clone()
        numbers["x"][2, 3] = torch.nan
        got = evaluate(case, precision.dtype, numbers, fast)
    assert got["d x"][:, 3].isnan().all()
    for name in want:
        assert torch.equal(got[name][:, others], want[name][:, others]), name


BATCHES = ((5, 6), (5, 7), (0, 7), (3, 19), (5, 69))  # first row, and the one after the last
every_width = pytest.mark.parametrize("H", [33, 64, 256, 512])


def some_rows(numbers: Results, start: int, stop: int) -> Results:
    """The numbers of a call with these rows of the batch alone."""
    return {k: v if k[:2] == "w." else v[:, start:stop] for k, v in numbers.items()}


@every_precision
@every_width
def test_rows_are_right_in_any_batch(H: int, precision: Precision) -> None:
    """Not the same bits: cuBLAS splits the sums of its products by the number of rows."""
    full = Case(T=5, B=200, I=28, H=H, directions=2, wrt=("x", "h0", "c0"))
    numbers = {k: v.detach() for k, v in numbers_of(full, precision.dtype).items()}
    for start, stop in ((0, 200), *BATCHES):
        case = replace(full, B=stop - start)
        check(case, precision, numbers=some_rows(numbers, start, stop))


@pytest.mark.only("cuda")
@every_precision
@every_width
def test_kernels_do_not_see_the_size_of_the_batch(H: int, precision: Precision) -> None:
    """The same bits where input products have one term, whatever their order and precision."""
    full = Case(T=5, B=200, I=28, H=H, directions=2, wrt=("h0", "c0"))
    numbers = {k: v.detach() for k, v in numbers_of(full, precision.dtype).items()}
    numbers["x"] = nn.functional.one_hot(numbers["x"].argmax(-1), full.I).double()
    for name in [name for name in numbers if "weight_ih" in name]:
        numbers[name] = numbers[name].half().double()  # as short as TF32
    with precision.applied():
        want = evaluate(full, precision.dtype, numbers, fast)
        for start, stop in BATCHES:
            case, rows = replace(full, B=stop - start), some_rows(numbers, start, stop)
            got = evaluate(case, precision.dtype, rows, fast)
            assert_same_bits(got, {name: want[name][:, start:stop] for name in got})


@every_precision
@pytest.mark.parametrize("train", [False, True], ids=["infer", "train"])
@pytest.mark.parametrize("sizes", [(28, 64, 2, 2), (64, 512, 1, 1)], ids=str)
def test_graph_replays_what_eager_computes(
    sizes: tuple[int, int, int, int], train: bool, precision: Precision
) -> None:
    """With other inputs and other weights than those of the capture."""
    I, H, L, D = sizes
    dtype = precision.dtype
    lstm = fastlstm.LSTM(I, H, L, bidirectional=D == 2, device=DEVICE, dtype=dtype)
    x = torch.randn(20, 16, I, device=DEVICE, dtype=dtype, requires_grad=train)
    incoming = torch.randn(20, 16, D * H, device=DEVICE, dtype=dtype) if train else None
    leaves, work = leaves_and_work(lstm, x, incoming)
    found: Results = {}
    with precision.applied(), torch.set_grad_enabled(train):
        graph = capture(lambda: found.update(work()))
        for factor in (0.5, -0.7):
            with torch.no_grad():
                for leaf in leaves.values():
                    leaf.mul_(factor)
            graph.replay()
            got = {name: value.clone() for name, value in found.items()}
            assert_same_bits(got, work())


@pytest.mark.parametrize("kind", ["dense", "lengths", "reset"])
@pytest.mark.parametrize("H", [64, 512])
def test_the_host_never_waits(H: int, kind: str) -> None:
    """No call and no backward synchronises, wherever lengths and resets are."""
    lstm = fastlstm.LSTM(28, H, 2, bidirectional=kind != "reset", device=DEVICE)
    x = torch.randn(20, 16, 28, device=DEVICE, requires_grad=True)
    options: dict[str, Any] = {
        "dense": {},
        "lengths": {"lengths": torch.randint(0, 21, (16,), device=DEVICE)},
        "reset": {"reset": torch.rand(20, 16, device=DEVICE) < 0.2},
    }[kind]

    def work() -> None:
        y, (h, c) = lstm(x, **options)
        (y.sum() + h.sum() + c.sum()).backward()
        with torch.inference_mode():
            lstm(x, **options)

    work()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def compilations() -> Iterator[list[str]]:
    """What Triton compiles, or loads from its cache on disk, inside the block."""
    from triton import knobs

    found: list[str] = []

    def note(*_: object, repr: str, **__: object) -> None:
        found.append(repr)

    before = knobs.runtime.jit_post_compile_hook
    knobs.runtime.jit_post_compile_hook = note
    try:
        yield found
    finally:
        knobs.runtime.jit_post_compile_hook = before


def nothing(pointer) -> None:  # a kernel; Triton takes no annotation for a tensor
    pass


@pytest.mark.only("triton")
def test_compilations_are_seen() -> None:
    """The test below counts; this one sees that there is something to count with."""
    from triton import jit

    with compilations() as found:
        jit(nothing)[(1,)](torch.zeros(1, device=DEVICE))
    assert len(found) == 1


@pytest.mark.only("triton")
@every_precision
@pytest.mark.parametrize("H", [64, 512])
def test_no_length_and_no_batch_compiles_again(H: int, precision: Precision) -> None:
    """T never does; B only as often as it doubles, for it may choose the tile."""
    lstm = fastlstm.LSTM(28, H, device=DEVICE, dtype=precision.dtype)

    def call(T: int, B: int) -> None:
        x = torch.randn(T, B, 28, device=DEVICE, dtype=precision.dtype)
        lstm(x)[0].sum().backward()
        with torch.inference_mode():
            lstm(x)

    with precision.applied():
        for k in range(9):
            call(7, 2**k)
        with compilations() as found:
            for B in (1, 16, 20, 64):
                for T in (1, 2, 16, 17, 33, 48, 100):
                    call(T, B)
            for B in (3, 5, 12, 17, 48, 50, 100, 129, 144, 200, 255):
                call(7, B)
    assert not found


@every_precision
def test_two_streams_share_the_processors(precision: Precision) -> None:
    """Two calls at once, each of which may want every processor, end and are right."""
    dtype = precision.dtype
    lstm = fastlstm.LSTM(64, 512, device=DEVICE, dtype=dtype)
    inputs = [torch.randn(100, 64, 64, device=DEVICE, dtype=dtype) for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in inputs]
    with precision.applied(), torch.inference_mode():
        want = [lstm(x)[0] for x in inputs]
        torch.cuda.synchronize()
        for _ in range(10):
            got = []
            for stream, x in zip(streams, inputs, strict=True):
                with torch.cuda.stream(stream):
                    got.append(lstm(x)[0])
            torch.cuda.synchronize()
            assert all(map(torch.equal, got, want))


@every_precision
def test_many_steps_end_with_the_same_bits(precision: Precision) -> None:
    case = Case(T=2000, B=64, I=64, H=512, hx=False)
    numbers = numbers_of(case, precision.dtype)
    with precision.applied():
        want = evaluate(case, precision.dtype, numbers, fast)
        for _ in range(4):
            assert_same_bits(evaluate(case, precision.dtype, numbers, fast), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("H", [64, 512])
def test_autocast_is_a_call_in_its_dtype(H: int, dtype: torch.dtype) -> None:
    lstm = fastlstm.LSTM(28, H, 2, device=DEVICE)
    narrow = fastlstm.LSTM(28, H, 2, device=DEVICE, dtype=dtype)
    narrow.load_state_dict(lstm.state_dict())
    x = torch.randn(20, 16, 28, device=DEVICE)
    incoming = torch.randn(20, 16, H, device=DEVICE, dtype=dtype)
    with torch.autocast(DEVICE, dtype):
        y, (h, c) = lstm(x)
    want, (want_h, want_c) = narrow(x.to(dtype))
    assert y.dtype == h.dtype == c.dtype == dtype
    assert torch.equal(y, want) and torch.equal(h, want_h) and torch.equal(c, want_c)
    y.backward(incoming)
    want.backward(incoming)
    for (name, p), q in zip(lstm.named_parameters(), narrow.parameters(), strict=True):
        assert p.grad.dtype == torch.float32
        assert torch.equal(p.grad, q.grad.float()), name


@pytest.mark.parametrize("name", ["bf16", "exact"])
def test_compiled_by_torch(name: str) -> None:
    """In one graph, forward and backward, with the bits of eager."""
    precision = PRECISIONS[name]
    lstm = fastlstm.LSTM(28, 64, 2, bidirectional=True, device=DEVICE, dtype=precision.dtype)
    compiled = torch.compile(lstm, fullgraph=True)
    x = torch.randn(20, 16, 28, device=DEVICE, dtype=precision.dtype)
    found = []
    with precision.applied():
        for call in (lstm, compiled):
            own = x.clone().requires_grad_()
            lstm.zero_grad(set_to_none=True)
            y, _ = call(own)
            y.backward(torch.ones_like(y))
            gradients = {f"d {n}": p.grad for n, p in lstm.named_parameters()}
            found.append({"y": y.detach(), "d x": own.grad, **gradients})
    assert_same_bits(found[1], found[0])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
def test_a_second_device_computes_on_itself() -> None:
    """Kernels run where the tensors are, whichever device is the current one."""
    lstm = fastlstm.LSTM(28, 64, 2, device="cuda:0")
    x = torch.randn(20, 16, 28, device="cuda:0")
    found = []
    for device in ("cuda:0", "cuda:1"):
        lstm.to(device).zero_grad(set_to_none=True)
        _, work = leaves_and_work(
            lstm, x.to(device).requires_grad_(), torch.ones(20, 16, 64, device=device)
        )
        found.append({name: value.cpu() for name, value in work().items()})
        assert torch.cuda.current_device() == 0
    assert_same_bits(found[1], found[0])
