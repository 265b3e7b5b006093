"""The oracle at work: the cases of the tests, judged by :mod:`fastlstm.proof.oracle`.

Backends that leave the products outside of the recurrence to PyTorch have sums as long as the BLAS
of the machine makes them, where nn.LSTM may have shorter ones. What exceeds the bounds there is
held against two more yardsticks: PyTorch a step at a time and, for kernels, the reference.

The truth of float64 is PyTorch's too. Where all terms of its sums are alike, their rounding errors
add up: on an AMD CPU it was off by 34 roundings. So there its products sum as torch.sum does.
"""

from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from cases import Case, Results, draw, evaluate, fast, plain, stepwise
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastlstm
from fastlstm.proof.oracle import distance, judge, measure

__all__ = ["check", "compare", "complaints", "distance", "expectation", "hold", "judge", "measure"]


class ShortSums(TorchDispatchMode):
    """Products of matrices whose sums err by a few roundings, however many terms they have."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mm.default:
            return self.product(*args)
        if func is torch.ops.aten.addmm.default and not kwargs:
            return args[0] + self.product(*args[1:])
        return func(*args, **kwargs or {})

    @staticmethod
    def product(a: Tensor, b: Tensor) -> Tensor:
        return (a[:, :, None] * b).sum(1)


@cache
def expectation(case: Case, dtype: torch.dtype) -> tuple[Results, Results, dict[str, float]]:
    """The numbers of a case, its truth, and for every tensor the largest error allowed."""
    numbers = draw(case, dtype)
    solver = stepwise if case.ragged else plain
    truth = None
    if dtype == torch.float64:
        with ShortSums() if case.values == "constant" else nullcontext():
            truth = evaluate(case, dtype, numbers, stepwise)
    return numbers, *judge(lambda d, n: evaluate(case, d, n, solver), dtype, numbers, truth)


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
