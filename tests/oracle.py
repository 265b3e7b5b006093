"""The oracle: judge a result by its distance to float64, with PyTorch's distance as yardstick.

    truth = PyTorch in float64      peer = PyTorch in the dtype under test
    pass  <=>  max|ours - truth| <= 2 max|peer - truth| + one rounding          for every tensor

The numbers of a case are rounded to the dtype under test before anything else, so all three see
the same ones. A small tensor may come out exact by luck, so the peer is measured at these numbers
and at five of their neighbours, each number moved by a spacing of the dtype, up or down.

One rounding is what nobody can avoid. It has two parts, neither of them typed in:

- of the result: half the spacing of the dtype at the largest value of the tensor;
- of the arguments: how far the truth moves when every number that goes in moves by half a spacing
  of the arithmetic (float32 for 16-bit dtypes), from the truths at the neighbours. It grows with
  T, just as rounding errors do.

The CPU kernels count denormal numbers as zero. So the peer is measured with
torch.set_flush_denormal(True), and a result may be off by the smallest normal number.

Rounding errors are proportional to the spacing. That scales the moves of the neighbours to the
arithmetic, and it makes up for the wider truth that float64 lacks. There the truth is `stepwise`,
whose sums are short. How far it is off itself is estimated by the kernel that nn.LSTM runs for
float64, in float32, times eps(float64) / eps(float32): that adds to the peer's measured distance,
and as the truth is one such result, distance and rounding count once more.

Backends that leave the products outside of the recurrence to PyTorch have sums as long as the BLAS
of the machine makes them, where nn.LSTM may have shorter ones. What exceeds the bounds there is
held against two more yardsticks: PyTorch a step at a time and, for kernels, the reference.
"""

from collections.abc import Callable
from functools import cache

import torch
from cases import Case, Results, draw, evaluate, fast, peer_dtype, plain, stepwise
from torch import Tensor

import fastlstm

NEIGHBOURS = 5


@cache
def expectation(case: Case, dtype: torch.dtype) -> tuple[Results, Results, dict[str, float]]:
    """The numbers of a case, its truth, and for every tensor the largest error allowed."""
    numbers = draw(case, dtype)
    solver = stepwise if case.ragged else plain
    truth = evaluate(case, dtype, numbers, stepwise) if dtype == torch.float64 else None
    return numbers, *judge(lambda d, n: evaluate(case, d, n, solver), dtype, numbers, truth)


def judge(
    solve: Callable[[torch.dtype, Results], Results],
    dtype: torch.dtype,
    numbers: Results,
    truth: Results | None = None,
    arithmetic: float | None = None,
) -> tuple[Results, dict[str, float]]:
    """The truth and the largest error allowed in `dtype`, where `solve` is PyTorch's solution.

    The truth is that of `solve` in float64 unless there is a better one. `arithmetic` is the
    spacing at 1 of the numbers that are multiplied, unless it is that of `dtype` (float32 for
    16-bit dtypes): TF32 has a coarser one.
    """
    wide = dtype == torch.float64
    peer, eps = peer_dtype(dtype), torch.finfo(dtype).eps
    arithmetic = arithmetic or min(eps, torch.finfo(torch.float32).eps)
    tiny = torch.finfo(torch.float64 if wide else torch.float32).smallest_normal
    errors, moves = [], []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the BLAS rounds by the thread count, and the verdict is cached
    with torch.backends.mkldnn.flags(enabled=not wide, allow_tf32=None):  # no float64 in oneDNN
        plain_truth = solve(torch.float64, numbers)
        truth = truth or plain_truth
        errors.append(measure(flushing(solve, peer, numbers), truth))
        for _ in range(NEIGHBOURS):
            near = {name: move(value, peer) for name, value in numbers.items()}
            near_truth = solve(torch.float64, near)
            errors.append(measure(flushing(solve, peer, near), near_truth))
            moves.append(measure(near_truth, truth))
    torch.set_num_threads(threads)
    direct = measure(plain_truth, truth)  # 0 unless there is a better truth
    allowed = {}
    sizes = measure(truth, {name: torch.zeros_like(want) for name, want in truth.items()})
    for name, size in sizes.items():
        scaled = max(e[name] for e in errors) * eps / torch.finfo(peer).eps
        far = scaled + direct[name]
        moved = max(m[name] for m in moves) / 2 * arithmetic / torch.finfo(peer).eps
        rounding = moved + eps * max(size, torch.finfo(dtype).smallest_normal) / 2
        rounding += tiny
        allowed[name] = 2 * far + rounding + (far + rounding if wide else 0)
    return truth, allowed


