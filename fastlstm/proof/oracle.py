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
arithmetic, and it makes up for the wider truth that float64 lacks. There the truth is one whose
sums are short. How far it is off itself is estimated by the kernel that nn.LSTM runs for float64,
in float32, times eps(float64) / eps(float32): that adds to the peer's measured distance, and as
the truth is one such result, distance and rounding count once more.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Results", "distance", "judge", "measure", "peer_dtype"]

NEIGHBOURS = 5
Results = dict[str, Tensor]


def peer_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype PyTorch is measured in: float32 stands in for float64."""
    return torch.float32 if dtype == torch.float64 else dtype


def judge(
    solve: Callable[[torch.dtype, Results], Results],
    dtype: torch.dtype,
    numbers: Results,
    truth: Results | None = None,
    arithmetic: float | None = None,
) -> tuple[Results, dict[str, float]]:
    """Return the truth and, for every tensor, the largest error allowed in `dtype`.

    Args:
        solve: PyTorch's solution, in a dtype, of such numbers.
        dtype: the one under test.
        numbers: all that goes in, float64 and exact in `dtype`.
        truth: one that is better than that of `solve` in float64, if there is one.
        arithmetic: the spacing at 1 of the numbers that are multiplied, unless it is that of
            `dtype` (float32 for 16-bit dtypes): TF32 has a coarser one.
    """
    wide = dtype == torch.float64
    peer, eps = peer_dtype(dtype), torch.finfo(dtype).eps
    arithmetic = arithmetic or min(eps, torch.finfo(torch.float32).eps)
    tiny = torch.finfo(torch.float64 if wide else torch.float32).smallest_normal
    errors, moves = [], []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the BLAS rounds by the thread count, and a verdict may be kept
    try:
        # There is no float64 in oneDNN.
        with torch.backends.mkldnn.flags(enabled=not wide, allow_tf32=None):
            plain_truth = solve(torch.float64, numbers)
            truth = truth or plain_truth
            errors.append(measure(_flushing(solve, peer, numbers), truth))
            for _ in range(NEIGHBOURS):
                near = {name: _move(value, peer) for name, value in numbers.items()}
                near_truth = solve(torch.float64, near)
                errors.append(measure(_flushing(solve, peer, near), near_truth))
                moves.append(measure(near_truth, truth))
    finally:
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


def _flushing(solve: Callable[..., Results], dtype: torch.dtype, numbers: Results) -> Results:
    """PyTorch's solution where denormal numbers are zero."""
    torch.set_flush_denormal(True)
    try:
        return solve(dtype, numbers)
    finally:
        torch.set_flush_denormal(False)


def _move(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Every number at a neighbour in `dtype`, up or down by chance; 0 stays."""
    direction = torch.randint_like(value, 2) * 2 - 1
    return (value * (1 + direction * torch.finfo(dtype).eps)).to(dtype).double()


def measure(got: Results, want: Results) -> dict[str, float]:
    """Return the largest distance in every tensor, 0 in an empty one."""
    return {
        name: distance(got[name], value).amax().item() if value.numel() else 0.0
        for name, value in want.items()
    }


def distance(got: Tensor, want: Tensor) -> Tensor:
    """Return |got - want|: 0 where both are the same infinity or NaN, infinite where one is."""
    same = (got == want) | (got.isnan() & want.isnan())
    return torch.where(same, 0.0, (got - want).abs().nan_to_num(nan=torch.inf))