def flushing(solve: Callable[..., Results], dtype: torch.dtype, numbers: Results) -> Results:
    """PyTorch's solution where denormal numbers are zero."""
    torch.set_flush_denormal(True)
    try:
        return solve(dtype, numbers)
    finally:
        torch.set_flush_denormal(False)


def move(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Every number at a neighbour in `dtype`, up or down by chance; 0 stays."""
    direction = torch.randint_like(value, 2) * 2 - 1
    return (value * (1 + direction * torch.finfo(dtype).eps)).to(dtype).double()


def measure(got: Results, want: Results) -> dict[str, float]:
    """The largest distance in every tensor, 0 in an empty one."""
    return {
        name: distance(got[name], value).amax().item() if value.numel() else 0.0
        for name, value in want.items()
    }


def distance(got: Tensor, want: Tensor) -> Tensor:
    """|got - want|, 0 where both are the same infinity or both NaN, infinite where only one is."""
    same = (got == want) | (got.isnan() & want.isnan())
    return torch.where(same, 0.0, (got - want).abs().nan_to_num(nan=torch.inf))


def check(case: Case, dtype: torch.dtype, backend: str = "cpu") -> None:
    """Assert that fastlstm, training and inferring, is as close to float64 as PyTorch is."""
    settle(case, dtype, *expectation(case, dtype), backend)


def settle(
    case: Case,
    dtype: torch.dtype,
    numbers: Results,
    truth: Results,
    allowed: dict[str, float],
    backend: str,
) -> None:
    """Assert the same by a truth and bounds that are known; what exceeds them is judged again.

    `backend` says whose products they are: those of "cpu" are its own, others have PyTorch's.
    """
    found = outcomes(case, dtype, numbers)
    if backend != "cpu" and any(complaints(got, truth, allowed) for got in found.values()):
        allowed = with_products(case, dtype, numbers, truth, allowed, backend)
    for mode, got in found.items():
        compare(f"{case} in {dtype}, {mode}", got, truth, allowed)


def with_products(
    case: Case,
    dtype: torch.dtype,
    numbers: Results,
    truth: Results,
    allowed: dict[str, float],
    backend: str,
) -> dict[str, float]:
    """What is allowed where the products outside of the recurrence are PyTorch's."""
    _, stepped = judge(lambda d, n: evaluate(case, d, n, stepwise), dtype, numbers, truth)
    allowed = {name: max(bound, stepped[name]) for name, bound in allowed.items()}
    if backend == "reference":
        return allowed
    with fastlstm.backend("reference"):
        _, reference = judge(lambda d, n: evaluate(case, d, n, fast), dtype, numbers, truth)
    return {name: max(bound, reference[name]) for name, bound in allowed.items()}


def outcomes(case: Case, dtype: torch.dtype, numbers: Results) -> dict[str, Results]:
    """What fastlstm makes of the numbers, training and inferring."""
    trained = evaluate(case, dtype, numbers, fast)
    with torch.inference_mode():
        return {"training": trained, "inference": evaluate(case, dtype, numbers, fast)}


def hold(
    case: Case, dtype: torch.dtype, numbers: Results, truth: Results, allowed: dict[str, float]
) -> None:
    """Assert that fastlstm, training and inferring, is off the truth by no more than allowed."""
    for mode, got in outcomes(case, dtype, numbers).items():
        compare(f"{case} in {dtype}, {mode}", got, truth, allowed)


def compare(title: str, got: Results, truth: Results, allowed: dict[str, float]) -> None:
    """Raise an AssertionError that names every tensor out of bounds and its worst element."""
    found = complaints(got, truth, allowed)
    assert not found, "\n".join([title, *found])


def complaints(got: Results, truth: Results, allowed: dict[str, float]) -> list[str]:
    """A line for every tensor out of bounds."""
    found = []
    for name, value in got.items():
        want, bound = truth[name], allowed[name]
        assert value.shape == want.shape, f"{name}: shape {value.shape}, PyTorch's is {want.shape}"
        error = distance(value, want).flatten()
        if error.numel() == 0 or error.max() <= bound:
            continue
        worst = int(error.argmax())
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), want.shape))
        found.append(
            f"  {name}{list(index)} = {value[index]:.9g}, truth {want[index]:.9g}: error "
            f"{error[worst]:.3g}, allowed {bound:.3g}; {int((error > bound).sum())} of "
            f"{error.numel()} elements are out of bounds"
        )
    return found
